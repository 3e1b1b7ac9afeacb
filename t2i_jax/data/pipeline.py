"""From a source to batches: an endless, shuffled stream of examples whose position is one integer.

The stream. Example g (g = 0, 1, 2, ...) is a pure function of the config and g: which record it is follows from the
shuffle of its epoch, and its crop, flip and caption from a generator seeded by (seed, g). Batch n of a run that starts
at `position` holds the examples position + n * batch_size + (0 ... batch_size - 1), in this order. A process makes the
rows of its own devices, whatever rows they are, so a batch is row by row the same on 1, 2 or 64 hosts. Nothing but
`position` has to be saved: a run goes on exactly, on any number of hosts and workers.

Shapes. With `Data.shapes` the images of a batch have one of them, and which one follows from the number of the batch
(`data/buckets.py`).

Broken records. An example whose record cannot be read, or that the model cannot take, is made from the next record of
its source that can be used, and so is one whose image is too small. So batches stay full, `position` stays
a plain count of examples, and the stream stays a pure function of g. Each broken record is counted and logged with its
key and file; too small images are counted. A worker process that dies (OOM, SIGKILL) is logged and restarted,
and the stream goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple, TypeVar

import grain
import numpy as np

from t2i_jax.core.fields import FREE, Checked, Count, Grid, NotNegative, Range, Seed, Size, Workers
from t2i_jax.core.memory import check_memory
from t2i_jax.core.specs import BatchSpec, check_example
from t2i_jax.data.buckets import BucketOrder, buckets_of, check_shapes, note_small, sizes_of
from t2i_jax.data.examples import Examples, Tally, Tokenizer, fault_of, log_small, name_of
from t2i_jax.data.files import say_once
from t2i_jax.data.images import TooSmall, open_image, size_of
from t2i_jax.data.order import Order, Rows
from t2i_jax.data.records import WEIGHTS, DataError, Reader, Record
from t2i_jax.data.sources import Concat, Mixture, Source, Swapped
from t2i_jax.data.transforms import Crop, choose_caption, choose_row, may_flip, to_shape

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]
Facts = dict[str, int | str]
"""what is known of a split, for printing"""
Field = Literal["image", "label", "codes", "low_codes", "latents", "image_features", "features", "text_mask"]
PER_CAPTION: tuple[Field, ...] = ("features", "text_mask")  # a row for each caption of the record
ARRAYS: tuple[Field, ...] = ("label", "codes", "low_codes", "latents", "image_features", *PER_CAPTION)
DIRECTIONAL_WORDS = (
    "left", "right", "flag", "text", "letter", "letters", "word", "words", "sign", "button", "symbol", "logo", "number",
    "digit", "keycap", "clock", "o'clock", "map", "writing", "japanese", "arrow",
)  # fmt: skip
TRIES = 100
"""Broken records in a row that end a run."""
TRIES_SMALL = 10_000
"""Images in a row that are too small, which end a run."""
DEATHS = 3


@dataclass(frozen=True)
class Data(Checked):
    """A source and how its records become batches."""

    source: Source
    """The source of training examples."""
    held_out: Source | None = None
    """The source of every split but "train"; `None` is the source's own split of that name."""
    image_size: Size = 64
    """Side of the square images in a batch."""
    shapes: tuple[Grid, ...] = ()
    """Rows and columns of images in place of squares: each image is cut to the one with the nearest ratio of sides, and
    a batch has images of one shape. `shapes_around` makes a list of them."""
    batch_size: Size = 64
    """Examples in a batch over all processes."""
    crop: Literal["center", "random"] = "center"
    """Where the square is cut out when training."""
    smallest_crop: Annotated[float, Range(above=0, high=1)] = 0.8
    """The smallest random crop, as a share of the short side."""
    flip: bool = False
    """Mirror every second image when training, unless a caption has a word of `flip_except`."""
    flip_except: tuple[str, ...] = DIRECTIONAL_WORDS
    """Words of captions that a mirrored image would contradict."""
    caption: Literal["random", "first"] = "random"
    """Which of several captions an example gets when training."""
    swapped_captions: bool = False
    """Train each image with the captions of another one, always the same: a control, which cannot learn what captions
    say."""
    empty_captions: bool = False
    """Take a record without a caption, with the caption "" (the unconditional one of many models); else it is broken
    where captions are needed."""
    smallest_side: Count = 0
    """Images with a shorter side are left out: enlarging them would invent pixels."""
    fields: tuple[Field, ...] = ("image", *ARRAYS)
    """The fields of records that go into a batch; without "image" no image is decoded."""
    seed: Seed = 0
    """Seed of the shuffle, crops, flips and captions."""
    workers: Annotated[Workers, FREE] = 0
    """Processes that make batches; 0 makes them in threads of this one."""
    threads: Annotated[Workers, FREE] = 2
    """Threads that make batches, in each process."""
    prefetch: Annotated[int, Range(0, 65536), FREE] = 4
    """Batches that each process makes ahead."""
    broken_share: Annotated[NotNegative, FREE] = 0.01
    """The run stops when a larger share of the examples met a broken record ..."""
    broken_count: Annotated[Count, FREE] = 10
    """... and more than so many of them."""

    def __post_init__(self):
        super().__post_init__()
        check_shapes(self.shapes)

    def batches(
        self,
        text: Tokenizer | None = None,
        position: int = 0,
        rows: Sequence[int] | None = None,
        split: str = "train",
        spec: BatchSpec | None = None,
    ) -> Generator[Batch]:
        """The given rows of each batch, all unless given, of the endless stream that follows `position` examples.

        Gives "image" uint8 (b, i, j, 3), "text" int32 (b, s) and "text_mask" bool (b, s) if there is a `text` (any
        function of captions to ids and mask; stored "features" that are among `fields` stand in for it), "label" int32
        (b,) and the other arrays of `fields` that the records hold; b is the number of rows. A split other than "train"
        is shuffled too, but not augmented: centre crop, no flip, first caption. Close the iterator to end its workers.

        spec: what the model takes: a batch has these names alone, and a record that does not match is broken.
        Errors: `DataError` for rows that a batch does not have, for an unreadable source, for records that do not fit
        together, and when too many are broken, naming the last of them; what `text` raises where it fails for any
        caption.
        """
        rows = range(self.batch_size) if rows is None else [int(row) for row in rows]
        if not rows or min(rows) < 0 or max(rows) >= self.batch_size:
            raise DataError(f"rows {list(rows)[:8]}: a batch has the rows 0 to {self.batch_size - 1}")
        if position < 0:
            raise DataError(f"the data position is {position}; it counts examples and cannot be negative")
        share = len(rows) / self.batch_size
        most = max(r * c for r, c in self.all_shapes)
        least = self.batch_size * (3 * most if "image" in self.fields else 100)
        check_memory(f"batch_size {self.batch_size}, image_size {self.image_size}: a batch", least * share)
        text = text if spec is None or "text" in spec else None
        reader = self._open(split, text is not None)
        source = self.split(split)
        sizes, weights = [len(reader)], None
        if isinstance(source, Mixture) and isinstance(reader, Concat):
            sizes, weights = [len(r) for r in reader.readers], source.weights
        order = self._order(split, sizes, weights)
        position += -position % self.batch_size if self.shapes else 0
        reader = Swapped(reader, self.seed) if self.swapped_captions and split == "train" else reader
        examples = _Examples(self, reader, order, text, split == "train", spec)

        def stream(done: int) -> Iterator[Collated]:
            """The batches after the first `done` of them, each with what was wrong on the way."""
            places = Rows(position + done * self.batch_size, self.batch_size, rows)
            made = grain.MapDataset.source(places).map(examples).batch(len(rows), batch_fn=collate)
            made = made.to_iter_dataset(grain.ReadOptions(self.threads, max(self.prefetch, self.threads)))
            if self.workers:
                _parse_flags()
                made = made.mp_prefetch(grain.MultiprocessingOptions(self.workers, max(1, self.prefetch)))
            return iter(made)

        return self._watched(restarted(stream), self._tally("examples met a broken record", reader, text is not None))

    @property
    def all_shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the images of batches, a shape for each bucket."""
        return self.shapes or ((self.image_size, self.image_size),)

    def with_shapes(self, *shapes: tuple[int, int]) -> Data:
        """The same data with images of these shapes alone; of none, squares."""
        return self if shapes == self.shapes else dataclasses.replace(self, shapes=shapes)

    def buckets(self, split: str = "train") -> np.ndarray:
        """The number of the shape, of `all_shapes`, of each record of a split: int (n,). Errors: `DataError`."""
        source = self.split(split)
        count = len(source.open())
        return buckets_of(_sizes(source, count), self.shapes) if self.shapes else np.zeros(count, int)

    def _order(self, split: str, sizes: Sequence[int], weights: Sequence[float] | None) -> Order | BucketOrder:
        if not self.shapes:
            return Order(sizes, weights, self.seed)
        order = BucketOrder(self.buckets(split), self.batch_size, sizes, weights, self.seed)
        note_small(order, self.shapes)
        return order

    def examples(
        self, split: str = "train", captions: bool = False, text: Tokenizer | None = None, files: bool = False
    ) -> Examples:
        """The records of a split in the order of the source, their images decoded and cropped at the centre, each to
        its own shape.

        captions: records without a caption are broken. text: captions are needed, and tokenised. files: keep the image
        files too.
        """
        reader = self._open(split, captions := captions or text is not None)
        tally = self._tally("records are broken", reader, captions)
        image = "image" in self.fields
        small = self.smallest_side
        buckets = self.buckets(split) if image and self.shapes else np.zeros(len(reader), int)
        shapes = self.all_shapes
        return Examples(reader, shapes, buckets, image, tally, captions, self.empty_captions, text, small, files)

    def describe(self, splits: Sequence[str] = ("train",)) -> dict[str, Facts]:
        """How many `records` each split has, and a digest of the `names` of some; stored with a run to recognise
        its data. Errors: `DataError`."""
        return {split: _description(self.split(split).open()) for split in splits}

    def check_split(self, split: str) -> None:
        """Errors: `DataError` where the source has no such split, or none of its records."""
        self._open(split, captions=False)

    def _open(self, split: str, captions: bool) -> Reader:
        reader = self.split(split).open()
        if not len(reader):
            raise DataError(f"there is no record in the split '{split}' of {self.split(split)}")
        for note in [*reader.notes(False), *(reader.notes(True) if captions else ())]:
            say_once(note)
        return reader

    def _tally(self, what: str, reader: Reader, captions: bool) -> Tally:
        return Tally(what, self.broken_share, self.broken_count, lambda: reader.notes(True) if captions else ())

    def split(self, split: str) -> Source:
        """The source of a split."""
        if split == "train":
            return self.source
        if self.held_out is not None:
            return self.held_out
        return _split(self.source, split)

    def _watched(self, stream: Generator[Collated], tally: Tally) -> Generator[Batch]:
        with closing(stream):
            for batch, faults, small in stream:
                for fault in (fault for several in faults for fault in several):
                    log.warning("broken record, replaced: %s", fault)
                if small and not tally.small:
                    log_small(small[0], self.smallest_side)
                tally.add(faults, len(small))
                yield batch


@lru_cache(maxsize=8)
def _sizes(source: Source, count: int) -> np.ndarray:
    """Rows and columns of the images of a source of `count` records (n, 2), found once in a process."""
    return sizes_of(source.open())


T = TypeVar("T")


def restarted(stream: Callable[[int], Iterator[T]]) -> Generator[T]:
    """The items of `stream(done)`; when a worker process dies, it is called again with the number of items so far.

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
            if "terminated unexpectedly" not in str(error):  # grain's message for a dead worker
                raise
            deaths += 1
            if deaths == DEATHS:
                raise DataError(
                    f"worker processes of the input pipeline died {DEATHS} times at batch {done} of this run, the last "
                    f"one so: {error} Too little memory (see the kernel's log) and a record that crashes a library are "
                    "usual reasons; Data.workers=0 makes batches in this process"
                ) from error
            log.warning("a worker process of the input pipeline died and is restarted: %s", error)
        finally:
            if close := getattr(iterator, "close", None):  # not every iterator of grain has it
                close()


