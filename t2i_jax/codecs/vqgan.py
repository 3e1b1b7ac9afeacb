"""VQGAN: an autoencoder with discrete codes, trained with pixel, perceptual and adversarial losses.

Esser, Rombach & Ommer 2021 (arXiv:2012.09841); low-dimensional codes of unit length as in ViT-VQGAN and LlamaGen (Yu et
al. 2022, arXiv:2110.04627; Sun et al. 2024, arXiv:2406.06525); codes of several scales as in VAR (Tian et al. 2024,
arXiv:2404.02905).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

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
from t2i_jax.codecs.multiscale import MultiScaleConfig
from t2i_jax.codecs.quantize import GumbelConfig, QuantizerConfig
from t2i_jax.core.arrays import Float, Int, Num, typed
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import Size
from t2i_jax.core.sharding import shard
from t2i_jax.core.specs import BatchSpec, CodecSpec, CodeSpec, FieldSpec
from t2i_jax.core.types import LossOutput
from t2i_jax.nn.layers import Conv, at_least_fp32, replace

QuantizedCode = tuple[Array, Array, Array, dict[str, Array]]
"""vectors before quantisation (b, h, w, k), codes (b, h, w) or (b, L), loss and metrics of the quantiser"""


@dataclasses.dataclass(frozen=True)
class VQGAN(AutoencoderTraining["VQAutoencoder", QuantizedCode]):
    """The codec and its training settings. The defaults are the VQ-16 of LlamaGen.

    >>> VQGAN().spec.factor, str(VQGAN().spec.code)
    (16, '16384 codes')
    """

    autoencoder: AutoencoderConfig = AutoencoderConfig()
    quantizer: QuantizerConfig | GumbelConfig | MultiScaleConfig = QuantizerConfig()
    """one code a position, or maps of codes of several sizes (`codecs.multiscale`)"""
    convolutions: bool = True
    """convolutions between the code and the autoencoder"""
    kernel: Size = 1
    """their side"""
    continuous: bool = False
    """codes are the vectors before quantisation, which `decode` quantises: latents of a diffusion (Rombach et al.
    2022)"""

    def __post_init__(self):
        super().__post_init__()
        if not self.convolutions and self.quantizer.dim != self.autoencoder.latent:
            raise ConfigError(
                f"quantizer.dim {self.quantizer.dim} without convolutions: autoencoder.latent is "
                f"{self.autoencoder.latent}"
            )

    @property
    def vocabulary(self) -> int:
        """Number of codes; codes are below it."""
        return self.quantizer.codes

    @property
    def factor(self) -> int:
        """Pixels per code along a side."""
        return self.autoencoder.factor

    @property
    def spec(self) -> CodecSpec:
        """Shape and dtype of the codes of an image."""
        ids, vectors = CodeSpec("int32", sizes=(self.vocabulary,)), CodeSpec("float32", (self.quantizer.dim,))
        if self.continuous:
            return CodecSpec(self.factor, vectors)
        return CodecSpec(self.factor, ids, scales=self.scales)

    @property
    def scales(self) -> tuple[int, ...]:
        """Sides of the maps of codes, where there are several."""
        return self.quantizer.scales if isinstance(self.quantizer, MultiScaleConfig) else ()

    def batch_spec(self) -> BatchSpec:
        """Fields of a training batch: images whose sides are multiples of `factor`, or those of all `scales`."""
        if not self.scales:
            return super().batch_spec()
        side = self.factor * self.scales[-1]
        return {"image": FieldSpec((side, side, 3), "float32")}

    def init(self, key: Array) -> AutoencoderModel[VQAutoencoder]:
        first, second = jax.random.split(key)
        return AutoencoderModel(VQAutoencoder(self, first), self, second)

    @typed
    def encode(
        self, model: AutoencoderModel[VQAutoencoder], images: Float[Array, "b i j 3"], key: Array | None = None
    ) -> Num[Array, " b *n"]:
        """Codes int32 below `vocabulary`, (i/factor, j/factor), or (L,) of all `scales`, of images in [-1, 1]; or fp32
        vectors (i/factor, j/factor, k).

        Deterministic; the key is ignored.
        """
        z = self.latents(model, images)
        return z.astype(jnp.float32) if self.continuous else model.autoencoder.quantizer.codes(z)

    @typed
    def decode(self, model: AutoencoderModel[VQAutoencoder], codes: Num[Array, " b *n"]) -> Float[Array, "b i j 3"]:
        """Images, about [-1, 1], of codes: (h*factor, w*factor) of (h, w) codes."""
        part = model.autoencoder
        codes = part.quantizer.codes(codes) if self.continuous else codes
        return at_least_fp32(part.decoder(part.entered(self.embed(model, codes).astype(self.dtype))))

    @typed
    def embed(self, model: AutoencoderModel[VQAutoencoder], codes: Int[Array, "*b"]) -> Float[Array, "*c k"]:
        """The vectors of codes; (b, h, w, k) of those of all `scales` together."""
        return model.autoencoder.quantizer.vectors(codes)

    @typed
    def latents(
        self, model: AutoencoderModel[VQAutoencoder], images: Float[Array, "b i j 3"]
    ) -> Float[Array, "b h w k"]:
        """Vectors of images before quantisation.

        Errors: `ValueError` for a size that is no multiple of `factor`.
        """
        x = shard(check_size(images, self.factor).astype(self.dtype), "batch", None, None, None)
        return model.autoencoder.left(model.autoencoder.encoder(x))

    def forward(
        self, model: AutoencoderModel[VQAutoencoder], batch: ImageBatch, key: Array, step: Array, train: bool = True
    ) -> Reconstruction[QuantizedCode]:
        """Encode, quantise and decode the images of a batch.

        The result holds the vectors before quantisation, their codes, and the loss and metrics of the quantiser.
        """
        part = model.autoencoder
        z = self.latents(model, batch["image"])
        vectors, codes, loss, metrics = part.quantizer(z, jax.random.split(key)[0], step)
        h = part.decoder.features(part.entered(vectors.astype(self.dtype)))
        return Reconstruction(at_least_fp32(part.decoder.decode_head(h)), h, (z, codes, loss, metrics))

    def generator_loss(
        self,
        model: AutoencoderModel[VQAutoencoder],
        batch: ReconstructionBatch[QuantizedCode],
        key: Array,
        step: Array,
        train: bool = True,
    ) -> LossOutput:
        """Reconstruction + perceptual + quantisation + adversarial; the returned state holds the codebook."""
        part = model.autoencoder
        z, codes, loss, metrics = batch["outputs"].code
        distance, terms = self.image_loss(model, batch, step)
        moved = replace(part, quantizer=part.quantizer.ema_update(z, codes, jax.random.split(key)[1]))
        return LossOutput(loss + distance, metrics | terms, replace(model, autoencoder=moved))


class VQAutoencoder(DecoderNetwork):
    """Encoder, quantiser and decoder, and maybe convolutions to and from the width of the codes."""

    def __init__(self, config: VQGAN, key: Array):
        keys = jax.random.split(key, 5)
        latent, k = config.autoencoder.latent, config.quantizer.dim
        self.encoder = Encoder(config.autoencoder, keys[0])
        self.to_code = Conv(latent, k, keys[1], kernel=config.kernel) if config.convolutions else None
        self.quantizer = config.quantizer.init(keys[2])
        self.from_code = Conv(k, latent, keys[3], kernel=config.kernel) if config.convolutions else None
        self.decoder = Decoder(config.autoencoder, keys[4])

    def left(self, h: Array) -> Array:
        """Vectors (b, h, w, k) before quantisation from the output of the encoder."""
        return h if self.to_code is None else self.to_code(h)

    def entered(self, vectors: Array) -> Array:
        """Input of the decoder from vectors of codes (b, h, w, k)."""
        return vectors if self.from_code is None else self.from_code(vectors)
