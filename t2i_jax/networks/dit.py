"""The diffusion Transformer (Peebles & Xie 2023): patches of a noised image through blocks modulated by the time.

A block is x + gate attention(modulate(norm(x))), then x + gate mlp(modulate(norm(x))). Shifts, scales and gates are
computed from c = embedding of the time + condition; the gates start at zero (adaLN-Zero). Text may also be read as
further tokens of the sequence, by cross-attention (Chen et al. 2024, PixArt-alpha), or in a separate stream that shares
attention with the image (Esser et al. 2024, MM-DiT of Stable Diffusion 3).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from t2i_jax.core.conditions import Batch, Condition, SummarizedTokens
from t2i_jax.core.fields import FREE, Checked, Count, Grid, Layers, Positive, Range, Size
from t2i_jax.core.keys import apart
from t2i_jax.core.sharding import shard
from t2i_jax.core.types import Compute
from t2i_jax.networks.condition import ClassEmbedder, check_vectors
from t2i_jax.nn.attention import Padding, attend
from t2i_jax.nn.conv import patchify, unpatchify
from t2i_jax.nn.kernels import Kind
from t2i_jax.nn.layers import LayerNorm, Linear, ModelState, normal, param
from t2i_jax.nn.modulation import TimeEmbedding, modulate
from t2i_jax.nn.transformer import MLP, REMAT, Attention, Layer


@dataclasses.dataclass(frozen=True)
class DiT(Checked):
    """A Transformer that predicts the noise (or another target) of an image, and the variance of the reverse step."""

    size: Grid = (32, 32)
    """Rows and columns of latents or pixels."""
    channels: Size = 4
    patch: Size = 2
    width: Size = 384
    depth: Layers = 12
    heads: Size = 6
    hidden: Count = 0
    """Inner width of the MLP; 0 is 4 times the width."""
    frequency_dim: Annotated[int, Range(low=2)] = 256
    """Number of sines and cosines that embed the time."""
    eps: Positive = 1e-6
    condition: Condition = ClassEmbedder(1000)
    text: Literal["modulate", "context", "cross", "joint"] = "modulate"
    """The pooled condition modulates every block. Its tokens are in addition read as further tokens of the sequence
    ("context"), by cross-attention ("cross"), or in a separate stream ("joint"); "modulate" does not read them."""
    whole: bool = True
    """Modulate by the mean of the condition's tokens (or its summary vector) and the time; else by the time alone."""
    shared: bool = False
    """One matrix computes the shifts, scales and gates of all blocks, and each block adds a learned table (Chen et al.
    2024, adaLN-single); else each block has a matrix."""
    cross_norm: bool = True
    """Normalise the input of the queries of cross-attention."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head, as in later versions of Stable Diffusion 3."""
    stretch: Positive = 1.0
    """Divides row and column positions, for images larger than those of the original training."""
    learn_variance: bool = True
    """Also predict the variance of the reverse step, in a second half of the output channels."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Annotated[Literal["none", "full", "dots", "branches"], FREE] = "none"
    """What each block keeps for its backward pass: a key of `REMAT`."""
    kernel: Kind = "auto"
    """Implementation of attention: "plain" einsums, "cudnn" on GPUs, "splash" on TPUs; "auto" depends on the
    platform."""

    def __post_init__(self):
        super().__post_init__()
        check_vectors(self.condition, self.width)
        if any(side % self.patch for side in self.size):
            raise ValueError(f"size {self.size} cannot be cut into patches of {self.patch}")
        if self.text == "modulate" and not self.whole:
            raise ValueError("text 'modulate' without `whole`: the condition would be read nowhere")

    @property
    def layer(self) -> Layer:
        return Layer(
            self.width,
            self.heads,
            hidden=self.hidden,
            norm="layer",
            activation="gelu_tanh",
            bias=True,
            qk_norm=self.qk_norm,
            eps=self.eps,
            kernel=self.kernel,
        )

    @property
    def extra_inputs(self) -> tuple[str, ...]:
        """Images of the batch that the network reads besides the noised one."""
        return ()

    @property
    def compute(self) -> Compute:
        """Numerics and memory options."""
        return Compute(self.dtype, self.remat, self.kernel)

    def with_compute(self, compute: Compute) -> DiT:
        """The same network with other compute options."""
        return dataclasses.replace(self, **self.compute.changes(compute, "dtype", "remat", attention="kernel"))

    def init(self, key: Array) -> DiTNetwork:
        return DiTNetwork(self, key)


class Context(NamedTuple):
    """The encoded condition, computed once and read at every step."""

    pooled: Array
    """(b, d), added to the embedding of the time"""
    tokens: Array
    """(b, s, d)"""
    mask: Array
    """(b, s): which tokens may be read"""


def pooled(tokens: Array, mask: Array) -> Array:
    """The mean of the unmasked tokens of (b, s, d): (b, d) fp32."""
    seen = mask[..., None].astype(jnp.float32)
    return (tokens * seen).sum(1) / jnp.maximum(seen.sum(1), 1)


def sincos_2d(grid: tuple[int, int], d: int, stretch: float = 1.0) -> np.ndarray:
    """Fixed position embeddings (i * j, d): sines and cosines of the column, then those of the row, as in the first
    release.

    stretch: divides rows and columns. Errors: ValueError if 4 does not divide d.
    """
    if d % 4:
        raise ValueError(f"width {d} cannot hold sine and cosine of row and column: it must be a multiple of 4")
    row, column = np.indices(grid).reshape(2, -1, 1) / stretch
    frequencies = 10000.0 ** -(np.arange(d // 4) / (d // 4))
    waves = [f(place * frequencies) for place in (column, row) for f in (np.sin, np.cos)]
    return np.concatenate(waves, -1).astype(np.float32)


class DiTStream(nnx.Module):
    """Attention and MLP of one kind of tokens, with their modulation by the condition."""

    def __init__(self, config: DiT, key: Array):
        keys = jax.random.split(key, 3)
        self.norm = LayerNorm(config.width, config.eps, affine=False)
        self.attention = Attention(config.layer, keys[0])
        self.mlp = MLP(config.layer, keys[1])
        d = config.width
        self.modulation = None if config.shared else Linear(d, 6 * d, keys[2], std=0.0)
        self.table = param(normal(keys[2], (6, d), d**-0.5), None, "embed") if config.shared else None

    def modulations(self, c: Array) -> list[Array]:
        """Shift, scale and gate of attention, then of the MLP, each (b, d), from c (b, d), or (b, 6 d) where blocks
        share it."""
        if self.table is not None:
            return list(jnp.moveaxis(self.table[...].astype(c.dtype) + rearrange(c, "b (n d) -> b n d", n=6), 1, 0))
        return jnp.split(self.modulation(jax.nn.silu(c)), 6, -1)

    def heads(self, x: Array) -> tuple[Array, ...]:
        """Queries, keys and values (b, t, n, h)."""
        y = rearrange(self.attention.qkv(x), "b t (n three h) -> three b t n h", three=3, h=self.attention.head_dim)
        q, k, v = y
        if self.attention.q_norm is not None and self.attention.k_norm is not None:
            q, k = self.attention.q_norm(q), self.attention.k_norm(k)
        return tuple(shard(a, "batch", None, "heads", None) for a in (q, k, v))

    def mixed(self, q: Array, k: Array, v: Array, mask: Padding | None) -> Array:
        """Attention of queries to keys and values: (b, t, n, h)."""
        return attend(q, k, v, mask, kind=self.attention.kernel)

    def attended(self, x: Array, mixed: Array, gate: Array) -> Array:
        """x plus the gated projection of its attention output `mixed` (b, t, n, h)."""
        return x + _branch(self.attention.out(rearrange(mixed, "b t n h -> b t (n h)")), gate)

    def fed(self, x: Array, shift: Array, scale: Array, gate: Array) -> Array:
        return x + _branch(self.mlp(modulate(self.norm(x), shift, scale)), gate)


def _branch(y: Array, gate: Array) -> Array:
    return checkpoint_name(y * gate[:, None].astype(y.dtype), "branch")


class DiTCrossAttention(nnx.Module):
    """x + attention from x (b, t, d) to tokens y (b, s, d); adds zero before training."""

    def __init__(self, config: Layer, key: Array, norm: bool = True):
        keys = jax.random.split(key, 3)
        d = config.width
        self.norm = LayerNorm(d, config.eps) if norm else None
        self.q = Linear(d, d, keys[0], axes=("embed", "heads"))
        self.kv = Linear(d, 2 * d, keys[1], axes=("embed", "heads"))
        self.out = Linear(d, d, keys[2], std=0.0, axes=("heads", "embed"))
        # Splash attention supports self-attention only.
        self.kernel: Kind = "auto" if config.kernel == "splash" else config.kernel
        self.count = config.heads

    def __call__(self, x: Array, y: Array, mask: Array) -> Array:
        q = rearrange(self.q(x if self.norm is None else self.norm(x)), "b t (n h) -> b t n h", n=self.count)
        k, v = rearrange(self.kv(y), "b s (n two h) -> two b s n h", n=self.count, two=2)
        mixed = attend(q, k, v, Padding(mask), kind=self.kernel)
        return x + self.out(rearrange(mixed, "b t n h -> b t (n h)"))


class DiTBlock(nnx.Module):
    """One block; which of `image`, `text` and `cross` it has depends on how text is read."""

    def __init__(self, config: DiT, key: Array):
        keys = jax.random.split(key, 3)
        self.image = DiTStream(config, keys[0])
        self.text = DiTStream(config, keys[1]) if config.text == "joint" else None
        self.cross = DiTCrossAttention(config.layer, keys[2], config.cross_norm) if config.text == "cross" else None

    def __call__(self, x: Array, y: Array, c: Array, mask: Array, own: Array | None = None) -> tuple[Array, Array]:
        """x (b, t, d) with mask `own` (b, t), tokens y (b, s, d) with mask `mask` (b, s), and c (b, d).

        c is (b, 6 d) where blocks share the matrix of the modulation. Returns the new x and y.
        """
        parts = self.image.modulations(c)
        q, k, v = self.image.heads(modulate(self.image.norm(x), *parts[:2]))
        if self.text is None:
            mixed = self.image.mixed(q, k, v, None if own is None else Padding(own))
            x = self.image.attended(x, mixed, parts[2])
        else:
            text_parts = self.text.modulations(c)
            text = self.text.heads(modulate(self.text.norm(y), *text_parts[:2]))
            q, k, v = (jnp.concatenate(pair, 1) for pair in zip(text, (q, k, v), strict=True))
            mixed = self.image.mixed(q, k, v, Padding(_behind(mask, x)))
            y = self.text.attended(y, mixed[:, : y.shape[1]], text_parts[2])
            y = self.text.fed(y, *text_parts[3:])
            x = self.image.attended(x, mixed[:, y.shape[1] :], parts[2])
        if self.cross is not None:
            x = self.cross(x, y, mask)
        return shard(self.image.fed(x, *parts[3:]), "batch", "length", None), shard(y, "batch", None, None)


def _behind(mask: Array, x: Array) -> Array:
    """mask (b, s) followed by True for each token of x (b, t, d)."""
    return jnp.pad(mask, ((0, 0), (0, x.shape[1])), constant_values=True)


class DiTNetwork(nnx.Module):
    """The parameters of a `DiT`."""

    def __init__(self, config: DiT, key: Array):
        keys = jax.random.split(key, 6)
        d, square = config.width, config.patch**2 * config.channels
        self.config = config
        # Xavier initialisation of a dense layer (Glorot & Bengio 2010), although it is a strided convolution.
        self.embed = Linear(square, d, keys[0], std=math.sqrt(2 / (square + d)), axes=(None, "embed"))
        grid = (config.size[0] // config.patch, config.size[1] // config.patch)
        self.positions = ModelState(jnp.asarray(sincos_2d(grid, d, config.stretch)), axes=(None, "embed"))
        self.time = TimeEmbedding(d, keys[1], waves=config.frequency_dim)
        self.condition = config.condition.init(keys[2], d)
        self.blocks = jax.vmap(lambda k: DiTBlock(config, k))(jax.random.split(keys[3], config.depth))
        self.norm = LayerNorm(d, config.eps, affine=False)
        self.shared = Linear(d, 6 * d, apart(key)) if config.shared else None
        self.modulation = None if config.shared else Linear(d, 2 * d, keys[4], std=0.0)
        self.table = param(normal(keys[4], (2, d), d**-0.5), None, "embed") if config.shared else None
        self.out = Linear(d, square * (1 + config.learn_variance), keys[5], std=0.0, axes=("embed", None))

    def read(self, batch: Batch, drop: Array) -> Context:
        """Encode the condition of a batch: `drop` (b,) marks rows that get the unconditional one."""
        tokens, mask = self.condition(batch, drop, self.config.dtype)
        if not self.config.whole:
            return Context(jnp.zeros((len(drop), self.config.width)), tokens, mask)
        if self.config.condition.spec.gives_summary:
            return Context(cast(SummarizedTokens, self.condition).whole(batch, drop), tokens, mask)
        return Context(pooled(tokens, mask), tokens, mask)

    def tokens(self, x: Array) -> Array:
        """Embedded patches of x (b, i, j, c) with positions: (b, t, d)."""
        patches = rearrange(patchify(x.astype(self.config.dtype), self.config.patch), "b i j d -> b (i j) d")
        return self.embed(patches) + self.positions[...].astype(self.config.dtype)

    def __call__(self, x: Array, t: Array, context: Context, key: Array | None = None) -> Array:
        """x (b, i, j, c) at times t (b,) -> (b, i, j, c) fp32; 2c channels where the second half is the variance."""
        config = self.config
        x = self.tokens(x)
        length, y, mask = x.shape[1], context.tokens.astype(x.dtype), context.mask
        c, own = (self.time(t) + context.pooled).astype(x.dtype), None
        if config.text == "context":
            own, x = _behind(mask, x), jnp.concatenate([y, x], 1)

        modulation = c if self.shared is None else self.shared(jax.nn.silu(c))

        def run(block: DiTBlock, x: Array, y: Array) -> tuple[Array, Array]:
            return block(x, y, modulation, mask, own)

        if config.remat != "none":
            run = jax.checkpoint(run, policy=REMAT[config.remat], prevent_cse=False)
        x, y = shard(x, "batch", "length", None), shard(y, "batch", None, None)
        (x, _), _ = jax.lax.scan(lambda both, block: (run(block, *both), None), (x, y), self.blocks)
        return self.finish(x[:, -length:], c)

    def finish(self, x: Array, c: Array) -> Array:
        """Tokens (b, t, d) to an image (b, i, j, c)."""
        if self.table is None:
            shift, scale = jnp.split(self.modulation(jax.nn.silu(c)), 2, -1)
        else:
            shift, scale = (row.astype(c.dtype) + c for row in self.table[...])
        x = self.out(modulate(self.norm(x), shift, scale)).astype(jnp.float32)
        rows = self.config.size[0] // self.config.patch
        return unpatchify(rearrange(x, "b (i j) d -> b i j d", i=rows), self.config.patch)
