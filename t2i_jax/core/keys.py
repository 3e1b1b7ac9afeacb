"""Random keys."""

from __future__ import annotations

import jax
from jax import Array

APART = 2**32 - 1


def seed_key(seed: int) -> Array:
    """The key of a seed, a whole number from 0 to 2^64 - 1; all its bits count."""
    key = jax.random.key(seed & 0xFFFFFFFF)
    return jax.random.fold_in(key, seed >> 32) if seed >> 32 else key


def apart(key: Array) -> Array:
    """A key that is none of those that `split` makes of `key`, nor of `fold_in` with a count.

    `split(key, n)[i]` is `fold_in(key, i)`, so that `fold_in(key, 1)` beside a `split` draws the same numbers twice.
    """
    return jax.random.fold_in(key, APART)
