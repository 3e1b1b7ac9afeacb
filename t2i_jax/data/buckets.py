"""Images of several shapes: which shape each record is cut to, and the stream whose batches are of one shape each.

A bucket is the records of one shape. Batch n, counted from the start of training, is of the bucket that the pattern of
turns names; it holds the next `batch` examples of that bucket's own endless shuffled stream. So an example follows from
its number by arithmetic alone, as in `Order`, and a record that does not fill a batch goes into the next epoch's first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from t2i_jax.core.console import bar
from t2i_jax.data.files import say_once
from t2i_jax.data.images import size_of
from t2i_jax.data.order import Order, Turns, rotated
from t2i_jax.data.records import DataError, Reader

SAME_LEVEL = 1.5
"""Shapes whose numbers of pixels differ by less are of one resolution."""
SAME_RATIO = 0.1
"""Difference of the logarithms of two ratios of sides that are taken for one, of several resolutions."""
LONGEST_PERIOD = 1_000_000
Shape = tuple[int, int]


def shapes_around(side: int, multiple: int = 8, longest: float = 2.0) -> tuple[Shape, ...]:
    """Shapes (rows, columns) of at most side x side pixels, from wide to tall, for `Data.shapes`.

    multiple: of which rows and columns are multiples: pixels per code times the side of a token. longest: the largest
    ratio of the long to the short side. Errors: ValueError where side x side itself is none of them.
    """
    if side % multiple or longest < 1:
        raise ValueError(f"side {side}, multiple {multiple}, longest {longest:g}: side is a multiple, and longest >= 1")
    rows = range(multiple, math.ceil(side * math.sqrt(longest)) + 1, multiple)
    shapes = [(r, side**2 // (r * multiple) * multiple) for r in rows]
    return tuple((r, c) for r, c in shapes if c and max(r, c) <= longest * min(r, c))


def levels_of(shapes: Sequence[Shape]) -> list[list[int]]:
    """The numbers of the shapes of each resolution, smallest first."""
    found: list[list[int]] = []
    for k in sorted(range(len(shapes)), key=lambda k: math.prod(shapes[k])):
        if not found or math.prod(shapes[k]) > SAME_LEVEL * math.prod(shapes[found[-1][0]]):
            found.append([])
        found[-1].append(k)
    return found


def buckets_of(sizes: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
    """The number of the shape that each image is cut to: int (n,).

    It is the one with the nearest ratio of sides; of several resolutions with nearly that ratio, the largest at which
    the image is not enlarged, else the smallest. sizes: rows and columns of images (n, 2); 0 where they are unknown,
    taken for a square.
    """
    sizes = np.where(sizes > 0, sizes, 1).astype(float)
    ratios, sides = np.log(sizes[:, :1] / sizes[:, 1:]), np.asarray(shapes, float)
    gaps = np.abs(np.log(sides[:, 0] / sides[:, 1]) - ratios).round(9)  # (n, shapes)
    best = [np.asarray(level)[gaps[:, level].argmin(1)] for level in levels_of(shapes)]
    chosen = np.stack(best, 1)  # (n, levels)
    gap = np.take_along_axis(gaps, chosen, 1)
    whole = (sides[chosen] <= sizes[:, None]).all(2)
    usable = whole | ~whole.any(-1, keepdims=True)
    near = usable & (gap <= np.where(usable, gap, np.inf).min(1, keepdims=True) + SAME_RATIO)
    smallest, largest = near.argmax(1), near.shape[1] - 1 - near[:, ::-1].argmax(1)
    level = np.where(whole.any(-1), largest, smallest)
    return np.take_along_axis(chosen, level[:, None], 1)[:, 0]


def sizes_of(reader: Reader, threads: int = 16) -> np.ndarray:
    """Rows and columns of the images of all records: int (n, 2), 0 where a record has no image that can be read.

    They are those of the shape that the image was cut to, where a record says it ("size"), as `t2i encode` writes it.
    """

    def one(i: int) -> Shape:
        try:
            record = reader[i]
        except Exception:
            return 0, 0
        return tuple(record["size"]) if "size" in record else size_of(record.get("image"))

    found = np.zeros((len(reader), 2), np.int64)
    with ThreadPoolExecutor(threads) as pool, bar() as progress:
        task = progress.add_task("sizes of images", total=len(reader))
        for i, size in enumerate(pool.map(one, range(len(reader)), chunksize=64)):
            found[i] = size
            progress.advance(task)
    return found


class BucketOrder:
    """The record number of example g, where batches of `batch` examples are of one bucket each.

    buckets: the bucket of each record. sizes, weights, seed: as of `Order`, of the sources that the records come from;
    each source has its share within every bucket. Errors: `DataError` as of `Order`.
    """

    def __init__(
        self, buckets: np.ndarray, batch: int, sizes: Sequence[int], weights: Sequence[float] | None, seed: int
    ):
        source = np.repeat(np.arange(len(sizes)), sizes)
        weights = sizes if weights is None else weights
        record_weight = np.asarray(weights, float)[source] / np.asarray(sizes, float)[source]
        self.batch, self.kinds = batch, np.unique(buckets).tolist()
        self.members = [np.flatnonzero(buckets == k) for k in self.kinds]
        self.orders: list[Order] = []
        shares = []
        for k, members in zip(self.kinds, self.members, strict=True):
            there, counts = np.unique(source[members], return_counts=True)
            own = [record_weight[members[source[members] == s]].sum() for s in there]
            shares.append(sum(own))
            self.orders.append(Order(counts.tolist(), own if len(sizes) > 1 else None, (seed, k)))
        # Of up to a million records each bucket has as many turns in a period as it has records.
        period = max(min(len(buckets), LONGEST_PERIOD), len(self.kinds))
        exact = len(buckets) == period and np.allclose(record_weight, record_weight[0])
        ideal = [len(m) for m in self.members] if exact else np.asarray(shares) / sum(shares) * period
        self.turns = Turns([max(1, round(float(n))) for n in ideal])

    def bucket(self, g: int) -> int:
        """The bucket of example g."""
        return self.kinds[self.turns[g // self.batch][0]]

    def __getitem__(self, g: int) -> int:
        return next(self.candidates(g))

    def candidates(self, g: int) -> Iterator[int]:
        """The record of example g, and those that take its place where it is broken, of its bucket and source."""
        n, row = divmod(g, self.batch)
        k, nth = self.turns[n]
        order = self.orders[k]
        return (int(self.members[k][i]) for i in rotated(order[nth * self.batch + row], order.parts))


def check_shapes(shapes: Sequence[Shape]) -> None:
    """Errors: `DataError` for a shape that is none, or is given twice."""
    if odd := [shape for shape in shapes if min(shape) < 1]:
        raise DataError(f"Data.shapes: {odd[0]}, rows and columns are 1 or more")
    if len(set(shapes)) < len(shapes):
        raise DataError(f"Data.shapes: {shapes} has one twice")


def note_small(order: BucketOrder, shapes: Sequence[Shape]) -> None:
    """Log, once, which buckets have fewer records than a batch."""
    few = {k: len(m) for k, m in zip(order.kinds, order.members, strict=True) if len(m) < order.batch}
    if few:
        named = ", ".join(f"{shapes[k][0]}x{shapes[k][1]} ({count})" for k, count in few.items())
        say_once(f"shapes with fewer images than a batch of {order.batch}, which repeat within it: {named}")