def _description(reader: Reader, some: int = 64) -> Facts:
    places = np.linspace(0, len(reader) - 1, min(some, len(reader))).round().astype(int).tolist()
    names = "\n".join(reader.key(i).rpartition("/")[2] for i in places)
    digest = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
    return {"records": len(reader), "names": digest[:16]}


def _split(source: Source, split: str) -> Source:
    if isinstance(source, Mixture):
        parts: tuple[object, ...] = tuple(_split(s, split) for s in source.sources)
        return dataclasses.replace(source, sources=parts)
    if "split" not in {f.name for f in dataclasses.fields(source)}:
        raise DataError(f"{type(source).__name__} has no splits: name a source for '{split}' in Data.held_out")
    return dataclasses.replace(source, split=split)


def _parse_flags() -> None:
    """grain's worker processes read absl flags, which a program without absl has never parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


class _Made(NamedTuple):
    """An example, and the records that it replaces."""

    arrays: Batch
    faults: list[str]
    """the broken ones"""
    small: list[str]
    """images that are too small"""


Collated = tuple[Batch, list[list[str]], list[str]]
"""a batch, the broken records of each example, and the images that are too small"""


class _Unusable(Exception):
    """The tokenizer fails for every caption; its error is the cause."""


@dataclass
class _Examples:
    """Example g."""

    data: Data
    reader: Reader
    order: Order | BucketOrder
    text: Tokenizer | None
    augment: bool
    spec: BatchSpec | None

    def __call__(self, g: int) -> _Made:
        shape = self.data.all_shapes[self.order.bucket(g)]
        faults, small = [], []
        for i in self.order.candidates(g):
            record: Record = {}
            try:
                record = self.reader[i]
                arrays = self.example(record, np.random.default_rng((self.data.seed, g)), shape)
                if self.spec is not None and "record" in self.spec:
                    arrays["record"] = np.asarray(i if self.augment else -1, np.int32)  # numbers are of one split
                return _Made(arrays, faults, small)
            except _Unusable as stop:
                raise (stop.__cause__ or stop) from None
            except Exception as error:  # any error of a library over a damaged file
                fault = f"{name_of(self.reader, i, record)} ({fault_of(error)})"
                (small if isinstance(error, TooSmall) else faults).append(fault)
            if len(faults) == TRIES or len(small) == TRIES_SMALL:
                break
        about = [f"the first: {(faults or small)[0]}", *(self.reader.notes(True) if self.text is not None else ())]
        why = f"{len(faults)} broken, {len(small)} too small"
        raise DataError(f"none of {len(faults) + len(small)} records can be used ({why}); " + "; ".join(about))

    def example(self, record: Record, rng: np.random.Generator, shape: tuple[int, int]) -> Batch:
        data, random = self.data, rng if self.augment else None
        fields = [name for name in data.fields if self.spec is None or name in self.spec]
        arrays: Batch = {}
        # The order of random draws does not depend on the record.
        x = rng.uniform()
        caption, row, chooser = None, 0, random if data.caption == "random" else None
        if "features" in fields and "features" in record:
            rows, weights = len(record["features"]), record.get(WEIGHTS, ())
            drawn = lambda rng: choose_row(weights, rng) if len(weights) == rows else int(rng.integers(rows))
            row = drawn(chooser) if chooser is not None else 0
        elif self.text is not None:
            caption = choose_caption(record.get("captions"), chooser, data.empty_captions, record.get(WEIGHTS, ()))
        if "image" in fields and "image" in record:
            smallest = data.smallest_crop if random is not None and data.crop == "random" else 1.0
            image = open_image(record["image"], max(shape), smallest, data.smallest_side)
            image, crop = to_shape(image, shape, random if data.crop == "random" else None, data.smallest_crop)
            flip = data.flip and self.augment and x < 0.5 and may_flip(record.get("captions") or (), data.flip_except)
            arrays["image"] = image[:, ::-1] if flip else image
            if self.spec is not None and "crop" in self.spec:
                shown = crop._replace(left=1 - crop.left - crop.width) if flip else crop
                arrays["crop"] = shown.numbers(size_of(record["image"]), shape)
        for name in ARRAYS:
            if name in fields and record.get(name) is not None:
                value = numbers(name, record[name])
                arrays[name] = value[row] if name in PER_CAPTION else value
        if "image" not in arrays and self.spec is not None and "crop" in self.spec and "crop" in record:
            arrays["crop"] = Crop(*record["crop"]).numbers(record["original"], record.get("size", shape))
        if caption is not None:
            arrays["text"], arrays["text_mask"] = self.tokens(caption)
        if self.spec is not None:
            check_example(self.spec, arrays)
        elif not arrays:
            raise DataError(f"the record has none of Data.fields {data.fields}, only {sorted(record)}")
        return arrays

    def tokens(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (s,) and mask bool (s,) of a caption."""
        assert self.text is not None
        try:
            ids, mask = self.text([caption])
        except Exception:
            try:
                self.text(["a"])
            except Exception as error:
                raise _Unusable from error
            raise
        return np.asarray(ids, np.int32)[0], np.asarray(mask, bool)[0]


