"""KL autoencoder: a continuous latent of few channels per position, kept near a standard normal by a small penalty.

Rombach et al. 2022 (arXiv:2112.10752, G); the tokens of MAR (Li et al. 2024, arXiv:2406.11838) and the latents of
diffusion models. `encode` shifts and scales its output to about unit variance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from t2i_jax.codecs.autoencoder import AutoencoderConfig, Decoder, Encoder
from t2i_jax.codecs.game import (
    AutoencoderModel,
    AutoencoderTraining,
    DecoderNetwork,
    ImageBatch,
    Reconstruction,
    ReconstructionBatch,
    check_size,
)
from t2i_jax.codecs.scale import standardising
from t2i_jax.core.arrays import Float, typed
from t2i_jax.core.fields import Count, Finite, NotNegative, Positive
from t2i_jax.core.sharding import shard
from t2i_jax.core.specs import CodecSpec, CodeSpec
from t2i_jax.core.types import Capabilities, LossOutput
from t2i_jax.nn.layers import Conv, at_least_fp32


class DiagonalGaussian(NamedTuple):
    """A diagonal normal distribution: mean and log-variance, fp32."""

    mean: Float[Array, "b i j k"]
    logvar: Float[Array, "b i j k"]

    @property
    def std(self) -> Array:
        return jnp.exp(self.logvar / 2)

    @typed
    def sample(self, noise: Float[Array, "b i j k"]) -> Float[Array, "b i j k"]:
        """mean + std noise."""
        return self.mean + self.std * noise

    @typed
    def kl(self) -> Float[Array, " b"]:
        """KL(q || N(0, 1)) of each image in nats, summed over positions and channels (Kingma & Welling 2013, B)."""
        return 0.5 * jnp.sum(self.mean**2 + jnp.exp(self.logvar) - 1 - self.logvar, (1, 2, 3))


@typed
def draw_codes(latents: Float[Array, "b i j m"], key: Array) -> Float[Array, "b i j m//2"]:
    """Sample codes fp32 from normals whose means and standard deviations are `latents`."""
    mean, std = jnp.split(latents.astype(jnp.float32), 2, -1)
    return mean + std * jax.random.normal(key, mean.shape)


SampledCode = tuple[DiagonalGaussian, Array]
"""the posterior, and a sample from it (b, h, w, k)"""


@dataclasses.dataclass(frozen=True)
class KL(AutoencoderTraining["KLAutoencoder", SampledCode]):
    """The codec and its training settings. The defaults are the f16 model with 16 channels of MAR (66M parameters).

    >>> KL().spec.factor, str(KL().spec.code)
    (16, 'codes of 16 numbers')
    """

    autoencoder: AutoencoderConfig = AutoencoderConfig(latent=16, moments=True, decoder_attention=())
    channels: Count = 0
    """channels of a code; 0: `autoencoder.latent`"""
    convolutions: bool = True
    """1x1 convolutions between the code and the autoencoder"""
    scale: Positive = 1.0
    """codes are (latent - shift) scale; 1 / std over the training data, see `measure`"""
    shift: Finite = 0.0
    _: dataclasses.KW_ONLY
    kl: NotNegative = 1e-6
    """weight of the divergence from N(0, 1), which is summed over an image's latent as the distances are over its
    pixels"""

    def __post_init__(self):
        super().__post_init__()
        if not self.autoencoder.moments:
            raise ValueError("a KL autoencoder needs autoencoder.moments=True: a mean and a log-variance")
        if not self.convolutions and self.dim != self.autoencoder.latent:
            raise ValueError(f"channels {self.channels} without convolutions: they are autoencoder.latent, or 0")

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        return dataclasses.replace(super().capabilities, measures_scale=True)

    @property
    def dim(self) -> int:
        """Channels k of a code."""
        return self.channels or self.autoencoder.latent

    @property
    def factor(self) -> int:
        """Pixels per code along a side."""
        return self.autoencoder.factor

    @property
    def spec(self) -> CodecSpec:
        """Shape and dtype of the codes of an image."""
        return CodecSpec(self.factor, CodeSpec("float32", (self.dim,)))

    def init(self, key: Array) -> AutoencoderModel[KLAutoencoder]:
        first, second = jax.random.split(key)
        return AutoencoderModel(KLAutoencoder(self, first), self, second)

    @typed
    def encode(
        self, model: AutoencoderModel[KLAutoencoder], images: Float[Array, "b i j 3"], key: Array | None = None
    ) -> Float[Array, "b h w k"]:
        """Codes of about unit variance, (i/factor, j/factor), of images in [-1, 1].

        They are the means of the posterior, or with a `key` samples from it, on which models of codes are trained
        (Rombach et al. 2022). Errors: `ValueError` for a size that is no multiple of `factor`.
        """
        q = self.posterior(model, images)
        z = q.mean if key is None else q.sample(jax.random.normal(key, q.mean.shape))
        return (z - self.shift) * self.scale

    def to_store(self, model: AutoencoderModel[KLAutoencoder], images: Array) -> dict[str, Array]:
        """`latents` (b, i/factor, j/factor, 2 k) fp32: mean and standard deviation of the codes, scaled as in `encode`.

        `draw_codes` samples from them.
        """
        q = self.posterior(model, images)
        return {"latents": jnp.concatenate([(q.mean - self.shift) * self.scale, q.std * abs(self.scale)], -1)}

    @typed
    def decode(self, model: AutoencoderModel[KLAutoencoder], codes: Float[Array, "b h w k"]) -> Float[Array, "b i j 3"]:
        """Images, about [-1, 1], of codes: (h*factor, w*factor)."""
        z = codes.astype(jnp.float32) / self.scale + self.shift
        return model.autoencoder.decoder(self._enter(model, z)).astype(jnp.float32)

    @typed
    def moments(
        self, model: AutoencoderModel[KLAutoencoder], images: Float[Array, "b i j 3"]
    ) -> Float[Array, "b h w m"]:
        """Mean and log-variance, before shift and scale, concatenated; fp32."""
        part = model.autoencoder
        x = part.encoder(shard(check_size(images, self.factor).astype(self.dtype), "batch", None, None, None))
        return (x if part.to_code is None else part.to_code(x)).astype(jnp.float32)

    @typed
    def posterior(self, model: AutoencoderModel[KLAutoencoder], images: Float[Array, "b i j 3"]) -> DiagonalGaussian:
        """q(z | image), before shift and scale; the log-variance is clipped to [-30, 20]."""
        mean, logvar = jnp.split(self.moments(model, images), 2, -1)
        return DiagonalGaussian(mean, jnp.clip(logvar, -30, 20))

    def measure(self, model: AutoencoderModel[KLAutoencoder], batches: Iterable[ArrayLike]) -> tuple[float, float]:
        """(scale, shift) that give the codes of these images, batches of (b, i, j, 3), mean 0 and variance 1."""

        def moments(images: Array) -> tuple[Array, Array]:
            q = self.posterior(model, images)
            return jnp.mean(q.mean), jnp.mean(q.mean**2 + jnp.exp(q.logvar))

        return standardising(moments, batches)

    def forward(
        self, model: AutoencoderModel[KLAutoencoder], batch: ImageBatch, key: Array, step: Array, train: bool = True
    ) -> Reconstruction[SampledCode]:
        """Encode the images of a batch, sample the posterior and decode; with the posterior and the sample."""
        decoder = model.autoencoder.decoder
        q = self.posterior(model, batch["image"])
        z = q.sample(jax.random.normal(key, q.mean.shape))
        h = decoder.features(self._enter(model, z))
        return Reconstruction(at_least_fp32(decoder.decode_head(h)), h, (q, z))

    def generator_loss(
        self,
        model: AutoencoderModel[KLAutoencoder],
        batch: ReconstructionBatch[SampledCode],
        key: Array,
        step: Array,
        train: bool = True,
    ) -> LossOutput:
        """Reconstruction + perceptual + KL + adversarial."""
        images, (q, z) = batch["image"], batch["outputs"].code
        distance, metrics = self.image_loss(model, batch, step)
        kl = q.kl().mean()
        loss = distance + self.kl * kl * len(images) / images.size
        return LossOutput(loss, metrics | {"kl": kl, "std": jnp.std(z)})

    def _enter(self, model: AutoencoderModel[KLAutoencoder], z: Array) -> Array:
        part, z = model.autoencoder, z.astype(self.dtype)
        return z if part.from_code is None else part.from_code(z)


class KLAutoencoder(DecoderNetwork):
    """Encoder to moments, and decoder, with 1x1 convolutions to and from the width of the codes."""

    def __init__(self, config: KL, key: Array):
        keys = jax.random.split(key, 4)
        latent, k = config.autoencoder.latent, config.dim
        self.encoder = Encoder(config.autoencoder, keys[0])
        self.to_code = Conv(2 * latent, 2 * k, keys[1], kernel=1) if config.convolutions else None
        self.from_code = Conv(k, latent, keys[2], kernel=1) if config.convolutions else None
        self.decoder = Decoder(config.autoencoder, keys[3])
