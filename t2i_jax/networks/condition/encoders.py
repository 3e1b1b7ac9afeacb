"""Conditions read by a Transformer that is trained with the model: captions, and codes of a small image."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from t2i_jax.core.arrays import Bool, Float, Int, typed
from t2i_jax.core.conditions import Batch
from t2i_jax.core.fields import Grid, Layers, Size
from t2i_jax.core.specs import BatchSpec, FieldSpec
from t2i_jax.networks.condition.base import BaseCondition, caption, ids, same_length, text_spec
from t2i_jax.nn.layers import Embedding, Linear, RMSNorm, normal, position_table
from t2i_jax.nn.transformer import Transformer, scan_stack, stack


class EncodedIds(nnx.Module):
    """A bidirectional Transformer over embedded ids, projected to the width of the network."""

    def __init__(self, config: CaptionEncoder | LowCodes, keys: Array, width: int, *maps: tuple[int, int]):
        self.table = Embedding(config.vocabulary, config.width, keys[0])
        self.position = position_table(normal(keys[1], (config.length, config.width)), *maps)
        self.blocks = stack(Transformer(config.width, config.depth, config.heads), keys[2])
        self.norm = RMSNorm(config.width)
        self.out = Linear(config.width, width, keys[3], bias=False, axes=("embed", None))

    @typed
    def encoded(
        self, ids: Int[Array, "b s"], dtype: DTypeLike, mask: Bool[Array, "b s"] | None = None
    ) -> Float[Array, "b s d"]:
        """A vector for each id; mask: those that are read."""
        x = (self.table(ids) + self.position[...]).astype(dtype)
        return self.out(self.norm(scan_stack(self.blocks, x, mask=None if mask is None else mask[:, None, None])))


@dataclasses.dataclass(frozen=True)
class CaptionEncoder(BaseCondition):
    """Token ids read by a bidirectional Transformer that is trained with the model."""

    vocabulary: Size = 2000
    length: Size = 32
    """tokens per caption, padding included"""
    width: Size = 256
    depth: Layers = 4
    heads: Size = 4

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch."""
        return text_spec(self.vocabulary, self.length)

    def init(self, key: Array, width: int) -> CaptionTokens:
        return CaptionTokens(self, key, width)


class CaptionTokens(EncodedIds):
    """`text` int (b, s) and `text_mask` bool (b, s) -> tokens (b, s, d), all visible.

    Padding positions get learned vectors (Nichol et al. 2022, GLIDE). A dropped or empty caption is all padding.
    """

    def __init__(self, config: CaptionEncoder, key: Array, width: int):
        keys = jax.random.split(key, 5)
        super().__init__(config, keys, width)
        self.config = config
        self.padding = position_table(normal(keys[4], (config.length, width)))

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        text, mask = caption(batch, drop, self.config.vocabulary, self.config.length)
        tokens = self.encoded(text, dtype, mask)
        tokens = jnp.where(mask[..., None], tokens, self.padding[...].astype(dtype))
        return tokens, jnp.ones_like(mask)


@dataclasses.dataclass(frozen=True)
class LowCodes(BaseCondition):
    """Codes of a small image, a token each, read by a bidirectional Transformer: the condition of the second stage of
    Muse (Chang et al. 2023, 2.4).

    They are codes by the codec of the image itself. The unconditional branch has them, too.
    """

    vocabulary: Size = 8192
    """number of codes of the codec"""
    grid: Grid = (16, 16)
    """rows and columns of codes"""
    width: Size = 1024
    depth: Layers = 16
    heads: Size = 16

    @property
    def length(self) -> int:
        return math.prod(self.grid)

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch."""
        return {"low_codes": FieldSpec(self.grid, "int32", 0, self.vocabulary - 1)}

    def init(self, key: Array, width: int) -> LowCodeTokens:
        return LowCodeTokens(self, key, width)


class LowCodeTokens(EncodedIds):
    """`low_codes` int (b, h, w) -> tokens (b, h w, d), all visible; `drop` has no effect."""

    def __init__(self, config: LowCodes, key: Array, width: int):
        super().__init__(config, jax.random.split(key, 4), width, config.grid)
        self.config = config

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        codes = ids(batch, "low_codes", self.config.vocabulary).reshape(len(drop), -1)
        same_length("low_codes", codes.shape[1], self.config.length)
        return self.encoded(codes, dtype), jnp.ones(codes.shape, bool)
