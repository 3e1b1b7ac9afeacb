"""Discriminators of autoencoders: PatchGAN, with a logit for each of the overlapping patches of an image (Isola et al.
2017, arXiv:1611.07004), and that of StyleGAN 2, with one for the image (Karras et al. 2020, arXiv:1912.04958)."""

import dataclasses
import math
from itertools import pairwise
from typing import Annotated, Literal

import jax
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import DEEPEST, Checked, Range, Size, Sizes
from t2i_jax.nn.batch_norm import BatchNorm
from t2i_jax.nn.conv import blur_halve
from t2i_jax.nn.layers import Conv, GroupNorm, Linear, replace


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig(Checked):
    """Sizes of a PatchGAN; by default a logit has a receptive field of 70 x 70 pixels."""

    width: Size = 64
    """channels after the first convolution; doubled by each further one, up to eightfold"""
    layers: Annotated[int, Range(0, DEEPEST)] = 3
    """convolutions of stride 2; two more have stride 1"""
    norm: Literal["batch", "group", "none"] = "batch"
    """normalisation between them"""

    def init(self, key: Array) -> "Discriminator":
        return Discriminator(self, key)


class Discriminator(nnx.Module):
    """Images (b, i, j, 3) in [-1, 1] -> logits (b, i', j', 1), high for real."""

    def __init__(self, config: DiscriminatorConfig, key: Array):
        widths = [config.width * min(2**n, 8) for n in range(config.layers + 1)]
        keys = jax.random.split(key, 2 * len(widths) + 1)
        # 4x4, padded by one; a bias before a normalisation has no effect.
        conv = lambda c, f, key, stride, bias: Conv(
            c, f, key, kernel=4, stride=stride, padding=((1, 1), (1, 1)), bias=bias, std=0.02
        )
        self.stem = conv(3, widths[0], keys[0], 2, True)
        self.convs = nnx.List(
            [
                conv(c, f, keys[2 * n + 1], 2 if n < config.layers - 1 else 1, config.norm == "none")
                for n, (c, f) in enumerate(pairwise(widths))
            ]
        )
        self.norms = nnx.List([self._norm(config.norm, f, keys[2 * n + 2]) for n, f in enumerate(widths[1:])])
        self.out = conv(widths[-1], 1, keys[-1], 1, True)

    @staticmethod
    def _norm(kind: str, c: int, key: Array) -> nnx.Module | None:
        if kind == "batch":
            return BatchNorm(c, key)
        return GroupNorm(c, min(32, c), 1e-5) if kind == "group" else None

    def __call__(self, images: Array, train: bool = True) -> tuple[Array, "Discriminator"]:
        """Logits, and the discriminator with updated running statistics."""
        x = jax.nn.leaky_relu(self.stem(images), 0.2)
        norms = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(x)
            if isinstance(norm, BatchNorm):
                x, norm = norm(x, train)
            elif norm is not None:
                x = norm(x)
            norms.append(norm)
            x = jax.nn.leaky_relu(x, 0.2)
        return self.out(x), replace(self, norms=nnx.List(norms))


@dataclasses.dataclass(frozen=True)
class StyleDiscriminatorConfig(Checked):
    """Sizes of the discriminator of StyleGAN 2, of images of one size, without statistics of the batch."""

    widths: Sizes = (64, 128, 256, 512, 512, 512, 512)
    """channels at each resolution, from that of the images, each half of the one before, to 4 x 4"""

    def __post_init__(self):
        super().__post_init__()
        if not self.widths:
            raise ConfigError("widths (): one number a resolution, at least that of 4 x 4")

    @property
    def size(self) -> int:
        """Side of the images."""
        return 4 * 2 ** (len(self.widths) - 1)

    def init(self, key: Array) -> "StyleDiscriminator":
        return StyleDiscriminator(self, key)


class StyleDiscriminator(nnx.Module):
    """Images (b, size, size, 3) in [-1, 1] -> logits (b, 1), high for real."""

    def __init__(self, config: StyleDiscriminatorConfig, key: Array):
        last = config.widths[-1]
        keys = jax.random.split(key, len(config.widths) + 3)
        self.size = config.size
        self.stem = Conv(3, config.widths[0], keys[0])
        self.blocks = nnx.List([StyleBlock(c, f, keys[n + 4]) for n, (c, f) in enumerate(pairwise(config.widths))])
        self.conv = Conv(last, last, keys[1])
        self.hidden = Linear(16 * last, last, keys[2], std=None, axes=(None, None))
        self.out = Linear(last, 1, keys[3], std=None, axes=(None, None))

    def __call__(self, images: Array, train: bool = True) -> tuple[Array, "StyleDiscriminator"]:
        """Logits, and the discriminator, which has no statistics. Errors: `ConfigError` for images of another size."""
        if images.shape[1:3] != (self.size, self.size):
            raise ConfigError(
                f"images of {images.shape[1:3]}: this discriminator reads {self.size} x {self.size} pixels"
            )
        x = jax.nn.leaky_relu(self.stem(images), 0.2)
        for block in self.blocks:
            x = block(x)
        x = jax.nn.leaky_relu(self.conv(x), 0.2)
        x = jax.nn.leaky_relu(self.hidden(rearrange(x, "b i j c -> b (i j c)")), 0.2)
        return self.out(x), self


class StyleBlock(nnx.Module):
    """(shortcut(half(x)) + conv(half(conv(x)))) / sqrt(2): (b, i, j, c) -> (b, i/2, j/2, f)."""

    def __init__(self, c: int, f: int, key: Array):
        first, second, third = jax.random.split(key, 3)
        self.conv1 = Conv(c, c, first)
        self.conv2 = Conv(c, f, second)
        self.shortcut = Conv(c, f, third, kernel=1, bias=False)

    def __call__(self, x: Array) -> Array:
        y = blur_halve(jax.nn.leaky_relu(self.conv1(x), 0.2))
        return (self.shortcut(blur_halve(x)) + jax.nn.leaky_relu(self.conv2(y), 0.2)) / math.sqrt(2)
