"""The diffusion Transformer (Peebles & Xie 2023): patches of a noised image through blocks modulated by the time.

A block is x + gate attention(modulate(norm(x))), then x + gate mlp(modulate(norm(x))). Shifts, scales and gates are
computed from c = embedding of the time + condition; the gates start at zero (adaLN-Zero). Text may also be read as
further tokens of the sequence, by cross-attention (Chen et al. 2024, PixArt-alpha), or in a separate stream that shares
attention with the image (Esser et al. 2024, MM-DiT of Stable Diffusion 3).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from t2i_jax.core.arrays import Float, Num, typed
from t2i_jax.core.conditions import Batch
from t2i_jax.core.fields import Checked, Grid, Range, Size
from t2i_jax.core.keys import apart
from t2i_jax.core.params import Named
from t2i_jax.core.sharding import shard
from t2i_jax.core.types import AttentionKind, Compute, Remat
from t2i_jax.networks.condition import ClassEmbedder, Conditioning, Context, check_vectors, read_context
from t2i_jax.nn.attention import MaskSpec, Padding, Rotary, attend, rotate
from t2i_jax.nn.conv import patchify, unpatchify
from t2i_jax.nn.layers import Linear, ModelState, normal, param
from t2i_jax.nn.modulation import TimeEmbedding, modulate
from t2i_jax.nn.positions import RotaryPositions, SinCosPositions
from t2i_jax.nn.transformer import MLP, REMAT, REMATS, Attention, Cache, Transformer, drop


@dataclasses.dataclass(frozen=True)
class DiT(Checked):
    """A Transformer that predicts the noise (or another target) of an image, and the variance of the reverse step."""

    size: Grid = (32, 32)
    """Rows and columns of latents or pixels."""
    channels: Size = 4
    patch: Size = 2
    transformer: Transformer = Transformer(384, 12, 6, norm="layer", eps=1e-6, activation="gelu_tanh", bias=True)
    frequency_dim: Annotated[int, Range(low=2)] = 256
    """Number of sines and cosines that embed the time."""
    conditioning: Conditioning = Conditioning(ClassEmbedder(1000))
    """The pooled condition modulates every block. Its tokens are in addition read as further tokens of the sequence
    (via "context"), by "cross_attention", or in a separate stream ("joint"); "modulation", the default, does not read
    them."""
    whole: bool = True
    """Modulate by the mean of the condition's tokens (or its summary vector) and the time; else by the time alone."""
    shared: bool = False
    """One matrix computes the shifts, scales and gates of all blocks, and each block adds a learned table (Chen et al.
    2024, adaLN-single); else each block has a matrix."""
    cross_norm: bool = True
    """Normalise the input of the queries of cross-attention."""
    positions: SinCosPositions | RotaryPositions = SinCosPositions()
    learn_variance: bool = True
    """Also predict the variance of the reverse step, in a second half of the output channels."""

    upscaling: ClassVar[Literal["linear", "cubic"]] = "linear"
    low_res_channels: ClassVar[int] = 0
    noise_levels: ClassVar[int] = 0
    neighbours: ClassVar[None] = None
    remats: ClassVar[tuple[Remat, ...]] = REMATS
    chooses_attention: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        self.transformer.check_plain("DiT", "post_norm", "rope_values", "sandwich_norm", "layer_scale", "pb_relax")
        check_vectors(self.conditioning.what, self.transformer.width)
        if any(side % self.patch for side in self.size):
            raise ValueError(f"size {self.size} cannot be cut into patches of {self.patch}")
        if self.via == "modulation" and not self.whole:
            raise ValueError("conditioning.via 'modulation' without `whole`: the condition would be read nowhere")

    @property
    def via(self) -> str:
        """How the tokens of the condition are read."""
        return self.conditioning.route("DiT", "modulation", "context", "cross_attention", "joint")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.size[0] // self.patch, self.size[1] // self.patch

    @property
    def extra_inputs(self) -> tuple[str, ...]:
        """Images of the batch that the network reads besides the noised one."""
        return ()

    @property
    def any_size(self) -> bool:
        """Whether it has positions for every grid; released models of a joint stream keep a part of a larger table."""
        return self.via != "joint"

    def sized(self, size: tuple[int, int]) -> DiT:
        """The same network for images of other rows and columns, with positions in the range of its own."""
        positions = self.positions
        if isinstance(positions, SinCosPositions):
            base = positions.base or self.grid
            same = base == (size[0] // self.patch, size[1] // self.patch)
            positions = dataclasses.replace(positions, base=None if same else base)
        return dataclasses.replace(self, size=size, positions=positions)

    def of_grid(self) -> Named:
        """Variables that are computed from the grid: `positions`, if they are added."""
        if not isinstance(self.positions, SinCosPositions):
            return {}
        table = jnp.asarray(self.positions.table(self.grid, self.transformer.width))
        return {"positions": ModelState(table, axes=(None, "embed"))}

    def init(self, key: Array, compute: Compute = Compute()) -> DiTNetwork:
        return DiTNetwork(self, key, compute)


@dataclasses.dataclass(frozen=True)
class ModulatedBlock:
    """Shape and kind of a block whose norms are modulated by a condition."""

    transformer: Transformer
    via: str = "modulation"
    """how the tokens of the condition are read: "joint" and "cross_attention" are parts of the block"""
    shared: bool = False
    """blocks share the matrix of the modulation"""
    cross_norm: bool = True
    """normalise the input of the queries of cross-attention"""
    attention: AttentionKind = "auto"
    """implementation of attention"""

    def stack(self, key: Array) -> DiTBlock:
        """The blocks as one whose arrays have a leading layer axis."""
        return jax.vmap(lambda k: DiTBlock(self, k))(jax.random.split(key, self.transformer.depth))


class DiTStream(nnx.Module):
    """Attention and MLP of one kind of tokens, with their modulation by the condition."""

    def __init__(self, config: ModulatedBlock, key: Array):
        keys = jax.random.split(key, 3)
        d, transformer = config.transformer.width, config.transformer
        self.norm = transformer.normalise(affine=False)
        self.attention = Attention(transformer, keys[0], config.attention)
        self.mlp, self.dropout = MLP(transformer, keys[1]), transformer.dropout
        self.modulation = None if config.shared else Linear(d, 6 * d, keys[2], std=0.0)
        self.table = param(normal(keys[2], (6, d), d**-0.5), None, "embed") if config.shared else None

    def modulations(self, c: Array) -> list[Array]:
        """Shift, scale and gate of attention, then of the MLP, each (b, d), from c (b, d), or (b, 6 d) where blocks
        share it."""
        if self.table is not None:
            return list(jnp.moveaxis(self.table[...].astype(c.dtype) + rearrange(c, "b (n d) -> b n d", n=6), 1, 0))
        return jnp.split(self.modulation(jax.nn.silu(c)), 6, -1)

    def heads(self, x: Array, rotary: Rotary | None = None) -> tuple[Array, ...]:
        """Queries (b, t, n, h), keys and values (b, t, m, h), at the positions of `rotary`."""
        q, k, v = self.attention.read(x)
        q, k = self.attention.normalised(q, k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return tuple(shard(a, "batch", None, "heads", None) for a in (q, k, v))

    def mixed(self, q: Array, k: Array, v: Array, mask: MaskSpec | Array | None) -> Array:
        """Attention of queries to keys and values: (b, t, n, h)."""
        return attend(q, k, v, mask, self.attention.scale, kind=self.attention.kernel)

    def attended(self, x: Array, mixed: Array, gate: Array, key: Array | None, skip: Array | None = None) -> Array:
        """x plus the gated projection of its attention output `mixed` (b, t, n, h)."""
        return x + self._branch(self.attention.out(rearrange(mixed, "b t n h -> b t (n h)")), gate, key, skip)

    def fed(
        self, x: Array, shift: Array, scale: Array, gate: Array, *, key: Array | None, skip: Array | None = None
    ) -> Array:
        """x plus the gated MLP of it."""
        return x + self._branch(self.mlp(modulate(self.norm(x), shift, scale)), gate, key, skip)

    def _branch(self, y: Array, gate: Array, key: Array | None, skip: Array | None) -> Array:
        y = drop(y, self.dropout, key) * gate[:, None].astype(y.dtype)
        if key is not None and skip is not None:
            kept = jax.random.bernoulli(apart(key), 1 - skip, (len(y), 1, 1))
            y = jnp.where(kept, y / (1 - skip), 0).astype(y.dtype)
        return checkpoint_name(y, "branch")


class DiTCrossAttention(nnx.Module):
    """x + attention from x (b, t, d) to tokens y (b, s, d); adds zero before training."""

    def __init__(self, config: ModulatedBlock, key: Array):
        keys, kind = jax.random.split(key, 3), config.attention
        d = config.transformer.width
        self.norm = config.transformer.normalise() if config.cross_norm else None
        self.q = Linear(d, d, keys[0], axes=("embed", "heads"))
        self.kv = Linear(d, 2 * d, keys[1], axes=("embed", "heads"))
        self.out = Linear(d, d, keys[2], std=0.0, axes=("heads", "embed"))
        # Splash attention supports self-attention only.
        self.kernel: AttentionKind = "auto" if kind == "splash" else kind
        self.count = config.transformer.heads

    def __call__(self, x: Array, y: Array, mask: Array) -> Array:
        q = rearrange(self.q(x if self.norm is None else self.norm(x)), "b t (n h) -> b t n h", n=self.count)
        k, v = rearrange(self.kv(y), "b s (n two h) -> two b s n h", n=self.count, two=2)
        mixed = attend(q, k, v, Padding(mask), kind=self.kernel)
        return x + self.out(rearrange(mixed, "b t n h -> b t (n h)"))


class DiTBlock(nnx.Module):
    """One block; which of `image`, `text` and `cross` it has depends on how text is read."""

    def __init__(self, config: ModulatedBlock, key: Array):
        keys = jax.random.split(key, 3)
        self.image = DiTStream(config, keys[0])
        self.text = DiTStream(config, keys[1]) if config.via == "joint" else None
        self.cross = DiTCrossAttention(config, keys[2]) if config.via == "cross_attention" else None

    def __call__(
        self,
        x: Array,
        y: Array,
        c: Array,
        mask: Array,
        own: MaskSpec | Array | None = None,
        rotary: Rotary | None = None,
        key: Array | None = None,
        cache: Cache | None = None,
        skip: Array | None = None,
    ) -> tuple[Array, Array, Cache | None]:
        """x (b, t, d) with mask `own` at the positions of `rotary`, tokens y (b, s, d) with mask `mask` (b, s), and c
        (b, d).

        c is (b, 6 d) where blocks share the matrix of the modulation. No dropout without a key. With a cache, keys and
        values of x are written at `cache.at`, as in `nn.transformer.Block`, but for "joint". skip: probability with
        which a row goes on without a branch (Huang et al. 2016, stochastic depth). Returns the new x and y, and the
        cache.
        """
        keys = (None,) * 4 if key is None else jax.random.split(key, 4)
        parts = self.image.modulations(c)
        q, k, v = self.image.heads(modulate(self.image.norm(x), *parts[:2]), rotary)
        if self.text is None:
            if cache is not None:
                cache, k, v = cache.extend(k, v)
            mixed = self.image.mixed(q, k.astype(q.dtype), v.astype(q.dtype), own)
            x = self.image.attended(x, mixed, parts[2], keys[0], skip)
        else:
            text_parts = self.text.modulations(c)
            text = self.text.heads(modulate(self.text.norm(y), *text_parts[:2]))
            q, k, v = (jnp.concatenate(pair, 1) for pair in zip(text, (q, k, v), strict=True))
            mixed = self.image.mixed(q, k, v, Padding(_behind(mask, x)))
            y = self.text.attended(y, mixed[:, : y.shape[1]], text_parts[2], keys[2])
            y = self.text.fed(y, *text_parts[3:], key=keys[3])
            x = self.image.attended(x, mixed[:, y.shape[1] :], parts[2], keys[0])
        if self.cross is not None:
            x = self.cross(x, y, mask)
        x = shard(self.image.fed(x, *parts[3:], key=keys[1], skip=skip), "batch", "length", None)
        return x, shard(y, "batch", None, None), cache


def _behind(mask: Array, x: Array) -> Array:
    """mask (b, s) followed by True for each token of x (b, t, d)."""
    return jnp.pad(mask, ((0, 0), (0, x.shape[1])), constant_values=True)


class DiTNetwork(nnx.Module):
    """The parameters of a `DiT`."""

    def __init__(self, config: DiT, key: Array, compute: Compute):
        keys = jax.random.split(key, 6)
        d, square = config.transformer.width, config.patch**2 * config.channels
        self.config, self.compute = config, compute
        # Xavier initialisation of a dense layer (Glorot & Bengio 2010), although it is a strided convolution.
        self.embed = Linear(square, d, keys[0], std=math.sqrt(2 / (square + d)), axes=(None, "embed"))
        self.positions = config.of_grid().get("positions")
        self.time = TimeEmbedding(d, keys[1], frequency_dim=config.frequency_dim)
        self.condition = config.conditioning.what.init(keys[2], d)
        kind = ModulatedBlock(config.transformer, config.via, config.shared, config.cross_norm, compute.attention)
        self.blocks = kind.stack(keys[3])
        self.norm = config.transformer.normalise(affine=False)
        self.shared = Linear(d, 6 * d, apart(key)) if config.shared else None
        self.modulation = None if config.shared else Linear(d, 2 * d, keys[4], std=0.0)
        self.table = param(normal(keys[4], (2, d), d**-0.5), None, "embed") if config.shared else None
        self.out = Linear(d, square * (1 + config.learn_variance), keys[5], std=0.0, axes=("embed", None))

    def read(self, batch: Batch, drop: Array) -> Context:
        """Encode the condition of a batch: `drop` (b,) marks rows that get the unconditional one."""
        found = read_context(self.config.conditioning.what, self.condition, batch, drop, self.compute.dtype)
        return found if self.config.whole else found._replace(pooled=jnp.zeros_like(found.pooled))

    @typed
    def tokens(self, x: Float[Array, "b i j c"]) -> Float[Array, "b t d"]:
        """Embedded patches of x (b, i, j, c) with positions: (b, t, d)."""
        dtype = self.compute.dtype
        y = self.embed(rearrange(patchify(x.astype(dtype), self.config.patch), "b i j d -> b (i j) d"))
        return y if self.positions is None else y + self.positions[...].astype(dtype)

    @typed
    def __call__(
        self, x: Float[Array, "b i j c"], t: Num[Array, " b"], context: Context, key: Array | None = None
    ) -> Float[Array, "b i j k"]:
        """x (b, i, j, c) at times t (b,) -> (b, i, j, c) fp32; 2c channels where the second half is the variance.

        key: for dropout.
        """
        config = self.config
        x = self.tokens(x)
        length, y, mask = x.shape[1], context.tokens.astype(x.dtype), context.mask
        c, own = (self.time(t) + context.pooled).astype(x.dtype), None
        if config.via == "context":
            own, x = Padding(_behind(mask, x)), jnp.concatenate([y, x], 1)
        rotary = None
        if isinstance(config.positions, RotaryPositions):
            rotary = config.positions.table(config.grid, config.transformer.head_size, x.shape[1] - length)

        modulation = c if self.shared is None else self.shared(jax.nn.silu(c))

        def run(block: DiTBlock, x: Array, y: Array, key: Array | None) -> tuple[Array, Array]:
            return block(x, y, modulation, mask, own, rotary, key)[:2]

        if self.compute.remat != "none":
            run = jax.checkpoint(run, policy=REMAT[self.compute.remat], prevent_cse=False)
        x, y = shard(x, "batch", "length", None), shard(y, "batch", None, None)
        keys = None if key is None else jax.random.split(key, config.transformer.depth)
        step = lambda both, layer: (run(layer[0], both[0], both[1], layer[1]), None)
        (x, _), _ = jax.lax.scan(step, (x, y), (self.blocks, keys))
        return self.finish(x[:, -length:], c)

    @typed
    def finish(self, x: Float[Array, "b t d"], c: Float[Array, "b d"]) -> Float[Array, "b i j k"]:
        """Tokens (b, t, d) to an image (b, i, j, c)."""
        if self.table is None:
            shift, scale = jnp.split(self.modulation(jax.nn.silu(c)), 2, -1)
        else:
            shift, scale = (row.astype(c.dtype) + c for row in self.table[...])
        x = self.out(modulate(self.norm(x), shift, scale)).astype(jnp.float32)
        return unpatchify(rearrange(x, "b (i j) d -> b i j d", i=self.config.grid[0]), self.config.patch)
