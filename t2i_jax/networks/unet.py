"""The UNet of guided diffusion (Dhariwal & Nichol 2021) and its encoder.

Residual blocks are modulated by the time; low resolutions have attention. Attention may read text as further keys and
values (Nichol et al. 2022, GLIDE), or be replaced by Transformer blocks with cross-attention (Rombach et al. 2022,
Stable Diffusion). Options make it an Efficient UNet (Saharia et al. 2022, Imagen, appendix B): `resample_first`, blocks
and attention level by level, scaled skips.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Float, Num, typed
from t2i_jax.core.conditions import Batch
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import DEEPEST, Checked, Count, Grid, Layers, NotNegative, Positive, Range, Rate, Size, Sizes
from t2i_jax.core.keys import apart
from t2i_jax.core.params import Named
from t2i_jax.core.sharding import shard
from t2i_jax.core.specs import BatchSpec
from t2i_jax.core.types import Compute, Remat
from t2i_jax.networks.condition import (
    ClassEmbedder,
    Conditioning,
    Context,
    check_vectors,
    pooled,
    read_context,
    value,
)
from t2i_jax.networks.neighbours import NeighbourAttention, NeighbourMaps, neighbour_rows
from t2i_jax.nn.attention import attend
from t2i_jax.nn.conv import Upsample
from t2i_jax.nn.layers import Conv, Embedding, GroupNorm, LayerNorm, Linear
from t2i_jax.nn.modulation import SMOOTH, Smooth, TimeEmbedding
from t2i_jax.nn.transformer import REMAT, Transformer, drop, scan_stack, stack

Upscaling = Literal["linear", "cubic", "corners"]
"""linear; cubic: Keys' kernel, a = -0.5; corners: linear, the centres of corner pixels mapped to each other."""


