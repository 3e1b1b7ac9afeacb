"""Random numbers of single positions: each follows from its image's key and its place in it, from nothing else."""

from __future__ import annotations

import dataclasses

import jax
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PositionKeys:
    """Numbers for m positions of each image; `i` tells the draws of one position apart."""

    keys: Array
    """(b, m)"""

    def normal(self, i: Array | int, k: int) -> Array:
        """Standard normal numbers (b, m, k)."""
        one = lambda key: jax.random.normal(jax.random.fold_in(key, i), (k,))
        return jax.vmap(jax.vmap(one))(self.keys)

    def uniform(self, i: Array | int) -> Array:
        """Uniform numbers in [0, 1): (b, m)."""
        return jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, i))))(self.keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageKeys:
    """Where draws come from: one key per image."""

    keys: Array
    """(b,)"""

    def at(self, step: Array | int, positions: Array) -> PositionKeys:
        """The draws of positions int (b, m) at a step."""
        one = lambda key, position: jax.random.fold_in(jax.random.fold_in(key, step), position)
        return PositionKeys(jax.vmap(lambda key, row: jax.vmap(lambda p: one(key, p))(row))(self.keys, positions))
