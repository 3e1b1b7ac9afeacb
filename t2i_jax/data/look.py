"""A look at pictures before anything is trained on them: counts, sizes, captions, broken ones, duplicates."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image

from t2i_jax.core.errors import DataError
from t2i_jax.data.examples import fault_of, name_of
from t2i_jax.data.found import find_source
from t2i_jax.data.images import open_image, size_of
from t2i_jax.data.records import Reader, Record, as_captions
from t2i_jax.data.sources import Source
from t2i_jax.data.transforms import to_square

SIDE = 96
"""Side of the pictures on a contact sheet."""
SHOWN = 48
"""Pictures on it."""
NEAR = 12
"""Levels by which the means of 8x8 parts of two near duplicates differ at most."""
SHORT = (32, 64, 128, 256, 512, 1024, 2048)
"""Ends of the classes of short sides."""
SHAPES = ((0.5, "1:2 and higher"), (0.8, "high"), (1.25, "about square"), (2.0, "wide"), (math.inf, "2:1 and wider"))
"""Ends of the classes of width over height, and what they are called."""


@dataclass(frozen=True)
class Seen:
    """What is kept of one record."""

    key: str
    fault: str = ""
    """why it cannot be used"""
    size: tuple[int, int] = (0, 0)
    """width and height, upright"""
    captions: tuple[str, ...] = ()
    uncaptioned: str = ""
    """why it has no caption"""
    label: int | None = None
    digest: str = ""
    small: np.ndarray | None = None
    """means of 8x8 parts, uint8 (8, 8, 3)"""
    square: np.ndarray | None = None
    """for the contact sheet, uint8 (SIDE, SIDE, 3)"""

    @property
    def brightness(self) -> float:
        return 0.0 if self.small is None else float(self.small.mean())


@dataclass(frozen=True)
class Look:
    """What was seen of a data set."""

    data: str
    source: Source
    about: tuple[str, ...]
    """sentences on the source"""
    classes: tuple[str, ...]
    records: int
    """all of them"""
    seen: tuple[Seen, ...]
    """those that were looked at, evenly spaced"""
    notes: tuple[str, ...] = ()
    """files that are not read"""

    @property
    def usable(self) -> list[Seen]:
        """The records whose picture can be read."""
        return [one for one in self.seen if not one.fault]

    @property
    def broken(self) -> list[Seen]:
        return [one for one in self.seen if one.fault]

    @property
    def uncaptioned(self) -> list[Seen]:
        return [one for one in self.usable if not one.captions]

    @property
    def captions(self) -> list[str]:
        return [caption for one in self.usable for caption in one.captions]

    def duplicates(self) -> list[list[str]]:
        """Groups of records with the same picture file."""
        return grouped((one.digest, one.key) for one in self.usable)

    def near(self) -> list[list[str]]:
        """Groups of records whose files differ, with pictures that are nearly the same."""
        first = {one.digest: one for one in reversed(self.usable) if one.small is not None}  # one of each file
        several = sorted(first.values(), key=lambda one: (one.brightness, one.key))
        if not several:
            return []
        small = np.stack([one.small for one in several if one.small is not None]).astype(np.int16)
        means, taken, found = np.array([one.brightness for one in several]), np.zeros(len(several), bool), []
        for i, lead in enumerate(several):
            # Where no part differs by more than NEAR, the whole does not.
            stop = int(np.searchsorted(means, means[i] + NEAR, side="right"))
            gaps = np.abs(small[i + 1 : stop] - small[i]).max((1, 2, 3))
            alike = [] if taken[i] else [i + 1 + n for n in np.flatnonzero(gaps <= NEAR) if not taken[i + 1 + n]]
            taken[alike] = True
            found += [[lead.key, *(several[n].key for n in alike)]] if alike else []
        return sorted(sorted(group) for group in found)

    def short_sides(self) -> dict[str, int]:
        """How many pictures have a short side in each class."""
        return _classed((min(one.size) for one in self.usable), SHORT)

    def shapes(self) -> dict[str, int]:
        """How many pictures have each kind of shape."""
        counts = Counter(next(name for end, name in SHAPES if w / h < end) for w, h in (s.size for s in self.usable))
        return {name: counts[name] for _, name in SHAPES if counts[name]}

    def sizes(self, most: int = 12) -> dict[str, int]:
        """The most frequent sizes."""
        return dict(Counter(f"{w}x{h}" for w, h in (one.size for one in self.usable)).most_common(most))

    def words(self) -> dict[str, int]:
        """The shortest, the middle and the longest caption, in words."""
        counts = sorted(len(caption.split()) for caption in self.captions)
        at = lambda share: counts[min(int(share * len(counts)), len(counts) - 1)]
        return (
            {"least": counts[0], "median": at(0.5), "nine of ten below": at(0.9), "most": counts[-1]} if counts else {}
        )

    def report(self) -> dict[str, object]:
        """The content of `look.json`."""
        each = Counter(len(one.captions) for one in self.usable)
        labels = Counter(one.label for one in self.usable if one.label is not None)
        return {
            "data": self.data,
            "about": list(self.about),
            "records": self.records,
            "looked_at": len(self.seen),
            "pictures": len(self.usable),
            "sizes": self.sizes(),
            "short_sides": self.short_sides(),
            "shapes": self.shapes(),
            "captions": len(self.captions),
            "different_captions": len(set(self.captions)),
            "captions_per_picture": {str(n): each[n] for n in sorted(each)},
            "words_per_caption": self.words(),
            "classes": {name: labels[n] for n, name in enumerate(self.classes)},
            "broken": {one.key: one.fault for one in self.broken},
            "uncaptioned": {one.key: one.uncaptioned for one in self.uncaptioned},
            "duplicates": self.duplicates(),
            "near_duplicates": self.near(),
            "notes": list(self.notes),
        }

    def sheet(self) -> tuple[np.ndarray, list[str]]:
        """Pictures uint8 (n, SIDE, SIDE, 3), cut as in training, and their captions, or names."""
        usable = [one for one in self.usable if one.square is not None]
        squares = [one.square for one in usable if one.square is not None]
        return np.stack(squares), [next(iter(one.captions), one.key) for one in usable]


def grouped(pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The keys that have a value in common, of each value that several have."""
    groups: dict[str, list[str]] = {}
    for value, key in pairs:
        groups.setdefault(value, []).append(key)
    return sorted(sorted(keys) for keys in groups.values() if len(keys) > 1)