@dataclasses.dataclass(frozen=True)
class UNet(Checked):
    """A UNet that predicts the noise (or another target) of an image, and the variance of the reverse step."""

    size: Grid = (64, 64)
    channels: Size = 3
    width: Size = 128
    """Channels of the first layer, before its multiplier."""
    multipliers: Annotated[tuple[float, ...], Range(above=0)] = (1, 2, 3, 4)
    """Channels of each level relative to `width`; each level has half the side of the one before."""
    blocks: Layers = 2
    """Residual blocks per level."""
    level_blocks: Annotated[tuple[int, ...], Range(0, DEEPEST)] = ()
    """Residual blocks of each level, 0 for none; (): `blocks` in all. The decoder has one more."""
    attention: Sizes = (2, 4, 8)
    """Downsampling factors of the levels that have attention."""
    middle_attention: bool = True
    """Whether there is attention at the lowest resolution, between encoder and decoder."""
    only_context: Sizes = ()
    """Downsampling factors at which positions read the context and not each other; a Transformer block reads it
    twice."""
    heads: Size = 4
    head_dim: Count = 0
    """Width of a head, which determines their number; 0: `heads` heads."""
    up_heads: Count = 0
    """Heads in the decoder, where head_dim is 0; 0: as many as in the encoder."""
    qkv_first: bool = False
    """Column order of the QKV matrix: all queries, all keys, all values; else head by head."""
    transformers: Count = 0
    """Number of Transformer blocks in place of each attention, which read the context by cross-attention; 0: plain
    attention to positions and context together."""
    scale_shift: bool = True
    """The time scales and shifts the output of the second norm; else it is added to the input of that norm."""
    resample: Literal["block", "conv", "mean"] = "block"
    """Resample inside a residual block, by a convolution, or by mean pooling and nearest neighbours."""
    resample_first: bool = False
    """A level of the encoder begins with the change to its size and channels; else that is the end of the level before,
    with its channels. The decoder changes size at the end of a level."""
    activation: Smooth = "silu"
    residual_scale: Positive = 1.0
    """Factor of the sum x + f(x) of a residual block; 1 / sqrt(2) in Saharia et al. (2021, SR3)."""
    middle_scale: NotNegative = 0.0
    """The same of the two blocks between encoder and decoder; 0: as of the others."""
    skip_scale: Positive = 1.0
    """Factor of what the decoder reads of the encoder."""
    time_width: Count = 0
    """Width of the embedding of time and condition; 0: 4 times `width`."""
    activated_twice: bool = False
    """The embedding of time and condition is activated, and again in each block."""
    dropout: Rate = 0.0
    conditioning: Conditioning | None = Conditioning(ClassEmbedder(1000))
    """Its only route is the default: added to the embedding of the time, and read by attention where there is a
    `context`."""
    context: Count = 0
    """Width of the tokens that attention reads and whose `pool` is added to the time; 0: the condition is only
    added."""
    pool: Literal["mean", "last", "summary", "none"] = "mean"
    """What of the condition is added to the embedding of the time: the mean of its tokens, or the last, projected where
    there is a `context`; or its own summary vector, unprojected."""
    context_norm: Literal["none", "group", "layer"] = "none"
    """Normalisation of the context in each attention: over all its tokens, in groups of channels, or each token."""
    extra_inputs: tuple[Literal["inpaint", "low_res"], ...] = ()
    """Images of the batch that the network reads besides the noised one: a masked image with its mask, a low-resolution
    one."""
    low_res_channels: Count = 0
    """Channels of the `low_res` image; 0: those of a sample. Of latents it is an image at their resolution, with 3."""
    upscaling: Upscaling = "linear"
    """How the `low_res` image is upscaled to the size of the noised one."""
    noise_aug_conditioning: bool = False
    """Condition on the noise level of the `low_res` image, `low_res_noise` of the batch."""
    noise_levels: Count = 0
    """Rows of a table that embeds this level, a whole number of thousandths; 0: as the time is embedded."""
    learn_variance: bool = True
    """Also predict the variance of the reverse step, in a second half of the output channels."""
    last_times: Count = 0
    """Number of times, from the least noisy on, that a second UNet denoises (Balaji et al. 2022, eDiff-I: expert
    denoisers); 0: one UNet for all. Times of the network are compared: 1 is the last step of a Discrete process."""
    groups: Size = 32
    eps: Positive = 1e-5
    neighbours: NeighbourMaps | None = None
    """Images with captions near to the prompt, which the decoder attends to; None: it reads none."""

    any_size: ClassVar[bool] = True
    remats: ClassVar[tuple[Remat, ...]] = ("full", "dots")
    chooses_attention: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if self.conditioning is not None:
            condition = self.conditioning.what
            self.conditioning.route("UNet", "default")
            check_vectors(condition)
            if (given := condition.token_width(self.context)) != self.context:
                raise ValueError(f"context {self.context}: the condition's features are read as they are, {given}")
        if self.level_blocks and len(self.level_blocks) != len(self.multipliers):
            raise ValueError(f"level_blocks {self.level_blocks}: one number for each of {len(self.multipliers)} levels")
        if self.resample_first and self.resample != "conv":
            raise ValueError(f"resample_first: by a convolution, resample='conv'; not {self.resample!r}")
        self._check_context()
        if self.transformers and not self.context:
            raise ValueError("transformers: their cross-attention reads tokens of width `context`, which is 0")
        if self.pool == "none" and not self.context:
            raise ValueError("pool 'none' without a context: the condition would be read nowhere")
        if self.pool == "summary":
            self._check_summary()
        if (self.noise_aug_conditioning or self.low_res_channels) and "low_res" not in self.extra_inputs:
            raise ValueError("noise_aug_conditioning=True and low_res_channels require 'low_res' in extra_inputs")
        if self.neighbours is not None and (self.conditioning is None or self.extra_inputs or self.last_times):
            raise ConfigError(
                "neighbours: of one network with a condition, which neighbours have too, and without extra_inputs"
            )
        if self.noise_levels and not self.noise_aug_conditioning:
            raise ValueError(f"noise_levels {self.noise_levels}: rows for the levels of noise_aug_conditioning=True")

    def _check_context(self) -> None:
        normalised = self.context_norm != "none"
        if ((self.only_context or normalised) and not self.context) or (normalised and self.transformers):
            raise ConfigError(
                "only_context, context_norm: of attention that reads tokens of width `context`, not of x alone; "
                "Transformer blocks have no context_norm"
            )
        padded = self.conditioning is not None and self.conditioning.what.spec.has_padding
        if self.context_norm == "group" and padded:
            raise ConfigError("context_norm 'group': of all tokens together, where the condition has padding")

    def _check_summary(self) -> None:
        spec = None if self.conditioning is None else self.conditioning.what.spec
        if spec is None or not spec.gives_summary:
            raise ConfigError("pool 'summary': the condition has no summary vector")
        if spec.summary_width != self.embedding:
            wanted = f"{self.embedding}{'' if self.time_width else ' (4 width)'}"
            given = f"of {spec.summary_width} numbers; the embedding of the time has {wanted}"
            raise ConfigError(f"pool 'summary': the condition has a vector {given}")

    def sized(self, size: tuple[int, int]) -> UNet:
        """The same network for images of other rows and columns. Errors: ValueError where a level cannot halve them."""
        factor = 2 ** (len(self.multipliers) - 1)
        if any(side % factor for side in size):
            raise ValueError(f"size {size[0]}x{size[1]}: sides are multiples of {factor}, as each level halves them")
        return dataclasses.replace(self, size=size)

    def of_grid(self) -> Named:
        """Variables that are computed from the grid: none."""
        return {}

    def neighbour_spec(self) -> BatchSpec:
        """Batch fields of the neighbours, if it reads them: their images, what the condition reads of each, and which
        are there."""
        if self.neighbours is None or self.conditioning is None:
            return {}
        factor = 2 ** (len(self.multipliers) - 1)
        return self.neighbours.batch_spec(self.conditioning.what.batch_spec(), self.channels, factor)

    @property
    def channels_in(self) -> int:
        further = {"inpaint": self.channels + 1, "low_res": self.low_res_channels or self.channels}
        return self.channels + sum(further[n] for n in self.extra_inputs)

    @property
    def embedding(self) -> int:
        """Width of the embedding of time and condition."""
        return self.time_width or 4 * self.width

    def at(self, level: int) -> int:
        """Channels of a level."""
        return int(self.multipliers[level] * self.width)

    def blocks_at(self, level: int) -> int:
        """Residual blocks of a level."""
        return self.level_blocks[level] if self.level_blocks else self.blocks

    @property
    def stages(self) -> int:
        """Stages of the decoder, and of the encoder with its first convolution."""
        return sum(self.blocks_at(level) + 1 for level in range(len(self.multipliers)))

    def heads_of(self, c: int, up: bool = False) -> int:
        """Heads of attention over c channels. Errors: ValueError if c is not divisible."""
        count = c // self.head_dim if self.head_dim else (self.up_heads if up else 0) or self.heads
        if not count or c % count:
            raise ValueError(f"{c} channels cannot be split into {count} heads")
        return count

    def init(self, key: Array, compute: Compute = Compute()) -> UNetNetwork | ExpertUNets:
        return (ExpertUNets if self.last_times else UNetNetwork)(self, key, compute)


