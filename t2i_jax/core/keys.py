"""Random keys."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from t2i_jax.core.errors import ConfigError

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


SEEDS = 2**64
"""Seeds are integers from 0 to one less."""


def image_keys(seeds: Sequence[int]) -> Array:
    """One key per image, from its seed alone: the same seed gives the same image in any batch.

    Errors: `ConfigError` for a seed that is negative or has more than 64 bits.
    """
    for seed in seeds:
        if not 0 <= seed < SEEDS:
            raise ConfigError(f"seed {seed}: seeds are whole numbers from 0 to {SEEDS - 1}")
    # Seeds of more than 32 bits are two numbers; the second is 0 for all others.
    low, high = (np.asarray([seed >> shift & 0xFFFFFFFF for seed in seeds], np.uint32) for shift in (0, 32))
    return _keys(low, high)


@jax.jit
def _keys(low: Array, high: Array) -> Array:
    keys = jax.vmap(jax.random.key)(low)
    return jax.vmap(lambda k, n: jnp.where(n > 0, jax.random.fold_in(k, n), k))(keys, high)
