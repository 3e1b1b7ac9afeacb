"""Generators of one stage: blocks whose affine transforms carry the text, from a small grid to the image.

DF-GAN fuses noise and sentence into the features by affine transforms alone (Tao et al. 2022, arXiv:2008.05865, 3.3).
SSA-GAN normalises over the batch, and predicts in every block where in the image the next one's text applies (Liao et
al. 2022, arXiv:2104.00567, 3.2).
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Float, typed
from t2i_jax.core.conditions import Batch, Condition
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import Checked, Grid, Layers, Size
from t2i_jax.core.sharding import shard
from t2i_jax.core.types import Compute
from t2i_jax.networks.condition import Context, read_context
from t2i_jax.nn.batch_norm import BatchNorm
from t2i_jax.nn.conv import Upsample, nearest
from t2i_jax.nn.layers import Conv, Linear, param, replace
from t2i_jax.nn.resize import aligned_bilinear

SMALLEST = 4
"""Least side of the grid at which a generator begins, and a discriminator ends."""


def halvings(size: tuple[int, int]) -> int:
    """How often an image of this size is halved until its smaller side is below 8.

    Errors: `ConfigError` for sides that cannot be halved so often, or are below 8.
    """
    count = (min(size) // SMALLEST).bit_length() - 1
    if count < 1 or size[0] % 2**count or size[1] % 2**count:
        least = 2 * SMALLEST if count < 1 else 2**count
        raise ConfigError(f"size {size}: multiples of {least}")
    return count


def widths(width: int, largest: int, count: int) -> list[int]:
    """Channels at an image of full size and after each of `count` halvings: doubled up to `largest` times `width`."""
    return [width * min(2**n, largest) for n in range(count + 1)]


@dataclasses.dataclass(frozen=True)
class DeepFusion(Checked):
    """Blocks of DF-GAN: affine transforms by noise and sentence, each with a LeakyReLU, before every convolution."""

    layers: Layers = 2
    """affine transforms before a convolution"""

    normalises: ClassVar[bool] = False
    at_start: ClassVar[bool] = False
    """whether a block comes before the first enlargement"""

    def init(self, c: int, f: int, noise: int, sentence: int, last: bool, key: Array) -> FusionBlock:
        return FusionBlock(self, c, f, noise + sentence, key)


@dataclasses.dataclass(frozen=True)
class SemanticSpatial(Checked):
    """Blocks of SSA-GAN: BatchNorm, then an affine transform by the sentence, as far as a predicted mask lets it."""

    mask_width: Size = 100
    """channels of the layers that predict a mask"""

    normalises: ClassVar[bool] = True
    at_start: ClassVar[bool] = True

    def init(self, c: int, f: int, noise: int, sentence: int, last: bool, key: Array) -> SemanticSpatialBlock:
        return SemanticSpatialBlock(self, c, f, sentence, last, key)


@dataclasses.dataclass(frozen=True)
class OneStage(Checked):
    """A generator that makes an image of full size in one pass."""

    size: Grid = (256, 256)
    """rows and columns of pixels: at least 8, and halved until the smaller is below 8"""
    width: Size = 32
    """channels at full size; twice as many at half of it, and so on"""
    largest: Size = 8
    """the most channels, in multiples of `width`"""
    noise: Size = 100
    """size of the noise vector"""
    block: DeepFusion | SemanticSpatial = DeepFusion()

    def __post_init__(self):
        super().__post_init__()
        halvings(self.size)

    @property
    def start(self) -> tuple[int, int]:
        """Rows and columns of the grid at which it begins."""
        count = halvings(self.size)
        return self.size[0] >> count, self.size[1] >> count

    def init(self, condition: Condition, sentence: int, key: Array, compute: Compute) -> OneStageGenerator:
        """sentence: width of a condition that is projected."""
        return OneStageGenerator(self, condition, sentence, key, compute)


class OneStageOutput(NamedTuple):
    """What a generator makes."""

    images: Array
    """(b, i, j, 3) in [-1, 1], fp32"""
    masks: tuple[Array, ...] = ()
    """of each block that has one, in [0, 1], fp32 (b, i', j', 1)"""


class OneStageGenerator(nnx.Module):
    """The parameters of an `OneStage`, and of the condition that it reads."""

    def __init__(self, config: OneStage, condition: Condition, sentence: int, key: Array, compute: Compute):
        keys, sizes = jax.random.split(key, 5), widths(config.width, config.largest, halvings(config.size))[::-1]
        self.config, self.what, self.compute, block = config, condition, compute, config.block
        k, (rows, columns) = condition.token_width(sentence), config.start
        self.condition = condition.init(keys[0], sentence)
        self.into = linear(config.noise, rows * columns * sizes[0], keys[1], (None, "mlp"))
        pairs = [*([(sizes[0], sizes[0])] if block.at_start else []), *pairwise(sizes)]
        each = enumerate(zip(pairs, jax.random.split(keys[2], len(pairs)), strict=True))
        last = len(pairs) - 1
        self.blocks = nnx.List([block.init(c, f, config.noise, k, n == last, key) for n, ((c, f), key) in each])
        self.mask = MaskHead(sizes[0], block.mask_width, keys[3]) if isinstance(block, SemanticSpatial) else None
        self.norm = BatchNorm(sizes[-1], keys[3]) if block.normalises else None
        self.out = conv(sizes[-1], 3, keys[4])

    def read(self, batch: Batch, count: int) -> Context:
        """Encode the condition of a batch of `count` rows."""
        return read_context(self.what, self.condition, batch, jnp.zeros(count, bool), self.compute.dtype)

    def __call__(self, z: Array, sentence: Array, train: bool) -> tuple[OneStageOutput, OneStageGenerator]:
        """Noise (b, k) and sentences (b, k') -> images; and the generator with new running statistics."""
        config, dtype, masks, blocks = self.config, self.compute.dtype, [], []
        z, sentence, (rows, columns) = z.astype(dtype), sentence.astype(dtype), config.start
        x = rearrange(self.into(z), "b (i j c) -> b i j c", i=rows, j=columns)
        logits, predictor = (None, None) if self.mask is None else self.mask(x, train)
        for n, block in enumerate(self.blocks):
            x = shard(x, "batch", None, None, None)
            if isinstance(block, FusionBlock):
                x = block(x, jnp.concatenate([z, sentence], -1))
            else:
                x = nearest(x) if n else x
                masks.append(jax.nn.sigmoid(aligned_bilinear(logits.astype(jnp.float32), (x.shape[1], x.shape[2]))))
                x, logits, block = block(x, masks[-1].astype(dtype), sentence, train)
            blocks.append(block)
        x, norm = (x, None) if self.norm is None else self.norm(x, train)
        images = jnp.tanh(self.out(leaky(x)).astype(jnp.float32))
        return OneStageOutput(images, tuple(masks)), replace(self, blocks=nnx.List(blocks), mask=predictor, norm=norm)


class Affine(nnx.Module):
    """Scale and shift (b, c), each by an MLP of a condition (b, k) whose last layer begins at zero."""

    def __init__(self, k: int, hidden: int, c: int, key: Array, scale: float):
        keys = jax.random.split(key, 4)
        wide, narrow = (None, "mlp"), ("mlp", None)
        self.scale_in, self.shift_in = (linear(k, hidden, key, wide) for key in keys[:2])
        self.scale_out, self.shift_out = (Linear(hidden, c, key, std=0.0, axes=narrow) for key in keys[2:])
        self.scale_out = replace(self.scale_out, b=jnp.full(c, scale))

    @typed
    def __call__(self, y: Float[Array, "b k"]) -> tuple[Float[Array, "b 1 1 c"], Float[Array, "b 1 1 c"]]:
        """-> scale and shift, (b, 1, 1, c)."""
        both = self.scale_out(jax.nn.relu(self.scale_in(y))), self.shift_out(jax.nn.relu(self.shift_in(y)))
        return both[0][:, None, None], both[1][:, None, None]


class FusionBlock(nnx.Module):
    """x (b, i, j, c), condition (b, k) -> (b, 2i, 2j, f): enlarged by nearest neighbours, a shortcut, and two
    convolutions of fused features.

    What enlarges comes as late as it can: transforms of single positions give the same before it.
    """

    def __init__(self, config: DeepFusion, c: int, f: int, k: int, key: Array):
        keys = iter(jax.random.split(key, 2 * config.layers + 3))
        fuse = lambda c: nnx.List([Affine(k, c, c, next(keys), 1.0) for _ in range(config.layers)])
        self.fuse1, self.fuse2 = fuse(c), fuse(f)
        self.conv1 = replace(Upsample(c, key, f), conv=conv(c, f, next(keys)))
        self.conv2 = conv(f, f, next(keys))
        self.shortcut = conv(c, f, next(keys), kernel=1) if c != f else None

    @typed
    def __call__(self, x: Float[Array, "b i j c"], y: Float[Array, "b k"]) -> Float[Array, "b 2*i 2*j f"]:
        h = self.conv1(self._fused(self.fuse1, x, y))
        h = self.conv2(self._fused(self.fuse2, h, y))
        return nearest(x if self.shortcut is None else self.shortcut(x)) + h

    @staticmethod
    def _fused(affines: nnx.List[Affine], x: Array, y: Array) -> Array:
        for affine in affines:
            scale, shift = affine(y)
            x = leaky(scale * x + shift)
        return x


class SemanticSpatialNorm(nnx.Module):
    """(scale(s) m + 1) BatchNorm(x) + shift(s) m, of features x (b, i, j, c), a mask m (b, i, j, 1) and a sentence s
    (b, k) (Liao et al. 2022, eq. 5)."""

    def __init__(self, c: int, k: int, key: Array):
        self.norm, self.affine = BatchNorm(c, key, affine=False), Affine(k, k, c, key, 0.0)

    def __call__(self, x: Array, mask: Array, sentence: Array, train: bool) -> tuple[Array, SemanticSpatialNorm]:
        x, norm = self.norm(x, train)
        scale, shift = self.affine(sentence)
        return (scale * mask + 1) * x + shift * mask, replace(self, norm=norm)


class MaskHead(nnx.Module):
    """Features (b, i, j, c) -> logits (b, i, j, 1) of the mask of the next block, and the layers renewed."""

    def __init__(self, c: int, width: int, key: Array):
        keys = jax.random.split(key)
        self.conv, self.norm = conv(c, width, keys[0]), BatchNorm(width, key)
        self.out = conv(width, 1, keys[1], kernel=1)

    def __call__(self, x: Array, train: bool) -> tuple[Array, MaskHead]:
        x, norm = self.norm(self.conv(x), train)
        return self.out(jax.nn.relu(x)), replace(self, norm=norm)


class SemanticSpatialBlock(nnx.Module):
    """x (b, i, j, c), mask (b, i, j, 1) and sentence (b, k) -> (b, i, j, f), logits (b, i, j, 1) of the next mask but
    in the last block, and the block renewed. The share of the residual begins at 0."""

    def __init__(self, config: SemanticSpatial, c: int, f: int, k: int, last: bool, key: Array):
        keys = jax.random.split(key, 6)
        self.norm1, self.norm2 = SemanticSpatialNorm(c, k, keys[0]), SemanticSpatialNorm(f, k, keys[1])
        self.conv1, self.conv2 = conv(c, f, keys[2]), conv(f, f, keys[3])
        self.shortcut = conv(c, f, keys[4], kernel=1) if c != f else None
        self.mask = None if last else MaskHead(f, config.mask_width, keys[5])
        self.share = param(jnp.zeros(1), None)

    def __call__(
        self, x: Array, mask: Array, sentence: Array, train: bool
    ) -> tuple[Array, Array | None, SemanticSpatialBlock]:
        h, norm1 = self.norm1(x, mask, sentence, train)
        h, norm2 = self.norm2(self.conv1(jax.nn.relu(h)), mask, sentence, train)
        h = self.share[...].astype(x.dtype) * self.conv2(jax.nn.relu(h))
        x = h + (x if self.shortcut is None else self.shortcut(x))
        logits, predictor = (None, None) if self.mask is None else self.mask(x, train)
        return x, logits, replace(self, norm1=norm1, norm2=norm2, mask=predictor)


def leaky(x: Array) -> Array:
    """max(x, 0.2 x)."""
    return jax.nn.leaky_relu(x, 0.2)


def conv(c: int, f: int, key: Array, *, kernel: int = 3, stride: int = 1, bias: bool = True) -> Conv:
    """A convolution padded so that its stride divides the sides, with the initial variance of PyTorch's, from which the
    published programs train: a third of one over the inputs of a sum."""
    margin = (kernel - 1) // 2
    std = (3 * kernel**2 * c) ** -0.5
    return Conv(
        c, f, key, kernel=kernel, stride=stride, padding=((margin, margin), (margin, margin)), bias=bias, std=std
    )


def linear(d: int, f: int, key: Array, axes: tuple[str | None, str | None]) -> Linear:
    """A linear layer of that initial variance."""
    return Linear(d, f, key, std=float((3 * d) ** -0.5), axes=axes)