@typed
def double(x: Float[Array, "b i j c"]) -> Float[Array, "b 2*i 2*j c"]:
    """Nearest-neighbour upsampling: (b, i, j, c) -> (b, 2i, 2j, c)."""
    return repeat(x, "b i j c -> b (i p) (j q) c", p=2, q=2)


@typed
def halve(x: Float[Array, "b i j c"]) -> Float[Array, "b i//2 j//2 c"]:
    """2x2 mean pooling: (b, 2i, 2j, c) -> (b, i, j, c)."""
    return reduce(x, "b (i p) (j q) c -> b i j c", "mean", p=2, q=2)


class TimedResBlock(nnx.Module):
    """x + conv(act(norm(conv(act(norm(x)))) modulated by e)), scaled: (b, i, j, c), (b, d) -> (b, i', j', f)."""

    def __init__(
        self, config: UNet, c: int, f: int, key: Array, change: Literal["", "up", "down"] = "", scale: float = 0.0
    ):
        keys = jax.random.split(key, 4)
        self.norm1 = GroupNorm(c, config.groups, config.eps)
        self.conv1 = Conv(c, f, keys[0])
        self.time = Linear(config.embedding, (1 + config.scale_shift) * f, keys[1], std=None, axes=("embed", None))
        self.norm2 = GroupNorm(f, config.groups, config.eps)
        self.conv2 = Conv(f, f, keys[2], std=0.0)
        self.shortcut = Conv(c, f, keys[3], kernel=1) if c != f else None
        self.change, self.scale_shift, self.dropout = change, config.scale_shift, config.dropout
        self.activation, self.scale = config.activation, scale or config.residual_scale

    @typed
    def __call__(
        self, x: Float[Array, "b i j c"], e: Float[Array, "b d"], key: Array | None = None
    ) -> Float[Array, "b p q f"]:
        change = {"up": double, "down": halve, "": lambda y: y}[self.change]
        act = SMOOTH[self.activation]
        y = self.conv1(change(act(self.norm1(x))))
        e = self.time(act(e)).astype(y.dtype)[:, None, None]
        if self.scale_shift:
            scale, shift = jnp.split(e, 2, -1)
            y = self.norm2(y) * (1 + scale) + shift
        else:
            y = self.norm2(y + e)
        y = self.conv2(drop(act(y), self.dropout, key))
        x = change(x)
        y = y + (x if self.shortcut is None else self.shortcut(x))
        return y if self.scale == 1 else y * self.scale


