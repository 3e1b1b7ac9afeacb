"""From a source to batches: an endless, shuffled stream of examples in which a place is one integer.

The stream. Example g (g = 0, 1, 2, ...) is a pure function of the config and g: which record it is follows from the
shuffle of its epoch, and its crop, flip and caption from a generator seeded by (seed, g). Batch n of a run that starts
at `position` holds the examples position + n * batch_size + (0 ... batch_size - 1), in this order. Of it process p of
`count` makes the p-th contiguous block, so the blocks one behind the other in the order of the processes are the batch,
row by row the same on 1, 2 or 64 hosts. Nothing but `position` has to be saved: a run goes on exactly, on any number of
hosts and workers.

Broken records. An example whose record cannot be read is made from the next record of the source that can. So batches
stay full, `position` stays a plain count of examples, and the stream stays a pure function of g; each replacement is
counted and logged with its key. A worker process that dies (no memory, a kill) is told and replaced, and the stream
goes on where it was.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import grain
import numpy as np

from t2i_jax.core.types import BatchSpec
from t2i_jax.data.order import Order, Rows
from t2i_jax.data.records import DataError, Record
from t2i_jax.data.sources import Joined, Mixture, Reader, Source
from t2i_jax.data.transforms import choose_caption, may_flip, open_image, to_square

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]
Tokenizer = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
PER_CAPTION = ("features", "text_mask")  # a row for each caption of the record
ARRAYS = ("label", "codes", "latents", *PER_CAPTION)
SIDED = ("left", "right", "flag", "text", "letter", "letters", "word", "words", "sign", "button", "symbol", "logo")
SIDED += ("number", "digit", "keycap", "clock", "o'clock", "map", "writing", "japanese", "arrow")
TRIES = 100
DEATHS = 3


@dataclass(frozen=True)
class Data:
    """A source and how its records become batches."""

    source: Source
    """Where the training examples come from."""
    held_out: Source | None = None
    """Where every split but "train" comes from; `None` is the source's own split of that name."""
    image_size: int = 64
    """Side of the square pictures in a batch."""
    batch_size: int = 64
    """Examples in a batch over all processes."""
    crop: Literal["center", "random"] = "center"
    """Where the square is cut out when training."""
    smallest_crop: float = 0.8
    """The smallest random crop, as a share of the short side."""
    flip: bool = False
    """Mirror every second picture when training, unless a caption has a word of `flip_except`."""
    flip_except: tuple[str, ...] = SIDED
    """Words of captions that a mirrored picture would belie."""
    caption: Literal["random", "first"] = "random"
    """Which of several captions an example gets when training."""
    fields: tuple[str, ...] = ("image", *ARRAYS)
    """What goes into a batch, of what the records have; without "image" no picture is decoded."""
    seed: int = 0
    """Seed of the shuffle, crops, flips and captions."""
    workers: int = 0
    """Processes that make batches; 0 makes them in threads of this one."""
    threads: int = 2
    """Threads that make batches, in each process."""
    prefetch: int = 4
    """Batches that each process makes ahead."""
    broken_share: float = 0.01
    """The run stops when a larger share of the examples was broken ..."""
    broken_count: int = 10
    """... and more than so many of them."""

    def batches(
        self,
        text: Tokenizer | None = None,
        position: int = 0,
        process: int = 0,
        count: int = 1,
        split: str = "train",
        spec: BatchSpec | None = None,
    ) -> Iterator[Batch]:
        """This process's part of the endless stream of batches that follows the first `position` examples.

        Gives "image" uint8 (b, i, j, 3), "text" int32 (b, s) and "text_mask" bool (b, s) if there is a `text` (any
        function of captions to ids and mask; stored "features" that are among `fields` stand in for it), "label" int32
        (b,) and the other arrays of `fields` that the records hold; b = batch_size / count. A split other than "train"
        is shuffled too, but not augmented: centre crop, no flip, first caption. Close the iterator to end its workers.

        Errors: `DataError` for a batch size that `count` does not divide, for an unreadable source, for records that
        do not fit together, and when too many are broken, naming the last of them.
        """
        if self.batch_size % count or not 0 <= process < count:
            raise DataError(
                f"a batch of {self.batch_size} cannot be divided among {count} processes (this is {process})"
            )
        if position < 0:
            raise DataError(f"the data position is {position}; it counts examples and cannot be negative")
        source = self.split(split)
        reader = source.open()
        examples = _Examples(self, reader, self._order(source, reader), text is not None, split == "train")
        local = self.batch_size // count

        def stream(done: int) -> Iterator[tuple[Batch, list[str]]]:
            """The batches, each with what was wrong on the way, behind the first `done` of them."""
            rows = Rows(position + done * self.batch_size, self.batch_size, process, count)
            made = grain.MapDataset.source(rows).map(examples).batch(local, batch_fn=_Collate(text))
            made = made.to_iter_dataset(grain.ReadOptions(self.threads, max(self.prefetch, self.threads)))
            if self.workers:
                _parse_flags()
                made = made.mp_prefetch(grain.MultiprocessingOptions(self.workers, max(1, self.prefetch)))
            return iter(made)

        return self._watched(restarted(stream))

    def examples(self, split: str = "train") -> Examples:
        """The records of a split in the order of the source, their pictures decoded and cropped at the centre."""
        return Examples(self.split(split).open(), self.image_size, "image" in self.fields)

    def split(self, split: str) -> Source:
        """The source of a split."""
        if split == "train":
            return self.source
        if self.held_out is not None:
            return self.held_out
        return _split(self.source, split)

    def _order(self, source: Source, reader: Reader) -> Order:
        if isinstance(source, Mixture) and isinstance(reader, Joined):
            return Order([len(r) for r in reader.readers], source.weights, self.seed)
        return Order([len(reader)], None, self.seed)

    def _watched(self, stream: Generator[tuple[Batch, list[str]]]) -> Iterator[Batch]:
        seen = broken = 0
        last: deque[str] = deque(maxlen=5)
        with closing(stream):
            for batch, faults in stream:
                for fault in faults:
                    log.warning("broken record, replaced: %s", fault)
                last.extend(faults)
                broken += len(faults)
                seen += len(next(iter(batch.values())))
                if broken > self.broken_count and broken > self.broken_share * seen:
                    raise DataError(
                        f"{broken} of {seen} records were broken, more than Data.broken_share = {self.broken_share}; "
                        f"the last: {'; '.join(last)}"
                    )
                yield batch


