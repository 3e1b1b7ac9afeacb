"""The discriminator of one scale: is an image real, and does it match its caption (Zhang et al. 2018, StackGAN++; Xu et
al. 2018, AttnGAN; Zhu et al. 2019, DM-GAN)."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
from flax import nnx
from jax import Array

from t2i_jax.core.fields import Checked, Size
from t2i_jax.nn.batch_norm import BatchNorm
from t2i_jax.nn.conv_block import ConvBlock, in_turn, with_vector
from t2i_jax.nn.layers import Conv, at_least_fp32, replace
from t2i_jax.nn.spectral import SpectralConv


@dataclasses.dataclass(frozen=True)
class ScaleDiscriminator(Checked):
    """Sizes and parts of the discriminators of all scales."""

    width: Size = 64
    """channels of the first convolution; doubled at each halving of the image down to 4 x 4, then brought back to
    eightfold"""
    norm: Literal["batch", "spectral"] = "batch"
    """BatchNorm after each convolution but the first, or spectral normalisation of all but the last"""
    alone: Literal["all", "last", "none"] = "all"
    """scales whose discriminators also judge images without their condition; unconditional ones do only that"""
    condition_first: bool = False
    """order of the channels that it joins: condition and features, or features and condition"""

    def judges_alone(self, last: bool) -> bool:
        """Whether a conditional discriminator has a head for images alone; last: that of the largest scale."""
        return self.alone == "all" or (self.alone == "last" and last)

    def init(self, size: int, c: int, last: bool, key: Array) -> ScaleDiscriminatorNetwork:
        """size: rows and columns of the image; c: size of the condition, 0 for none; last: the largest scale."""
        return ScaleDiscriminatorNetwork(self, size, c, last, key)


class ScaleDiscriminatorNetwork(nnx.Module):
    """Images (b, i, j, 3) in [-1, 1] -> features (b, 4, 4, d) -> logits, high for real and matching.

    Every call returns the renewed module too: norms have running statistics or a power iteration.
    """

    def __init__(self, config: ScaleDiscriminator, size: int, c: int, last: bool, key: Array):
        halvings, w = int(math.log2(size // 4)), config.width
        narrowest = w << min(halvings - 1, 3)
        keys, block = iter(jax.random.split(key, 40)), self._block
        trunk = [block(config, 3 if n == 0 else w << n - 1, w << n, 2, n == 0, next(keys)) for n in range(halvings)]
        wide = w << halvings - 1
        while wide > narrowest:
            trunk.append(block(config, wide, wide // 2, 1, False, next(keys)))
            wide //= 2
        self.config, self.trunk = config, nnx.List(trunk)
        self.joint = block(config, c + wide, wide, 1, False, next(keys)) if c else None
        logit = lambda key: Conv(wide, 1, key, kernel=4, padding="VALID")
        self.matching = logit(next(keys)) if c else None
        self.alone = logit(next(keys)) if not c or config.judges_alone(last) else None

    @staticmethod
    def _block(config: ScaleDiscriminator, c: int, f: int, stride: int, first: bool, key: Array) -> ConvBlock:
        keys, kernel, padded = jax.random.split(key), 4 if stride == 2 else 3, ((1, 1), (1, 1))
        spectral = config.norm == "spectral"
        conv = Conv(c, f, keys[0], kernel=kernel, stride=stride, padding=padded, bias=spectral)
        if spectral:
            return ConvBlock(SpectralConv(conv, keys[1]), None, "leaky")
        return ConvBlock(conv, None if first else BatchNorm(f, keys[1]), "leaky")

    def features(self, images: Array, train: bool) -> tuple[Array, ScaleDiscriminatorNetwork]:
        """Features (b, 4, 4, d) of images, in their dtype."""
        h, trunk = in_turn(self.trunk, images, train)
        return h, replace(self, trunk=trunk)

    def matches(self, features: Array, condition: Array, train: bool) -> tuple[Array, ScaleDiscriminatorNetwork]:
        """Logits (b,) fp32 of features with a condition (b, c). Errors: ValueError for an unconditional one."""
        if self.joint is None or self.matching is None:
            raise ValueError("an unconditional discriminator reads no condition")
        h, joint = self.joint(with_vector(features, condition, self.config.condition_first), train)
        return _logits(self.matching, h), replace(self, joint=joint)

    def judges_alone(self, features: Array) -> Array:
        """Logits (b,) fp32 of features alone. Errors: ValueError for one without that head."""
        if self.alone is None:
            raise ValueError("this discriminator judges no image without its condition: see `ScaleDiscriminator.alone`")
        return _logits(self.alone, features)


def _logits(conv: Conv, features: Array) -> Array:
    return at_least_fp32(conv(features))[:, 0, 0, 0]