class ContextAttention(nnx.Module):
    """x + attention among positions and to the tokens of the context, if any: (b, i, j, c) -> (b, i, j, c).

    alone: the context is read alone, and qkv gives queries only.
    """

    def __init__(self, config: UNet, c: int, key: Array, up: bool = False, alone: bool = False):
        keys = jax.random.split(key, 3)
        self.norm = GroupNorm(c, config.groups, config.eps)
        self.qkv = Linear(c, (1 if alone else 3) * c, keys[0], std=None, axes=(None, "heads"))
        self.context_norm = _context_norm(config)
        self.context = (
            Linear(config.context, 2 * c, keys[1], std=None, axes=(None, "heads")) if config.context else None
        )
        self.out = Linear(c, c, keys[2], std=0.0, axes=("heads", None))
        self.count = config.heads_of(c, up)
        self.qkv_first, self.alone = config.qkv_first, alone

    @typed
    def __call__(self, x: Float[Array, "b i j c"], context: Context | None) -> Float[Array, "b i j c"]:
        heads = lambda y, order, k: rearrange(y, f"b t ({order} h) -> k b t n h", k=k, n=self.count)
        y = self.qkv(rearrange(self.norm(x), "b i j c -> b (i j) c"))
        q, *own = heads(y, "k n" if self.qkv_first else "n k", 1 if self.alone else 3)
        mask, pairs = None, [own] if own else []
        if self.context is not None and context is not None:
            tokens = self._normalised(context.tokens.astype(x.dtype))
            pairs = [heads(self.context(tokens), "n k", 2), *pairs]
            count = sum(k.shape[1] for k, _ in pairs) - tokens.shape[1]
            mask = jnp.pad(context.mask, ((0, 0), (0, count)), constant_values=True)[:, None, None]
        k, v = (jnp.concatenate(several, 1) for several in zip(*pairs, strict=True))
        y = self.out(rearrange(attend(q, k, v, mask), "b t n h -> b t (n h)"))
        return x + y.reshape(x.shape)

    def _normalised(self, tokens: Array) -> Array:
        if isinstance(self.context_norm, GroupNorm):
            return self.context_norm(tokens[:, None])[:, 0]
        return tokens if self.context_norm is None else self.context_norm(tokens)


def _context_norm(config: UNet) -> GroupNorm | LayerNorm | None:
    if not config.context or config.context_norm == "none":
        return None
    if config.context_norm == "group":
        return GroupNorm(config.context, config.groups, config.eps)
    return LayerNorm(config.context, config.eps)


