"""Random numbers per position, determined by the image's key and the position alone."""

from __future__ import annotations

import dataclasses

import jax
from jax import Array

from t2i_jax.core.arrays import Float, Int, Key, typed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PositionKeys:
    """Random numbers for m positions of each image; `i` distinguishes several of one position."""

    keys: Key[Array, "b m"]

    @typed
    def normal(self, i: Array | int, k: int) -> Float[Array, "b m {k}"]:
        """Standard normal numbers."""
        one = lambda key: jax.random.normal(jax.random.fold_in(key, i), (k,))
        return jax.vmap(jax.vmap(one))(self.keys)

    @typed
    def uniform(self, i: Array | int) -> Float[Array, "b m"]:
        """Uniform numbers in [0, 1)."""
        return jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, i))))(self.keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageKeys:
    """Random keys, one per image."""

    keys: Key[Array, " b"]

    @typed
    def at(self, step: Array | int, positions: Int[Array, "b m"]) -> PositionKeys:
        """The keys of positions at a step."""
        one = lambda key, position: jax.random.fold_in(jax.random.fold_in(key, step), position)
        return PositionKeys(jax.vmap(lambda key, row: jax.vmap(lambda p: one(key, p))(row))(self.keys, positions))