def _classed(numbers: Iterable[int], ends: Sequence[int]) -> dict[str, int]:
    counts = Counter(int(np.searchsorted(ends, n, side="right")) for n in numbers)
    names = [
        f"under {ends[0]}",
        *(f"{a} to {b - 1}" for a, b in pairwise(ends)),
        f"{ends[-1]} and more",
    ]
    return {name: counts[i] for i, name in enumerate(names) if counts[i]}


def look(
    data: str,
    most: int = 20_000,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    captions: bool = True,
) -> Look:
    """Look at the pictures of `data`, as `find_source` reads it, of more than `most` at evenly spaced ones.

    on_progress: called with how many are looked at, of how many. Errors: `DataError` where no source is found, and
    where none of its records has a picture that can be read, with the first fault.
    """
    found = find_source(data, captions)
    reader = found.source.open()
    if not len(reader):
        raise DataError(f"{data}: there is no record")
    places = np.unique(np.linspace(0, len(reader) - 1, min(most, len(reader))).round().astype(int)).tolist()
    shown = set(places[:: max(1, -(-len(places) // SHOWN))])
    seen = []
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for n, one in enumerate(_ahead(pool, reader, places, shown)):
            seen.append(one)
            on_progress(n + 1, len(places))
    if all(one.fault for one in seen):
        first = f"the first: {seen[0].key} ({seen[0].fault})"
        raise DataError(f"{data}: none of {len(seen)} records has a picture that can be read; {first}")
    notes = tuple(reader.notes(False))
    return Look(data, found.source, found.about, found.classes, len(reader), tuple(seen), notes)


def _ahead(pool: ThreadPoolExecutor, reader: Reader, places: Sequence[int], shown: set[int]) -> Iterator[Seen]:
    """What is seen of each record, in order; few are read at a time."""
    chunk = 256
    for at in range(0, len(places), chunk):
        yield from pool.map(lambda i: see(reader, i, i in shown), places[at : at + chunk])


def see(reader: Reader, i: int, square: bool = False) -> Seen:
    """What is seen of record i; square: also its picture for the contact sheet."""
    record: Record = {}
    try:
        record = reader[i]
        if "image" not in record:
            held = ", ".join(sorted(record.keys() - {"key", "split"}))
            raise DataError(f"the record has no picture; it has {held}")
        image = open_image(record["image"], SIDE)
        small = np.asarray(image.resize((8, 8), Image.Resampling.BOX))
        captions, (rows, columns) = as_captions(record.get("captions")), size_of(record["image"])
        label = record.get("label")
        return Seen(
            name_of(reader, i, record),
            size=(columns, rows),
            captions=tuple(c for c in captions if c),
            uncaptioned="" if any(captions) else captions.fault or captions.missing,
            label=int(label) if isinstance(label, int | np.integer) else None,
            digest=hashlib.blake2b(_bytes(record["image"]), digest_size=16).hexdigest(),
            small=small,
            square=to_square(image, SIDE) if square else None,
        )
    except Exception as error:  # any error of a library over a damaged file
        return Seen(name_of(reader, i, record), fault=fault_of(error))


def _bytes(image: bytes | np.ndarray) -> bytes:
    return image if isinstance(image, bytes) else image.tobytes()