class SpatialTransformer(nnx.Module):
    """x + Transformer blocks over its positions, with cross-attention to the context: (b, i, j, c) -> (b, i, j, c).

    alone: the context is read alone, twice by each block.
    """

    def __init__(self, config: UNet, c: int, key: Array, up: bool = False, alone: bool = False):
        keys = jax.random.split(key, 3)
        shape = Transformer(
            c,
            config.transformers,
            config.heads_of(c, up),
            mlp=4 * c,
            norm="layer",
            activation="geglu_exact",
            bias=True,
            qkv_bias=False,
        )
        self.norm = GroupNorm(c, config.groups, 1e-6)
        self.into = Linear(c, c, keys[0], std=None, axes=(None, "embed"))
        self.blocks = stack(shape, keys[1], context=config.context, alone=alone)
        self.out = Linear(c, c, keys[2], std=0.0, axes=("embed", None))

    @typed
    def __call__(self, x: Float[Array, "b i j c"], context: Context | None) -> Float[Array, "b i j c"]:
        assert context is not None, "cross-attention reads the context"
        y = self.into(rearrange(self.norm(x), "b i j c -> b (i j) c"))
        memory, mask = context.tokens.astype(x.dtype), context.mask[:, None, None]
        y = scan_stack(self.blocks, y, context=memory, context_mask=mask)
        return x + self.out(y).reshape(x.shape)


def attention_of(
    config: UNet, c: int, key: Array, level: int, up: bool = False
) -> ContextAttention | SpatialTransformer:
    """The attention module over the c channels of a level, for the encoder or (`up`) the decoder."""
    kind = SpatialTransformer if config.transformers else ContextAttention
    return kind(config, c, key, up, 2**level in config.only_context)


class Resample(nnx.Module):
    """Halve or double the sides, by a convolution or without parameters."""

    def __init__(self, c: int, f: int, key: Array, up: bool, convolve: bool):
        self.up = up
        self.doubled = Upsample(c, key) if convolve and up else None
        self.halved = Conv(c, f, key, stride=2, padding=((1, 1), (1, 1))) if convolve and not up else None

    def __call__(self, x: Array) -> Array:
        if self.up:
            return double(x) if self.doubled is None else self.doubled(x)
        return halve(x) if self.halved is None else self.halved(x)


def _time_embedding(config: UNet, key: Array) -> TimeEmbedding:
    return TimeEmbedding(config.embedding, key, frequency_dim=config.width, activation=config.activation)


def _noise_embedding(config: UNet, key: Array) -> TimeEmbedding | Embedding:
    if config.noise_levels:
        return Embedding(config.noise_levels, config.embedding, key)
    return _time_embedding(config, key)


class UNetStage(nnx.Module):
    """The layers between two skips: a residual block, attention, resampling, or some of them."""

    def __init__(
        self, config: UNet, c: int, level: int, key: Array, *, attends: bool, change: bool = False, up: bool = False
    ):
        keys = jax.random.split(key, 3)
        alone = change and not up  # in the encoder, resampling is a separate stage
        f = c if alone and not config.resample_first else config.at(level)
        self.block = None if alone else TimedResBlock(config, c, f, keys[0])
        self.attention = attention_of(config, f, keys[1], level, up) if attends else None
        resample = None
        if change and config.resample == "block":
            resample = TimedResBlock(config, f, f, keys[2], "up" if up else "down")
        elif change:
            resample = Resample(c if alone else f, f, keys[2], up, config.resample == "conv")
        self.resample = resample

    def __call__(self, x: Array, e: Array, context: Context | None, key: Array | None = None) -> Array:
        keys = (None, None) if key is None else jax.random.split(key)
        x = x if self.block is None else self.block(x, e, keys[0])
        x = x if self.attention is None else self.attention(x, context)
        if isinstance(self.resample, TimedResBlock):
            x = self.resample(x, e, keys[1])
        elif self.resample is not None:
            x = self.resample(x)
        return shard(x, "batch", None, None, None)


