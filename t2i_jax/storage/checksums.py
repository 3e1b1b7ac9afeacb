"""A number per array that changes when a bit of it does: computed on its devices, and the same on any mesh."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def checksum(x: Array) -> Array:
    """uint32 () of the bytes of an array: sum over its words w at places p of mix(w xor p * golden), modulo 2^32.

    `mix` is the finaliser of MurmurHash3, which gives different words different numbers. So any single word that was
    changed is found, and of all other damage all but one case in 2^32. A sum of integers does not depend on its order:
    each device sums its shards.
    """
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    words = jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, n in enumerate(words.shape):
        place = place * jnp.uint32(n % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    w = words ^ (place * jnp.uint32(0x9E3779B1))
    w = (w ^ (w >> 16)) * jnp.uint32(0x85EBCA6B)
    w = (w ^ (w >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(w ^ (w >> 16), dtype=jnp.uint32)


@jax.jit
def one(x: Array) -> Array:
    """The checksum of one array, on its devices."""
    return checksum(x)


@functools.partial(jax.jit, out_shardings=P())
def combine_checksums(arrays: list[Array]) -> Array:
    """The checksums of several arrays, on every device of the mesh."""
    return jnp.stack(list(map(checksum, arrays)))


def checksums(arrays: Mapping[str, Array | np.ndarray]) -> dict[str, int]:
    """The checksum of each array, by name. A call of all processes; it waits for the arrays, and reads them once."""
    values = list(arrays.values())
    if jax.sharding.get_abstract_mesh().size > 1 and values:
        # One program: several small ones at once could each wait for devices that another occupies.
        numbers = np.asarray(combine_checksums(values))
    else:  # a small program for each shape, which moments and averages share with their parameters
        numbers = jax.device_get([one(x) for x in values])
    return {name: int(n) for name, n in zip(arrays, numbers, strict=True)}