def restarted(stream: Callable[[int], Iterator[Any]]) -> Generator[Any]:
    """What `stream(done)` gives, begun anew behind what was given already when one of its worker processes has died.

    Errors: `DataError` where workers died DEATHS times and nothing came in between.
    """
    done = deaths = 0
    while True:
        iterator = stream(done)
        try:
            for item in iterator:
                yield item
                done, deaths = done + 1, 0
            return
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):  # what grain says of a worker that is gone
                raise
            deaths += 1
            if deaths == DEATHS:
                raise DataError(
                    f"worker processes of the input pipeline died {DEATHS} times at batch {done} of this run, the last "
                    f"one so: {error} Too little memory (see the kernel's log) and a record that crashes a library are "
                    "usual reasons; Data.workers=0 makes batches in this process"
                ) from error
            log.warning("a worker process of the input pipeline died and is started again: %s", error)
        finally:
            if close := getattr(iterator, "close", None):
                close()


def _split(source: Source, split: str) -> Source:
    if isinstance(source, Mixture):
        parts: tuple[Any, ...] = tuple(_split(s, split) for s in source.sources)
        return dataclasses.replace(source, sources=parts)
    if "split" not in {f.name for f in dataclasses.fields(source)}:
        raise DataError(f"{type(source).__name__} has no splits: name a source for '{split}' in Data.held_out")
    return dataclasses.replace(source, split=split)


