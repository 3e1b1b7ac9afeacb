"""Random keys."""

from __future__ import annotations

import jax
from jax import Array

APART = 2**32 - 1


def seed_key(seed: int) -> Array:
    """The key of a seed, an integer from 0 to 2^64 - 1; all its bits are used."""
    key = jax.random.key(seed & 0xFFFFFFFF)
    return jax.random.fold_in(key, seed >> 32) if seed >> 32 else key


def apart(key: Array) -> Array:
    """A key different from those of `split(key)` and of `fold_in` with a count.

    `split(key, n)[i]` is `fold_in(key, i)`, so `fold_in(key, 1)` together with a `split` would give the same key twice.
    """
    return jax.random.fold_in(key, APART)
