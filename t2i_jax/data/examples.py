"""The records of a split one by one, in their order, and the counting of those that cannot be used."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import grain
import numpy as np

from t2i_jax.data.files import say_once
from t2i_jax.data.images import TooSmall, open_image, size_of
from t2i_jax.data.records import DataError, Reader, Record, as_captions
from t2i_jax.data.transforms import choose_caption, to_shape

log = logging.getLogger(__name__)
Tokenizer = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


@dataclass
class Tally:
    """Counts of broken examples among those seen; too many stop the work."""

    what: str
    """their plural noun, for messages"""
    share: float
    count: int
    notes: Callable[[], Sequence[str]]
    """a sentence on missing captions"""
    seen: int = 0
    broken: int = 0
    small: int = 0
    last: deque[str] = field(default_factory=lambda: deque(maxlen=3))

    def add(self, faults: Sequence[Sequence[str]], small: int) -> None:
        """Count examples by the faults of each, and images that are too small.

        Errors: `DataError` where more than `count`, and a larger share of all than `share`, had faults.
        """
        self.seen += len(faults)
        self.broken += sum(map(bool, faults))
        self.small += small
        self.last.extend(fault for several in faults for fault in several)
        if self.broken > self.count and self.broken > self.share * self.seen:
            raise DataError(
                f"{self.broken} of {self.seen} {self.what}, more than Data.broken_share = {self.share}; "
                + "; ".join(["the last: " + "; ".join(self.last), *self.notes()])
            )


def name_of(reader: Reader, i: int, record: Record) -> str:
    """The name of record i in messages: its key, where it is known, and its file."""
    place, key = reader.key(i), str(record.get("key", ""))
    return place if place.endswith(key) else f"{key} in {place}"


def fault_of(error: Exception) -> str:
    """An error as one line of a log; errors of the data name themselves."""
    return str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"


def log_small(name: str, smallest_side: int) -> None:
    """Log, once, that images are smaller than the data wants."""
    say_once(f"images with a side under Data.smallest_side = {smallest_side} are left out and counted; one is {name}")


@dataclass
class Examples:
    """Records in order, with "image" uint8 (i, j, 3), cropped at the centre to their shape, in place of the file, and
    "crop": top, left, height and width of that part as shares of the image's sides, whose rows and columns are
    "original".

    Asking for a broken one, or for one whose image is too small, raises `DataError` that names it. Iterating leaves
    such records out, logs and counts them, and stops where too many are broken.
    """

    reader: Reader
    shapes: Sequence[tuple[int, int]]
    """rows and columns of images"""
    buckets: np.ndarray
    """the number of the shape of each record"""
    image: bool
    tally: Tally
    captions: bool = False
    """a record without a caption is broken"""
    empty_captions: bool = False
    """it is not, and its caption is "" """
    text: Tokenizer | None = None
    """adds "tokens": ids int32 (captions, s) and mask bool (captions, s) of all captions"""
    smallest_side: int = 0
    files: bool = False
    """adds "file": the image as the source has it"""

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, i: int) -> Record:
        record, fault, _ = self.read(i)
        if fault:
            raise DataError(fault)
        return record

    def read(self, i: int) -> tuple[Record, str, bool]:
        """Record i; what is wrong with it; and whether that is its size alone."""
        record: Record = {}
        try:
            record = self.reader[i]
            return self._made(record, self.shapes[int(self.buckets[i])]), "", False
        except Exception as error:  # any error of a library over a damaged file
            return {}, f"{name_of(self.reader, i, record)} ({fault_of(error)})", isinstance(error, TooSmall)

    def _made(self, record: Record, shape: tuple[int, int]) -> Record:
        record = dict(record)
        if self.captions or self.text is not None:
            first = choose_caption(record.get("captions"), empty=self.empty_captions)
            record["captions"] = record.get("captions") or [first]
        if self.text is not None:
            ids, mask = self.text(record["captions"])
            record["tokens"] = np.asarray(ids, np.int32), np.asarray(mask, bool)
        if self.image and "image" in record:
            record |= {"file": record["image"]} if self.files else {}
            image = open_image(record["image"], max(shape), 1.0, self.smallest_side)
            cut, crop = to_shape(image, shape)
            record |= {"image": cut, "crop": list(crop), "original": list(size_of(record["image"]))}
        return record

    def __iter__(self) -> Iterator[Record]:
        return self.block(0, len(self))

    def block(self, start: int, stop: int, threads: int = 0) -> Iterator[Record]:
        """The usable records of start ... stop - 1, read ahead by `threads` threads."""
        return (record for _, record in self.numbered(start, stop, threads))

    def numbered(self, start: int, stop: int, threads: int = 0) -> Iterator[tuple[int, Record]]:
        """The same, each with its number in the split."""
        rows = grain.MapDataset.range(start, stop).map(lambda i: (i, *self.read(i)))
        warned = self.captions
        for i, record, fault, small in rows.to_iter_dataset(grain.ReadOptions(threads, 256 if threads else 0)):
            if not self._taken(fault, small):
                continue
            if not (warned or record.get("captions", True)):
                found = as_captions(record["captions"])
                why = found.fault or found.missing
                log.warning("there are records without a caption, the first: %s (%s)", record.get("key"), why)
                warned = True
            yield i, record

    def spaced(self, count: int) -> list[Record]:
        """Evenly spaced records, at most `count`; the next usable one replaces one that is not."""
        found, following = [], 0
        for place in np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int).tolist():
            for i in range(max(place, following), len(self)):
                record, fault, small = self.read(i)
                following = i + 1
                if self._taken(fault, small):
                    found.append(record)
                    break
        return found

    def _taken(self, fault: str, small: bool) -> bool:
        if small and not self.tally.small:
            log_small(fault, self.smallest_side)
        elif fault and not small:
            log.warning("broken record, left out: %s", fault)
        self.tally.add([[fault] if fault and not small else []], int(small))
        return not fault

    def summary(self) -> str:
        """How many of the records that were read are left out, and why; empty where none is."""
        tally = self.tally
        counts = {"broken": tally.broken, f"under Data.smallest_side = {self.smallest_side}": tally.small}
        reasons = [f"{count} as {why}" for why, count in counts.items() if count]
        return f"of {tally.seen} records are left out: {', '.join(reasons)}" if reasons else ""
