"""Captions as in GLIDE: padding has learned vectors and is read like text (Nichol et al. 2022)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from t2i_jax.core.arrays import Bool, Float, typed
from t2i_jax.core.conditions import Batch
from t2i_jax.core.fields import Layers, Size
from t2i_jax.core.specs import BatchSpec
from t2i_jax.networks.condition import BaseCondition, caption, text_spec
from t2i_jax.nn.layers import Embedding, LayerNorm, normal, position_table
from t2i_jax.nn.transformer import Transformer, scan_stack, stack


@dataclasses.dataclass(frozen=True)
class GlideCaptions(BaseCondition):
    """Token ids read by a bidirectional Transformer that sees padding too and is trained with the model."""

    vocabulary: Size = 50257
    length: Size = 128
    width: Size = 512
    depth: Layers = 16
    heads: Size = 8
    padding: bool = True
    """Padding positions get learned vectors; else the embeddings of their ids."""
    final_norm: bool = True

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch."""
        return text_spec(self.vocabulary, self.length)

    def init(self, key: Array, width: int) -> GlideCaptionTokens:
        if width != self.width:
            raise ValueError(f"captions of width {self.width} where the network reads {width}")
        return GlideCaptionTokens(self, key)


class GlideCaptionTokens(nnx.Module):
    """`text` int (b, s) and `text_mask` bool (b, s) -> tokens (b, s, d), all visible; a dropped caption is empty."""

    def __init__(self, config: GlideCaptions, key: Array):
        keys = jax.random.split(key, 4)
        self.config = config
        self.table = Embedding(config.vocabulary, config.width, keys[0])
        self.position = position_table(normal(keys[1], (config.length, config.width), 0.01))
        shape = Transformer(config.width, config.depth, config.heads, norm="layer", activation="gelu", bias=True)
        self.blocks = stack(shape, keys[2])
        self.norm = LayerNorm(config.width) if config.final_norm else None
        self.padding = position_table(normal(keys[3], (config.length, config.width))) if config.padding else None

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        text, mask = caption(batch, drop, self.config.vocabulary, self.config.length)
        if self.padding is None:  # then padding is the end token, the last of the vocabulary
            x = self.table(jnp.where(drop[:, None], self.config.vocabulary - 1, text)) + self.position[...]
        else:
            x = jnp.where(mask[..., None], self.table(text) + self.position[...], self.padding[...])
        x = scan_stack(self.blocks, x.astype(dtype))
        return x if self.norm is None else self.norm(x), jnp.ones_like(mask)
