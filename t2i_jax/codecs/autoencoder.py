"""The convolutional encoder and decoder that VQGAN and KL autoencoders share (Esser et al. 2021, arXiv:2012.09841)."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal, TypedDict

import jax
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Float, typed
from t2i_jax.core.fields import DEEPEST, Checked, Layers, Positive, Range, Size, Sizes
from t2i_jax.nn.conv import (
    Downsample,
    ResBlock,
    Shortcut,
    SpatialAttention,
    Upsample,
    halve,
    patchify,
    unpatchify,
)
from t2i_jax.nn.layers import Conv, GroupNorm


class BlockFields(TypedDict):
    """Keyword arguments of a `ResBlock`."""

    groups: int
    eps: float
    bias: bool
    shortcut_of: Shortcut


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(Checked):
    """Sizes of encoder and decoder. The defaults are the f16 model of VQGAN and LlamaGen (72M parameters)."""

    channels: Size = 128
    """channels at the finest level"""
    multipliers: Sizes = (1, 1, 2, 2, 4)
    """channels of each level over `channels`, finest level first; each level but the last halves the image"""
    blocks: Layers = 2
    """residual blocks per level of the encoder"""
    decoder_blocks: Annotated[int | None, Range(1, DEEPEST)] = None
    """residual blocks per level of the decoder; None: one more than in the encoder"""
    latent: Size = 256
    """channels between encoder and decoder"""
    moments: bool = False
    """the encoder outputs a mean and a log-variance: twice as many channels as the decoder reads"""
    attention: tuple[int, ...] = (-1,)
    """levels with attention after each block, 0 the finest, -1 the coarsest"""
    decoder_attention: tuple[int, ...] | None = None
    """the same for the decoder; None: as in the encoder"""
    middle_attention: bool = True
    """attention between the two middle blocks of encoder and decoder"""
    patch: Size = 1
    """side of the pixel squares folded into channels, so that no convolution runs at full resolution"""
    groups: Size = 32
    """groups of the normalisation"""
    eps: Positive = 1e-6
    """epsilon of the normalisation"""
    middle_blocks: Annotated[int, Range(0, DEEPEST)] = 2
    """residual blocks at the coarsest resolution, of the encoder after its levels, of the decoder before them"""
    down: Literal["convolution", "average"] = "convolution"
    """halve the image by a convolution of stride 2, or by means"""
    bias: bool = True
    """whether the convolutions of residual blocks and the encoder's first one have a bias"""
    shortcut_of: Shortcut = "input"
    """what the shortcut of a residual block reads where the number of channels changes: its input, or the output of its
    convolutions, so that the block has no residual (released MaskGIT)"""
    out_kernel: Literal[1, 3] = 3
    """side of the encoder's last kernel"""
    unit_range: bool = False
    """compute with pixels in [0, 1]; images are in [-1, 1] all the same"""

    @property
    def factor(self) -> int:
        """Pixels per code along a side."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def block(self) -> BlockFields:
        """How residual blocks are made, besides their channels."""
        return {"groups": self.groups, "eps": self.eps, "bias": self.bias, "shortcut_of": self.shortcut_of}

    def widths(self) -> tuple[int, ...]:
        return tuple(self.channels * m for m in self.multipliers)

    def attends(self, levels: tuple[int, ...]) -> tuple[bool, ...]:
        """Which levels have attention. Errors: `ValueError` for a level that does not exist."""
        count = len(self.multipliers)
        if any(not -count <= level < count for level in levels):
            raise ValueError(f"attention levels {levels}: multipliers {self.multipliers} make levels 0 to {count - 1}")
        return tuple(level in levels or level - count in levels for level in range(count))


Resampling = Callable[[int, Array], Callable[[Array], Array]]
"""(channels, key) -> a layer that changes the resolution."""


class AutoencoderLevel(nnx.Module):
    """Blocks at one resolution, each optionally followed by attention, then resampling to the next resolution."""

    def __init__(
        self,
        c: int,
        f: int,
        blocks: int,
        attend: bool,
        resample: Resampling | None,
        config: AutoencoderConfig,
        key: Array,
    ):
        keys = jax.random.split(key, 2 * blocks + 1)
        norm = {"groups": config.groups, "eps": config.eps}
        self.blocks = nnx.List([ResBlock(c if n == 0 else f, f, keys[n], **config.block) for n in range(blocks)])
        self.attention = nnx.List(
            [SpatialAttention(f, keys[blocks + n], **norm) for n in range(blocks if attend else 0)]
        )
        self.resample = resample(f, keys[-1]) if resample else None

    def __call__(self, x: Array) -> Array:
        for n, block in enumerate(self.blocks):
            x = block(x)
            if len(self.attention):
                x = self.attention[n](x)
        return x if self.resample is None else self.resample(x)


class AutoencoderMiddle(nnx.Module):
    """Block, attention, further blocks at the coarsest resolution."""

    def __init__(self, c: int, config: AutoencoderConfig, key: Array):
        first, second, third = jax.random.split(key, 3)
        block = lambda key: ResBlock(c, c, key, **config.block)
        count = config.middle_blocks
        self.block1 = block(first) if count else None
        self.attention = (
            SpatialAttention(c, second, groups=config.groups, eps=config.eps) if config.middle_attention else None
        )
        self.block2 = block(third) if count > 1 else None
        self.more = nnx.List([block(jax.random.fold_in(key, n)) for n in range(2, count)])

    def __call__(self, x: Array) -> Array:
        for layer in (self.block1, self.attention, self.block2, *self.more):
            x = x if layer is None else layer(x)
        return x


class Encoder(nnx.Module):
    """Images to a grid of vectors, (i/factor, j/factor), of `latent` channels; `moments` doubles them."""

    def __init__(self, config: AutoencoderConfig, key: Array):
        keys = jax.random.split(key, 3 + len(config.multipliers))
        widths, last = config.widths(), len(config.multipliers) - 1
        attends = config.attends(config.attention)
        self.patch, self.unit_range = config.patch, config.unit_range
        self.stem = Conv(3 * config.patch**2, config.channels, keys[0], bias=config.bias)
        pool = (lambda c, key: halve) if config.down == "average" else Downsample
        self.levels = nnx.List(
            [
                AutoencoderLevel(c, f, config.blocks, attends[n], pool if n < last else None, config, keys[3 + n])
                for n, (c, f) in enumerate(zip((config.channels, *widths[:-1]), widths, strict=True))
            ]
        )
        self.middle = AutoencoderMiddle(widths[-1], config, keys[1])
        self.norm = GroupNorm(widths[-1], config.groups, config.eps)
        channels = config.latent * (2 if config.moments else 1)
        self.out = Conv(widths[-1], channels, keys[2], kernel=config.out_kernel)

    @typed
    def __call__(self, images: Float[Array, "b i j 3"]) -> Float[Array, "b h w k"]:
        x = self.stem(patchify((images + 1) / 2 if self.unit_range else images, self.patch))
        for level in self.levels:
            x = level(x)
        return self.out(jax.nn.silu(self.norm(self.middle(x))))


class ImageDecoder(nnx.Module):
    """Base of decoders, codes to images (h*factor, w*factor); losses read the last convolution on its own."""

    out: Conv

    @abc.abstractmethod
    def features(self, z: Array) -> Array:
        """Input of the last convolution; the adaptive adversarial weight needs gradients at that layer."""

    @abc.abstractmethod
    def decode_head(self, features: Array) -> Array:
        """The last convolution."""

    @typed
    def __call__(self, z: Float[Array, "b h w k"]) -> Float[Array, "b i j 3"]:
        return self.decode_head(self.features(z))


class Decoder(ImageDecoder):
    """A grid of vectors of `latent` channels to images."""

    def __init__(self, config: AutoencoderConfig, key: Array):
        keys = jax.random.split(key, 3 + len(config.multipliers))
        widths = config.widths()[::-1]  # in the order of execution: coarsest first
        last = len(widths) - 1
        attention = config.attention if config.decoder_attention is None else config.decoder_attention
        attends = config.attends(attention)[::-1]
        blocks = config.blocks + 1 if config.decoder_blocks is None else config.decoder_blocks
        self.patch, self.unit_range = config.patch, config.unit_range
        self.stem = Conv(config.latent, widths[0], keys[0])
        self.middle = AutoencoderMiddle(widths[0], config, keys[1])
        self.levels = nnx.List(
            [
                AutoencoderLevel(c, f, blocks, attends[n], Upsample if n < last else None, config, keys[3 + n])
                for n, (c, f) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True))
            ]
        )
        self.norm = GroupNorm(widths[-1], config.groups, config.eps)
        self.out = Conv(widths[-1], 3 * config.patch**2, keys[2])

    def features(self, z: Array) -> Array:
        x = self.middle(self.stem(z))
        for level in self.levels:
            x = level(x)
        return jax.nn.silu(self.norm(x))

    def decode_head(self, features: Array) -> Array:
        images = unpatchify(self.out(features), self.patch)
        return 2 * images - 1 if self.unit_range else images
