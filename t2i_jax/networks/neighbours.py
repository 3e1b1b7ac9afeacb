"""Neighbours of a prompt as feature maps that a UNet attends to (Chen et al. 2022, Re-Imagen).

A neighbour is an image with its caption. The encoder of the UNet itself turns it into a feature map, as an image
without noise at time 0, and the decoder attends to the maps of all neighbours of a prompt.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Bool, Float, typed
from t2i_jax.core.conditions import Batch
from t2i_jax.core.fields import Checked, Share, Size
from t2i_jax.core.specs import BatchSpec, FieldSpec
from t2i_jax.networks.condition import value
from t2i_jax.nn.attention import attend
from t2i_jax.nn.layers import GroupNorm, Linear

PREFIX = "neighbour_"
"""Before the names of fields of the condition that are of neighbours."""


@dataclasses.dataclass(frozen=True)
class NeighbourMaps(Checked):
    """How many neighbours a UNet reads, and how often training drops them."""

    count: Size = 2
    """neighbours of a prompt"""
    dropout: Share = 0.1
    """share of training examples without neighbours, drawn independently of those without a caption; where either
    is 0 there is no guidance, which takes turns between captions and neighbours"""

    def batch_spec(self, condition: BatchSpec, channels: int, factor: int) -> BatchSpec:
        """Fields of the neighbours of a batch: images whose sides are multiples of `factor`, what the condition reads
        of each, by names that begin with `neighbour_`, and which of them are there, all unless given."""
        each = {
            f"{PREFIX}{name}": dataclasses.replace(field, shape=(self.count, *field.shape))
            for name, field in condition.items()
            if not name.startswith("null_")
        }
        image = FieldSpec((self.count, None, None, channels), "float32", multiple=factor)
        return {f"{PREFIX}image": image, **each, f"{PREFIX}mask": FieldSpec((self.count,), "bool", optional=True)}

    def kept(self, batch: Batch, drop: Array) -> dict[str, Array]:
        """`neighbour_mask` of a batch without the neighbours of rows `drop` (b,)."""
        return {f"{PREFIX}mask": neighbours_there(batch) & ~drop[:, None]}


@typed
def neighbours_there(batch: Batch) -> Bool[Array, "b k"]:
    """Which neighbours of a batch may be read."""
    there = jnp.ones(value(batch, f"{PREFIX}image").shape[:2], bool)
    return jnp.asarray(batch.get(f"{PREFIX}mask", there))


def neighbour_rows(batch: Batch) -> tuple[dict[str, Array], Bool[Array, "b k"]]:
    """The neighbours of a batch as rows of one, `image` (b k, i, j, c) and the fields of the condition; and which (b,
    k) may be read."""
    there = neighbours_there(batch)
    own = {name.removeprefix(PREFIX): x for name, x in batch.items() if name.startswith(PREFIX)}
    return {name: rearrange(x, "b k ... -> (b k) ...") for name, x in own.items()}, there


class NeighbourAttention(nnx.Module):
    """x + attention of its positions to those of the feature maps of neighbours: (b, i, j, c) -> (b, i, j, c).

    A row without neighbours stays as it is. Maps have no order, so neither have neighbours.
    """

    def __init__(self, c: int, heads: int, groups: int, eps: float, key: Array):
        keys = jax.random.split(key, 3)
        self.norm, self.maps_norm = GroupNorm(c, groups, eps), GroupNorm(c, groups, eps)
        self.query = Linear(c, c, keys[0], std=None, axes=(None, "heads"))
        self.pairs = Linear(c, 2 * c, keys[1], std=None, axes=(None, "heads"))
        self.out = Linear(c, c, keys[2], std=0.0, axes=("heads", None))
        self.heads = heads

    @typed
    def keys_and_values(self, maps: Float[Array, "m i j c"], k: int) -> Float[Array, "b n d"]:
        """Of the maps of k neighbours of each row, (b k, i, j, c): those of each position, (b, k i j, 2 c)."""
        return rearrange(self.pairs(self.maps_norm(maps)), "(b k) i j c -> b (k i j) c", k=k)

    @typed
    def __call__(
        self, x: Float[Array, "b i j c"], maps: Float[Array, "b n d"], mask: Bool[Array, "b n"]
    ) -> Float[Array, "b i j c"]:
        """maps: as of `keys_and_values`. mask: which positions may be read."""
        some = mask.any(1)
        q = self.query(rearrange(self.norm(x), "b i j c -> b (i j) c"))
        q = rearrange(q, "b t (n h) -> b t n h", n=self.heads)
        k, v = rearrange(maps, "b t (n k h) -> k b t n h", k=2, n=self.heads)
        y = attend(q, k, v, (mask | ~some[:, None])[:, None, None])
        y = self.out(rearrange(y, "b t n h -> b t (n h)")).reshape(x.shape)
        return x + jnp.where(some[:, None, None, None], y, 0)
