"""Transformer block conditioned on a time and a class through its norms, and on a caption through cross-attention."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from t2i_jax.core.arrays import Bool, Float, Int, Num, typed
from t2i_jax.core.sharding import shard
from t2i_jax.core.types import AttentionKind
from t2i_jax.nn.attention import Rotary
from t2i_jax.nn.layers import Conv, Embedding, LayerNorm, Linear
from t2i_jax.nn.modulation import modulate
from t2i_jax.nn.transformer import ACTIVATIONS, MLP, REMAT, Attention, CrossAttention, Transformer, drop


@dataclasses.dataclass(frozen=True)
class AdaLN:
    """Shape, kind and conditioning of a block."""

    transformer: Transformer
    steps: int
    """times 0 .. steps - 1"""
    sinusoidal: bool = False
    """embed times by sinusoids instead of a learned table"""
    context: int = 0
    """width of the vectors that cross-attention reads; 0: no cross-attention"""
    classes: int = 0
    """rows of the class table that modulates the norm before the MLP; 0: no classes"""
    class_norm: Literal["layer", "instance"] = "layer"
    grid: tuple[int, int] | None = None
    """the MLP is two 3x3 convolutions over this grid instead of two matrices"""
    attention: AttentionKind = "auto"
    """implementation of self-attention"""


class AdaNorm(nnx.Module):
    """norm(x) (1 + scale) + shift, with (scale, shift) = W silu(e) + b, e the embedding of a number (Gu et al. 2022).

    Numbers beyond the table get the mean of its rows, which serves as the unconditional class of models without one.
    """

    def __init__(
        self, d: int, count: int, key: Array, *, sinusoidal: bool = False, over: Literal["layer", "instance"] = "layer"
    ):
        keys = jax.random.split(key)
        self.table = None if sinusoidal else Embedding(count, d, keys[0])
        self.out = Linear(d, 2 * d, keys[1], axes=("embed", None))
        self.norm = LayerNorm(d, affine=False)
        self.count, self.width, self.over = count, d, over

    def __call__(self, x: Array, number: Array) -> Array:
        """x (b, t, d), number (b,) -> (b, t, d)."""
        if self.table is None:
            e = sinusoidal_embedding(number / self.count, self.width)
        else:
            rows = self.table.w[...]
            e = jnp.where((number >= self.count)[:, None], rows.mean(0), rows[jnp.minimum(number, self.count - 1)])
        scale, shift = jnp.split(self.out(jax.nn.silu(e)), 2, -1)
        y = self.norm(x) if self.over == "layer" else self.norm(x.swapaxes(1, 2)).swapaxes(1, 2)
        return modulate(y, shift, scale)


@typed
def sinusoidal_embedding(u: Num[Array, " b"], d: int) -> Float[Array, "b {d}"]:
    """sin, then cos of 4000 u / 10000^(j / (d/2 - 1)), j < d/2, for times u (b,) in [0, 1]: (b, d) fp32."""
    half = d // 2
    angles = 4000 * u.astype(jnp.float32)[:, None] * jnp.exp(-math.log(10000) / (half - 1) * jnp.arange(half))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class ConvMLP(nnx.Module):
    """Two 3x3 convolutions over the grid of positions instead of the matrices of an MLP: (b, t, d) -> (b, t, d)."""

    def __init__(self, config: Transformer, grid: tuple[int, int], key: Array):
        keys = jax.random.split(key)
        self.into = Conv(config.width, config.mlp_dim, keys[0], std=0.02)
        self.out = Conv(config.mlp_dim, config.width, keys[1], std=0.02)
        self.grid, self.activation = grid, config.activation

    def __call__(self, x: Array) -> Array:
        y = rearrange(x, "b (i j) d -> b i j d", i=self.grid[0], j=self.grid[1])
        return rearrange(self.out(ACTIVATIONS[self.activation](self.into(y))), "b i j d -> b (i j) d")


class AdaLNBlock(nnx.Module):
    """x + attention(norm(x, t)), x + cross-attention(norm(x, t), context), x + mlp(norm(x), or norm(x, class))."""

    def __init__(self, config: AdaLN, key: Array):
        shape, keys = config.transformer, jax.random.split(key, 6)
        timed = lambda key: AdaNorm(shape.width, config.steps, key, sinusoidal=config.sinusoidal)
        self.attention_norm, self.attention = timed(keys[0]), Attention(shape, keys[1], config.attention)
        self.cross_norm = timed(keys[2]) if config.context else None
        self.cross = CrossAttention(shape, config.context, keys[3]) if config.context else None
        self.mlp_norm = (
            AdaNorm(shape.width, config.classes, keys[4], over=config.class_norm)
            if config.classes
            else shape.normalise()
        )
        self.mlp = ConvMLP(shape, config.grid, keys[5]) if config.grid else MLP(shape, keys[5])
        self.dropout = shape.dropout

    def __call__(
        self,
        x: Array,
        t: Array,
        context: Array | None,
        mask: Array | None,
        label: Array | None,
        key: Array | None,
        rotary: Rotary | None = None,
    ) -> Array:
        """x (b, t, d) at times (b,), context (b, s, k) and its mask, classes (b,), positions -> (b, t, d)."""
        keys = iter((None,) * 3 if key is None else jax.random.split(key, 3))
        branch = lambda y: checkpoint_name(drop(y, self.dropout, next(keys)), "branch")
        x = x + branch(self.attention(self.attention_norm(x, t), rotary)[0])
        if self.cross is not None and self.cross_norm is not None:
            assert context is not None, "a block with cross-attention looks at a context"
            x = x + branch(self.cross(self.cross_norm(x, t), context, mask))
        if isinstance(self.mlp_norm, AdaNorm):
            assert label is not None, "a block conditioned on a class needs `label`"
            y = self.mlp_norm(x, label)
        else:
            y = self.mlp_norm(x)
        return shard(x + branch(self.mlp(y)), "batch", "length", None)


def stack_blocks(config: AdaLN, key: Array) -> AdaLNBlock:
    """The blocks as one whose arrays have a leading layer axis."""
    return jax.vmap(lambda k: AdaLNBlock(config, k))(jax.random.split(key, config.transformer.depth))


@typed
def apply_blocks(
    blocks: AdaLNBlock,
    x: Float[Array, "b t d"],
    t: Num[Array, " b"],
    context: Float[Array, "b s k"] | None = None,
    mask: Bool[Array, "b 1 1 s"] | None = None,
    label: Int[Array, " b"] | None = None,
    key: Array | None = None,
    rotary: Rotary | None = None,
    remat: str = "none",
) -> Float[Array, "b t d"]:
    """Apply a stack (scanned) to x (b, t, d) at the positions of `rotary`; no dropout without a key; `remat` is a key
    of `REMAT`."""
    depth = jax.tree.leaves(blocks)[0].shape[0]
    run = lambda block, x, key: block(x, t, context, mask, label, key, rotary)
    if remat != "none":
        run = jax.checkpoint(run, policy=REMAT[remat], prevent_cse=False)
    keys = None if key is None else jax.random.split(key, depth)
    return jax.lax.scan(lambda x, layer: (run(layer[0], x, layer[1]), None), x, (blocks, keys))[0]