class UNetEncoder(nnx.Module):
    """The encoder and the middle blocks, shared with the classifier of noised images."""

    def __init__(self, config: UNet, key: Array, compute: Compute):
        keys = iter(jax.random.split(key, 6 + config.stages))
        self.config, self.compute = config, compute
        self.time = _time_embedding(config, next(keys))
        c = config.at(0)
        self.stem = Conv(config.channels_in, c, next(keys))
        down, kept = [], [c]
        last = len(config.multipliers) - 1
        for level in range(last + 1):
            attends = 2**level in config.attention
            for _ in range(config.blocks_at(level)):
                down.append(UNetStage(config, c, level, next(keys), attends=attends))
                c = config.at(level)
                kept.append(c)
            if level < last:
                down.append(UNetStage(config, c, level + 1, next(keys), attends=False, change=True))
                c = config.at(level + 1) if config.resample_first else c
                kept.append(c)
        self.down = nnx.List(down)
        self.before = TimedResBlock(config, c, c, next(keys), scale=config.middle_scale)
        middle = next(keys)
        self.attention = attention_of(config, c, middle, last) if config.middle_attention else None
        self.after = TimedResBlock(config, c, c, next(keys), scale=config.middle_scale)
        self.kept = tuple(kept)

    def encode(
        self, x: Array, e: Array, context: Context | None = None, key: Array | None = None
    ) -> tuple[Array, list[Array]]:
        """x (b, i, j, c) and e (b, d) -> the output of the middle blocks, and the skips of all encoder stages."""
        run = lambda stage, *inputs: stage(*inputs)
        if self.compute.remat != "none":
            run = jax.checkpoint(run, policy=REMAT[self.compute.remat])
        keys = [None] * (len(self.down) + 2) if key is None else jax.random.split(key, len(self.down) + 2)
        x = self.stem(x.astype(self.compute.dtype))
        skips = [x]
        for stage, k in zip(self.down, keys, strict=False):
            x = run(stage, x, e, context, k)
            skips.append(x)
        x = self.before(x, e, keys[-2])
        x = x if self.attention is None else self.attention(x, context)
        return shard(self.after(x, e, keys[-1]), "batch", None, None, None), skips


