"""Multi-scale residual quantisation: maps of codes of growing size, each of what those before leave (Tian et al. 2024).

VAR (arXiv:2404.02905, algorithms 1 and 2): all maps share one codebook. A map of codes becomes a map of vectors of the
full size, by bicubic interpolation and one of a few convolutions; the sum of all of them is what the decoder reads.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from t2i_jax.codecs.quantize import Quantizer, QuantizerConfig, usage
from t2i_jax.core.arrays import Float, Int, typed
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import Checked, Count, Share, Sizes
from t2i_jax.nn.layers import Conv, replace
from t2i_jax.nn.resize import area, bicubic


@dataclasses.dataclass(frozen=True)
class MultiScaleConfig(Checked):
    """A codebook for maps of several sizes. The defaults are those of VAR for images of 256 x 256."""

    codebook: QuantizerConfig = QuantizerConfig(4096, 32, normalize=False)
    """of all scales, and the weights of the losses"""
    scales: Sizes = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """sides of the maps of codes, from the smallest to that of the encoder's output"""
    convolutions: Count = 4
    """3x3 convolutions that scales share, each those that follow each other; 0: none"""
    mix: Share = 0.5
    """share r of the convolution in (1 - r) h + r conv(h)"""

    def __post_init__(self):
        super().__post_init__()
        if not self.scales or any(a >= b for a, b in zip(self.scales, self.scales[1:], strict=False)):
            raise ValueError(f"scales {self.scales}: sides that grow, one at least")
        if self.codebook.entropy:
            raise ConfigError("codebook.entropy: codes of several scales have no entropy term")

    @property
    def codes(self) -> int:
        """Rows of the codebook."""
        return self.codebook.codes

    @property
    def dim(self) -> int:
        """Width of a row."""
        return self.codebook.dim

    @property
    def side(self) -> int:
        """Side of the encoder's output."""
        return self.scales[-1]

    @property
    def ends(self) -> tuple[int, ...]:
        """Number of codes of an image up to each scale."""
        return tuple(int(n) for n in np.cumsum(np.square(self.scales)))

    @property
    def vectors_alone(self) -> MultiScaleConfig:
        """The same without the settings of its training."""
        own = self.codebook
        return dataclasses.replace(self, codebook=QuantizerConfig(own.codes, own.dim, own.normalize, own.cosine))

    def convolution_of(self, scale: int) -> int:
        """Number of the convolution of a scale: that whose tick is nearest to the scale's place in [0, 1]."""
        n = self.convolutions
        margin = 1 / 3 / n if n == 4 else 1 / 2 / n  # as published; some scales are ties, which rounding decides
        ticks = np.linspace(margin, 1 - margin, n)
        return int(np.argmin(np.abs(ticks - scale / max(len(self.scales) - 1, 1))))

    def init(self, key: Array) -> MultiScaleQuantizer:
        return MultiScaleQuantizer(self, key)


class Scale(NamedTuple):
    """One scale of a map of vectors."""

    rest: Array
    """(b, p, p, k): means of what the scales before leave"""
    codes: Array
    """(b, p, p)"""
    total: Array
    """(b, h, w, k): sum of the vectors up to this scale"""