def _parse_flags() -> None:
    """grain's worker processes read absl flags, which a program without absl has never parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


Example = tuple[Batch, str | None, list[str]]


@dataclass
class _Examples:
    """Example g: its arrays, its caption, and what was wrong with the records that it replaces."""

    data: Data
    reader: Reader
    order: Order
    captions: bool
    augment: bool

    def __call__(self, g: int) -> Example:
        first, faults = self.order[g], []
        for step in range(TRIES):
            i = (first + step) % len(self.reader)
            record: Record = {}
            try:
                record = self.reader[i]
                return *self.example(record, np.random.default_rng((self.data.seed, g))), faults
            except Exception as error:  # whatever a picture library finds in a damaged file
                faults.append(f"{record.get('key', f'record {i}')} ({type(error).__name__}: {error})")
        raise DataError(f"{TRIES} records one behind the other are broken, the last: {faults[-1]}")

    def example(self, record: Record, rng: np.random.Generator) -> tuple[Batch, str | None]:
        data, random = self.data, rng if self.augment else None
        arrays: Batch = {}
        # All draws are taken in this order whatever the record is like.
        x = rng.uniform()
        caption, row, chooser = None, 0, random if data.caption == "random" else None
        if "features" in data.fields and "features" in record:
            row = int(chooser.integers(len(record["features"]))) if chooser is not None else 0
        elif self.captions:
            caption = choose_caption(record.get("captions"), chooser)
        if "image" in data.fields and "image" in record:
            picture = open_image(record["image"], data.image_size)
            image = to_square(picture, data.image_size, random if data.crop == "random" else None, data.smallest_crop)
            flip = data.flip and self.augment and x < 0.5 and may_flip(record.get("captions") or (), data.flip_except)
            arrays["image"] = image[:, ::-1] if flip else image
        for name in ARRAYS:
            if name in data.fields and record.get(name) is not None:
                value = np.asarray(record[name])
                value = value[row] if name in PER_CAPTION else value
                arrays[name] = value.astype(np.int32) if value.dtype.kind in "iu" else value
        if not arrays and caption is None:
            raise DataError(f"the record has none of Data.fields {data.fields}, only {sorted(record)}")
        return arrays, caption


@dataclass
class _Collate:
    """Examples to one batch, and everything that was wrong on the way."""

    text: Tokenizer | None

    def __call__(self, examples: Sequence[Example]) -> tuple[Batch, list[str]]:
        batch: Batch = {}
        for name in dict.fromkeys(name for arrays, _, _ in examples for name in arrays):
            shapes = {str(arrays[name].shape) if name in arrays else "missing" for arrays, _, _ in examples}
            if len(shapes) > 1:
                raise DataError(f"records of one batch differ in '{name}': its shapes are {', '.join(sorted(shapes))}")
            batch[name] = np.stack([arrays[name] for arrays, _, _ in examples])
        captions = [caption for _, caption, _ in examples if caption is not None]
        if self.text is not None and captions:
            if len(captions) < len(examples):
                raise DataError("records of one batch differ: some have 'features' and some have not")
            ids, mask = self.text(captions)
            batch["text"], batch["text_mask"] = np.asarray(ids, np.int32), np.asarray(mask, bool)
        return batch, [fault for _, _, faults in examples for fault in faults]


@dataclass
class Examples:
    """Records in order, with "image" uint8 (image_size, image_size, 3) in place of a picture file.

    Asking for a broken one raises what is wrong with it; iterating leaves it out and logs it.
    """

    reader: Reader
    image_size: int
    image: bool = True

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, i: int) -> Record:
        record = self.reader[i]
        if self.image and "image" in record:
            record = {**record, "image": to_square(open_image(record["image"], self.image_size), self.image_size)}
        return record

    def __iter__(self) -> Iterator[Record]:
        return self.block(0, len(self))

    def block(self, start: int, stop: int, threads: int = 0) -> Iterator[Record]:
        """The records start ... stop - 1, made by so many threads ahead of their use; broken ones are left out."""

        def read(i: int) -> tuple[Record, str]:
            try:
                return self[i], ""
            except Exception as error:  # whatever a picture library finds in a damaged file
                return {}, f"broken record {i}, left out: {type(error).__name__}: {error}"

        rows = grain.MapDataset.range(start, stop).map(read)
        for record, fault in rows.to_iter_dataset(grain.ReadOptions(threads, 256 if threads else 0)):
            if fault:
                log.warning("%s", fault)
            else:
                yield record
