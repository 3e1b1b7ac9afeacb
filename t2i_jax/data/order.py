"""Which record is example g of an endless shuffled stream: arithmetic alone, so any position is reached at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np

from t2i_jax.data.records import DataError

ROUNDS = 6
PERIOD = 10_000
WORD = (1 << 64) - 1


class Parts:
    """Sequences of these sizes, one after the other."""

    def __init__(self, sizes: Iterable[int]):
        self.starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def part(self, i: int) -> tuple[int, int]:
        """The sequence that holds the i-th of all, and its number there."""
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        return part, i - int(self.starts[part])


@lru_cache(maxsize=1024)
def _keys(*seed: int) -> tuple[int, ...]:
    return tuple(int(k) for k in np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64))


def shuffled(i: int, n: int, *seed: int) -> int:
    """The image of i under the permutation of range(n) that `seed` names, in constant time and memory.

    A Feistel network on the next even power of two, walked until it lands below n (Black & Rogaway 2002, "Ciphers
    with arbitrary finite domains"). Written out here so that no library update changes the data order of a run.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for key in _keys(*seed):
            x = (right + key) * 0x9E3779B97F4A7C15 & WORD
            x = (x ^ x >> 29) * 0xBF58476D1CE4E5B9 & WORD
            left, right = right, left ^ (x >> 32 & mask)
        i = left << half | right
        if i < n:
            return i


def rotated(i: int, parts: Parts) -> Iterator[int]:
    """i, and the other numbers of its part that follow it, from the first again after the last."""
    part, _ = parts.part(i)
    start, stop = parts.starts[part : part + 2].tolist()
    return chain(range(i, stop), range(start, i))


class Turns:
    """Which of several parts has turn n of an endless sequence, as evenly as their counts in a period allow."""

    def __init__(self, counts: Sequence[int]):
        self.counts = np.asarray(counts, int)
        # Occurrence r of a part in the period is at time (r + 1/2) / count.
        part = np.repeat(np.arange(len(self.counts)), self.counts)
        rank = np.concatenate([np.arange(n) for n in self.counts])
        pattern = np.lexsort((part, (rank + 0.5) / self.counts[part]))
        self.part, self.rank = part[pattern], rank[pattern]

    def __getitem__(self, n: int) -> tuple[int, int]:
        """The part that has turn n, and how many turns it had before."""
        period, slot = divmod(n, len(self.part))
        part = int(self.part[slot])
        return part, period * int(self.counts[part]) + int(self.rank[slot])


class Order:
    """The record number of example g, for one source or for several in a row.

    Every epoch is a new permutation. With `weights` every source has epochs of its own, and the sources are interleaved
    as evenly as their weights allow, by a pattern of PERIOD examples that repeats.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int | tuple[int, ...]):
        if not all(sizes) and weights is not None:
            raise DataError(f"Mixture.sources: their records are {tuple(sizes)}, and a source has none")
        self.parts = Parts(sizes)
        if weights is None:
            sizes, weights = [sum(sizes)], [1.0]
        self.sizes, self.seed = tuple(sizes), (seed,) if isinstance(seed, int) else seed
        self.starts = np.cumsum([0, *sizes]).tolist()
        shares = np.asarray(weights, float) / sum(weights)
        counts = np.diff(np.round(np.cumsum(shares) * PERIOD).astype(int), prepend=0)
        if not counts.all():
            raise DataError(f"Mixture.weights has a share below 1/{PERIOD}: {tuple(weights)}")
        self.turns = Turns(counts.tolist())

    def __getitem__(self, g: int) -> int:
        s, nth = self.turns[g]
        epoch, i = divmod(nth, self.sizes[s])
        return self.starts[s] + shuffled(i, self.sizes[s], *self.seed, s, epoch)

    def bucket(self, g: int) -> int:
        """0: all examples have the same shape."""
        return 0

    def candidates(self, g: int) -> Iterator[int]:
        """The record of example g, and those that take its place where it is broken: others of its source."""
        return rotated(self[g], self.parts)


@dataclass
class Rows:
    """The examples that hold some rows of each batch: number in their stream -> number g in the global one."""

    position: int
    batch: int
    rows: Sequence[int]
    """of a batch, in the order in which they are made"""

    def __len__(self) -> int:
        return 2**62  # as good as endless; grain computes with it in floats, which would round more up

    def __getitem__(self, index: int) -> int:
        batch, i = divmod(index, len(self.rows))
        return self.position + batch * self.batch + self.rows[i]