def numbers(name: str, value: object) -> np.ndarray:
    """A field of a record as an array; whole numbers as int32.

    Errors: `DataError` for what is no array of numbers, and for a label that is no whole number.
    """
    x = np.asarray(value)
    whole = x.dtype.kind in "iu"
    number = whole or x.dtype.kind in "bf" or x.dtype.name == "bfloat16"
    if not (whole if name == "label" else number):
        kind = "a whole number" if name == "label" else "an array of numbers"
        raise DataError(f"'{name}' is {kind}, not {type(value).__name__}: {str(value)[:60]}")
    if whole and x.size and not -(2**31) <= int(x.min()) <= int(x.max()) < 2**31:
        raise DataError(f"'{name}' holds {x.min()} to {x.max()}, which are no 32-bit numbers")
    return x.astype(np.int32) if whole else x


def collate(examples: Sequence[_Made]) -> Collated:
    """Examples to one batch."""
    batch: Batch = {}
    for name in dict.fromkeys(name for example in examples for name in example.arrays):
        shapes = {str(e.arrays[name].shape) if name in e.arrays else "missing" for e in examples}
        if len(shapes) > 1:
            raise DataError(f"records of one batch differ in '{name}': its shapes are {', '.join(sorted(shapes))}")
        batch[name] = np.stack([e.arrays[name] for e in examples])
    return batch, [e.faults for e in examples], [name for e in examples for name in e.small]