class MultiScaleQuantizer(nnx.Module):
    """A codebook for maps of several sizes; vectors are float (b, h, w, k), codes int32 (b, L), one map after the
    other."""

    def __init__(self, config: MultiScaleConfig, key: Array):
        first, second = jax.random.split(key)
        self.config = config
        self.codebook = Quantizer(config.codebook, first)
        keys = jax.random.split(second, max(config.convolutions, 1))
        self.convolutions = nnx.List([Conv(config.dim, config.dim, keys[n]) for n in range(config.convolutions)])

    @typed
    def added(self, codes: Int[Array, "b p p"], scale: int) -> Float[Array, "b h w k"]:
        """What a map of codes adds to the vectors of the full size."""
        config, h = self.config, self.codebook.vectors(codes)
        if scale < len(config.scales) - 1:
            h = bicubic(h, (config.side, config.side))
        if not config.convolutions:
            return h
        return (1 - config.mix) * h + config.mix * self.convolutions[config.convolution_of(scale)](h)

    @typed
    def split(self, codes: Int[Array, "b n"]) -> list[Array]:
        """The map of codes of each scale, (b, p, p)."""
        parts = jnp.split(codes, self.config.ends[:-1], 1)
        return [part.reshape(len(codes), p, p) for part, p in zip(parts, self.config.scales, strict=True)]

    @typed
    def smallest(self) -> Int[Array, ""]:
        """The code whose vector is shortest, int32."""
        return jnp.argmin(jnp.sum(self.codebook.rows() ** 2, -1)).astype(jnp.int32)

    def walk(self, z: Array, codes: Array | None = None) -> list[Scale]:
        """All scales of vectors z (b, h, w, k), with these codes (b, L), or the nearest.

        Errors: ValueError for vectors of another size than that of the last scale.
        """
        config = self.config
        if z.shape[1:3] != (config.side, config.side):
            raise ValueError(
                f"vectors of {z.shape[1]} x {z.shape[2]}: the last of the scales {config.scales} is wanted"
            )
        given = None if codes is None else self.split(codes)
        total, found = jnp.zeros_like(z), []
        for n, p in enumerate(config.scales):
            rest = jax.lax.stop_gradient(z - total)
            rest = rest if p == config.side else area(rest, (p, p))
            chosen = self.codebook.codes(rest) if given is None else given[n]
            total = total + self.added(chosen, n)
            found.append(Scale(rest, chosen, total))
        return found

    @typed
    def codes(self, z: Float[Array, "b h w k"]) -> Int[Array, "b n"]:
        """The nearest rows at each scale, int32."""
        return _joined([scale.codes for scale in self.walk(self.codebook.prepare(z))])

    @typed
    def vectors(self, codes: Int[Array, "b n"]) -> Float[Array, "b h w k"]:
        """The sum of what all codes add."""
        total = jnp.zeros(())
        for n, part in enumerate(self.split(codes)):
            total = total + self.added(part, n)
        return total

    @typed
    def inputs(self, codes: Int[Array, "b n"]) -> Float[Array, "b m k"]:
        """The vectors of the scales before, averaged to each scale but the first: (b, L - p^2, k) with its p."""
        total, means = jnp.zeros(()), []
        for n, part in enumerate(self.split(codes)[:-1]):
            total = total + self.added(part, n)
            means.append(self.means(total, n + 1))
        return jnp.concatenate([jnp.zeros((len(codes), 0, self.config.dim)), *means], 1)

    @typed
    def means(self, total: Float[Array, "b h w k"], scale: int) -> Float[Array, "b m k"]:
        """Vectors of the full size averaged to the positions of a scale, in raster order."""
        p = self.config.scales[scale]
        return area(total, (p, p)).reshape(len(total), p * p, -1)

    def __call__(
        self, z: Array, key: Array | None = None, step: Array | int = 0
    ) -> tuple[Array, Array, Array, dict[str, Array]]:
        """Quantise vectors in training: (b, h, w, k) -> vectors (b, h, w, k), codes (b, L), loss, metrics.

        The gradient of the vectors is passed to z unchanged. The loss is the mean over scales of what the two terms of
        `Quantizer` are for the sum up to that scale.
        """
        fixed, config, z = jax.lax.stop_gradient, self.config.codebook, self.codebook.prepare(z)
        scales = self.walk(fixed(z))
        distance = lambda x, y: jnp.mean(jnp.stack([jnp.mean((x(z) - y(scale.total)) ** 2) for scale in scales]))
        same = lambda x: x
        commitment, codebook = distance(same, fixed), distance(fixed, same)
        codes = _joined([scale.codes for scale in scales])
        loss = config.commitment * commitment + config.codebook * codebook
        metrics = {"commitment": commitment, **usage(codes, config.codes)}
        return z + fixed(scales[-1].total - z), codes, loss, metrics

    def ema_update(self, z: Array, codes: Array, key: Array) -> MultiScaleQuantizer:
        """The quantiser after a batch: a codebook of moving averages follows the vectors of all scales."""
        if not self.config.codebook.decay:
            return self
        scales = self.walk(jax.lax.stop_gradient(self.codebook.prepare(z)), codes)
        rests = jnp.concatenate([scale.rest.reshape(-1, self.config.dim) for scale in scales])
        chosen = jnp.concatenate([scale.codes.reshape(-1) for scale in scales])
        return replace(self, codebook=self.codebook.ema_update(rests, chosen, key))


def _joined(maps: list[Array]) -> Array:
    return jnp.concatenate([part.reshape(len(part), -1) for part in maps], 1)
