"""DF-GAN's discriminator: one logit for an image and a sentence together (Tao et al. 2022, arXiv:2008.05865, 3.2)."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import jax
import jax.numpy as jnp
from einops import repeat
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Float, typed
from t2i_jax.core.conditions import Batch, Condition
from t2i_jax.core.fields import Checked, Size
from t2i_jax.core.sharding import shard
from t2i_jax.core.types import Compute
from t2i_jax.networks.condition import Context, read_context
from t2i_jax.networks.one_stage import SMALLEST, conv, halvings, leaky, widths
from t2i_jax.nn.conv import halve
from t2i_jax.nn.layers import Conv, param


@dataclasses.dataclass(frozen=True)
class OneWay(Checked):
    """A discriminator without norms, whose last features are judged together with the sentence."""

    width: Size = 32
    """channels at full size; twice as many at half of it, and so on"""
    largest: Size = 8
    """the most channels, in multiples of `width`"""

    def init(
        self, size: tuple[int, int], condition: Condition, sentence: int, key: Array, compute: Compute
    ) -> OneWayDiscriminator:
        """size: of the images. sentence: width of a condition that is projected."""
        return OneWayDiscriminator(self, size, condition, sentence, key, compute)


class OneWayDiscriminator(nnx.Module):
    """The parameters of a `OneWay`, and of the condition that it reads."""

    def __init__(
        self,
        config: OneWay,
        size: tuple[int, int],
        condition: Condition,
        sentence: int,
        key: Array,
        compute: Compute,
    ):
        keys, sizes = jax.random.split(key, 5), widths(config.width, config.largest, halvings(size))
        self.what, self.compute, k = condition, compute, condition.token_width(sentence)
        self.condition = condition.init(keys[0], sentence)
        self.into = conv(3, sizes[0], keys[1])
        steps = jax.random.split(keys[2], len(sizes) - 1)
        self.blocks = nnx.List([DownBlock(c, f, key) for (c, f), key in zip(pairwise(sizes), steps, strict=True)])
        self.joint = conv(sizes[-1] + k, 2 * sizes[0], keys[3], bias=False)
        std = (3 * SMALLEST**2 * 2 * sizes[0]) ** -0.5
        self.out = Conv(2 * sizes[0], 1, keys[4], kernel=SMALLEST, padding="VALID", bias=False, std=std)

    def read(self, batch: Batch, count: int) -> Context:
        """Encode the condition of a batch of `count` rows."""
        return read_context(self.what, self.condition, batch, jnp.zeros(count, bool), self.compute.dtype)

    @typed
    def features(self, images: Float[Array, "b i j 3"]) -> Float[Array, "b y x c"]:
        """Images (b, i, j, 3) in [-1, 1] -> features (b, i', j', c)."""
        x = self.into(images.astype(self.compute.dtype))
        for block in self.blocks:
            x = block(shard(x, "batch", None, None, None))
        return x

    @typed
    def logits(self, features: Float[Array, "b i j c"], sentence: Float[Array, "b k"]) -> Float[Array, " b"]:
        """Features (b, i, j, c) and sentences (b, k) -> logits (b,) fp32, high for real images that match."""
        _, rows, columns, _ = features.shape
        sentence = repeat(sentence.astype(features.dtype), "b k -> b i j k", i=rows, j=columns)
        x = leaky(self.joint(jnp.concatenate([features, sentence], -1)))
        return self.out(x).astype(jnp.float32).mean((1, 2, 3))  # of one position, but for sides above 4


class DownBlock(nnx.Module):
    """Half the size: a shortcut, and a residual whose share begins at 0: (b, 2i, 2j, c) -> (b, i, j, f)."""

    def __init__(self, c: int, f: int, key: Array):
        keys = jax.random.split(key, 3)
        self.conv1 = conv(c, f, keys[0], kernel=4, stride=2, bias=False)
        self.conv2 = conv(f, f, keys[1], bias=False)
        self.shortcut = conv(c, f, keys[2], kernel=1) if c != f else None
        self.share = param(jnp.zeros(1), None)

    def __call__(self, x: Array) -> Array:
        h = leaky(self.conv2(leaky(self.conv1(x))))
        x = halve(x)
        return (x if self.shortcut is None else self.shortcut(x)) + self.share[...].astype(x.dtype) * h