class UNetNetwork(UNetEncoder):
    """The parameters of a `UNet`."""

    def __init__(self, config: UNet, key: Array, compute: Compute):
        keys = iter(jax.random.split(key, 4 + config.stages))
        super().__init__(config, next(keys), compute)
        width = config.context or config.embedding
        self.condition = None if config.conditioning is None else config.conditioning.what.init(next(keys), width)
        pools = config.context and config.pool in ("mean", "last")
        self.pool = Linear(width, config.embedding, next(keys), std=None, axes=(None, "embed")) if pools else None
        self.noise = _noise_embedding(config, apart(key)) if config.noise_aug_conditioning else None
        up, kept, c = [], list(self.kept), self.kept[-1]
        for level in reversed(range(len(config.multipliers))):
            for n in range(config.blocks_at(level) + 1):
                change, attends = level > 0 and n == config.blocks_at(level), 2**level in config.attention
                up.append(UNetStage(config, c + kept.pop(), level, next(keys), attends=attends, change=change, up=True))
                c = config.at(level)
        self.up = nnx.List(up)
        self.norm = GroupNorm(c, config.groups, config.eps)
        self.out = Conv(c, config.channels * (1 + config.learn_variance), next(keys), std=0.0)
        lowest = config.at(len(config.multipliers) - 1)
        heads, own = config.heads_of(lowest, up=True), apart(apart(key))
        reads = config.neighbours is not None
        self.neighbours = NeighbourAttention(lowest, heads, config.groups, config.eps, own) if reads else None

    def read(self, batch: Batch, drop: Array) -> Context:
        """Encode the condition of a batch: `drop` (b,) marks rows that get the unconditional one.

        Neighbours are encoded by the encoder of this network, each with its own caption, as images without noise at
        time 0; those that `neighbour_mask` of the batch does not mark are not read.
        """
        context = self._read(batch, drop)
        if self.neighbours is not None:
            own, there = neighbour_rows(batch)
            context_of_each = self._read(own, jnp.zeros(there.size, bool))
            e = self._modulation(jnp.zeros(there.size), context_of_each)
            maps = self.neighbours.keys_and_values(self.encode(own["image"], e, context_of_each)[0], there.shape[1])
            context = context._replace(maps=maps, maps_mask=jnp.repeat(there, maps.shape[1] // there.shape[1], 1))
        if self.noise is None:
            return context
        time = 1000 * jnp.broadcast_to(value(batch, "low_res_noise"), drop.shape)
        if isinstance(self.noise, Embedding):
            time = jnp.clip(jnp.rint(time).astype(jnp.int32), 0, self.config.noise_levels - 1)
        return context._replace(pooled=context.pooled + self.noise(time))

    def _read(self, batch: Batch, drop: Array) -> Context:
        if self.condition is None:
            nothing = jnp.zeros((len(drop), 1, self.config.embedding))
            return Context(nothing[:, 0], nothing, jnp.zeros((len(drop), 1), bool))
        if self.config.pool == "summary" and self.config.conditioning is not None:
            return read_context(self.config.conditioning.what, self.condition, batch, drop, self.compute.dtype)
        tokens, mask = self.condition(batch, drop, self.compute.dtype)
        if self.config.pool == "none":
            return Context(jnp.zeros((len(drop), self.config.embedding)), tokens, mask)
        whole = tokens[:, -1].astype(jnp.float32) if self.config.pool == "last" else pooled(tokens, mask)
        return Context(whole if self.pool is None else self.pool(whole), tokens, mask)

    @typed
    def __call__(
        self, x: Float[Array, "b i j c"], t: Num[Array, " b"], context: Context, key: Array | None = None
    ) -> Float[Array, "b i j k"]:
        """x (b, i, j, c) at times t (b,) -> (b, i, j, c) fp32; 2c channels where the second half is the variance."""
        keys = (None, None) if key is None else jax.random.split(key)
        act = SMOOTH[self.config.activation]
        e = self._modulation(t, context)
        x, skips = self.encode(x, e, context, keys[0])
        if self.neighbours is not None and context.maps is not None and context.maps_mask is not None:
            x = self.neighbours(x, context.maps, context.maps_mask)
        run = lambda stage, *inputs: stage(*inputs)
        if self.compute.remat != "none":
            run = jax.checkpoint(run, policy=REMAT[self.compute.remat])
        ups = [None] * len(self.up) if keys[1] is None else jax.random.split(keys[1], len(self.up))
        for stage, k in zip(self.up, ups, strict=True):
            skip = skips.pop() if self.config.skip_scale == 1 else skips.pop() * self.config.skip_scale
            x = run(stage, jnp.concatenate([x, skip], -1), e, context, k)
        return self.out(act(self.norm(x))).astype(jnp.float32)

    def _modulation(self, t: Array, context: Context) -> Array:
        """The embedding (b, d) of time and condition."""
        e = (self.time(t) + context.pooled).astype(self.compute.dtype)
        return SMOOTH[self.config.activation](e) if self.config.activated_twice else e


class ExpertUNets(nnx.Module):
    """The parameters of two UNets: `last` denoises the `last_times` least noisy times, `first` all others."""

    def __init__(self, config: UNet, key: Array, compute: Compute):
        keys = jax.random.split(key)
        self.first, self.last = (UNetNetwork(config, k, compute) for k in keys)
        self.last_times = config.last_times

    def read(self, batch: Batch, drop: Array) -> Context:
        """Encode the condition of a batch for both, stacked: `drop` (b,) marks rows that get the unconditional one."""
        return jax.tree.map(lambda *x: jnp.stack(x), self.first.read(batch, drop), self.last.read(batch, drop))

    @typed
    def __call__(
        self,
        x: Float[Array, "b i j c"],
        t: Num[Array, " b"],
        context: Context,
        key: Array | None = None,
    ) -> Float[Array, "b i j k"]:
        """As a `UNetNetwork`; a network that no row of the batch is for is not evaluated."""
        late = t < self.last_times

        def denoised(n: int, network: UNetNetwork, needed: Array) -> Array:
            run = lambda: network(x, t, jax.tree.map(lambda y: y[n], context), key)
            shape = jax.eval_shape(run)
            return jax.lax.cond(needed, run, lambda: jnp.zeros(shape.shape, shape.dtype))

        first, last = denoised(0, self.first, ~late.all()), denoised(1, self.last, late.any())
        return jnp.where(late[:, None, None, None], last, first)
