"""The condition of Imagen (Saharia et al. 2022) and DeepFloyd IF: tokens of a frozen text encoder, and a vector pooled
from them by attention."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from t2i_jax.core.arrays import Bool, Float, typed
from t2i_jax.core.conditions import Batch, ConditionSpec
from t2i_jax.core.fields import Size
from t2i_jax.core.specs import BatchSpec
from t2i_jax.networks.condition import BaseCondition, CrossAttnFeatures
from t2i_jax.nn.attention import attend
from t2i_jax.nn.layers import LayerNorm, Linear, normal, param


@dataclasses.dataclass(frozen=True)
class AttentionPooledFeatures(BaseCondition):
    """Features of a frozen text encoder, all of them visible, projected to tokens; and pooled by attention to a vector
    that is added to the embedding of the time."""

    encoded: CrossAttnFeatures = CrossAttnFeatures(4096, 77)
    heads: Size = 64
    """heads of the pooling attention"""
    summary: Size = 768
    """width of the pooled vector: that of the embedding of the time"""
    projected: bool = True
    """whether tokens are projected to the width that the network reads; else they are read as they are"""

    def __post_init__(self):
        super().__post_init__()
        if self.encoded.dim % self.heads:
            raise ValueError(f"heads {self.heads}: features of {self.encoded.dim} numbers cannot be split into as many")

    @property
    def spec(self) -> ConditionSpec:
        has_null = self.encoded.spec.has_null
        return ConditionSpec(has_null=has_null, gives_summary=True, summary_width=self.summary)

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch."""
        return self.encoded.batch_spec()

    @property
    def length(self) -> int:
        return self.encoded.length

    def token_width(self, width: int) -> int:
        return width if self.projected else self.encoded.dim

    def init(self, key: Array, width: int) -> AttentionPooledTokens:
        return AttentionPooledTokens(self, key, width)


class AttentionPooledTokens(nnx.Module):
    """`features` float (b, s, k) -> tokens (b, s, d); `whole` gives (b, e).

    The query of the pooling attention is the mean of the normalised features plus a learned position; its keys and
    values are of that vector and of all features.
    """

    def __init__(self, config: AttentionPooledFeatures, key: Array, width: int):
        keys = jax.random.split(key, 7)
        k, e = config.encoded.dim, config.summary
        self.encoded = config.encoded.init(keys[0], width)
        self.tokens = Linear(k, width, keys[1], std=None, axes=(None, "embed")) if config.projected else None
        self.norm = LayerNorm(k)
        self.position = param(normal(keys[2], (1, k), k**-0.5), None, None)
        self.q, self.k, self.v = (Linear(k, k, n, std=None, axes=(None, "heads")) for n in keys[3:6])
        self.out = Linear(k, e, keys[6], std=None, axes=("heads", "embed"))
        self.out_norm = LayerNorm(e)
        self.count = config.heads

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        x, mask = self.encoded(batch, drop, dtype)
        return x if self.tokens is None else self.tokens(x), mask

    @typed
    def whole(self, batch: Batch, drop: Bool[Array, " b"]) -> Float[Array, "b e"]:
        x = self.norm(self.encoded(batch, drop)[0])
        mean = x.mean(1, keepdims=True) + self.position[...]
        split = lambda y: rearrange(y, "b s (n h) -> b s n h", n=self.count)
        x = jnp.concatenate([mean, x], 1)
        pooled = attend(split(self.q(mean)), split(self.k(x)), split(self.v(x)))
        return self.out_norm(self.out(rearrange(pooled, "b 1 n h -> b (n h)")))
