"""TAESD: a small autoencoder of convolutions and ReLUs whose codes are the latents of a larger one.

Bohan 2023 (github.com/madebyollin/taesd): published ones make images of the latents of Stable Diffusion, FLUX and Sana
at a small part of the cost, for intermediate images. Here it may also be trained as a codec of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from t2i_jax.codecs.autoencoder import ImageDecoder
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
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import DEEPEST, Checked, Finite, Positive, Range, Size, Sizes
from t2i_jax.core.sharding import shard
from t2i_jax.core.specs import CodecSpec, CodeSpec
from t2i_jax.core.types import Capabilities, LossOutput
from t2i_jax.nn.conv import Residual, Upsample
from t2i_jax.nn.layers import Conv, GroupNorm, at_least_fp32

LIMIT = 3.0
"""The decoder reads LIMIT tanh(z / LIMIT)."""
Blocks = Annotated[tuple[int, ...], Range(1, DEEPEST)]


@dataclasses.dataclass(frozen=True)
class Levels(Checked):
    """Sizes of one side at each resolution, in the order of execution."""

    channels: Sizes = (64, 64, 64, 64)
    blocks: Blocks = (1, 3, 3, 3)
    """residual blocks of each level"""
    normed: bool = False
    """the blocks of the coarsest level also have a branch with normalisation"""

    def __post_init__(self):
        super().__post_init__()
        if not self.channels or len(self.channels) != len(self.blocks):
            raise ConfigError(f"channels {self.channels} and blocks {self.blocks}: one number a level in each")


@dataclasses.dataclass(frozen=True)
class EncoderLevels(Levels):
    """Sizes of the encoder, finest level first; each level but the first halves the image."""

    entry: Sizes = ()
    """channels of convolutions that each halve the image, in place of the first one, which does not"""

    def __post_init__(self):
        super().__post_init__()
        if self.entry and self.entry[-1] != self.channels[0]:
            raise ConfigError(f"entry {self.entry}: it ends with the channels of the first level, {self.channels[0]}")

    @property
    def factor(self) -> int:
        """Pixels per code along a side."""
        return 2 ** (len(self.channels) - 1 + len(self.entry))


@dataclasses.dataclass(frozen=True)
class DecoderLevels(Levels):
    """Sizes of the decoder, coarsest level first; each level but the last doubles the image."""

    blocks: Blocks = (3, 3, 3, 1)

    @property
    def factor(self) -> int:
        """Pixels per code along a side."""
        return 2 ** (len(self.channels) - 1)


@dataclasses.dataclass(frozen=True)
class TAESD(AutoencoderTraining["TinyAutoencoder", Array]):
    """The codec and its training settings. The defaults are those of Stable Diffusion 1 and 2 (1.2M parameters each
    way)."""

    channels: Size = 4
    """channels k of a code"""
    encoder: EncoderLevels | None = EncoderLevels()
    """None: a decoder alone, for intermediate images"""
    decoder: DecoderLevels = DecoderLevels()
    scale: Positive = 1.0
    """codes are (latent - shift) scale; 1 / std over the training data, see `measure`"""
    shift: Finite = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.encoder and self.encoder.factor != self.decoder.factor:
            raise ConfigError(
                f"encoder.channels {self.encoder.channels} with entry {self.encoder.entry} makes a code of "
                f"{self.encoder.factor} pixels, decoder.channels {self.decoder.channels} an image of "
                f"{self.decoder.factor} per code"
            )

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        return dataclasses.replace(super().capabilities, measures_scale=True)

    @property
    def factor(self) -> int:
        """Pixels per code along a side."""
        return self.decoder.factor

    @property
    def spec(self) -> CodecSpec:
        """Shape and dtype of the codes of an image."""
        return CodecSpec(self.factor, CodeSpec("float32", (self.channels,)), encodes=self.encoder is not None)

    def init(self, key: Array) -> AutoencoderModel[TinyAutoencoder]:
        first, second = jax.random.split(key)
        return AutoencoderModel(TinyAutoencoder(self, first), self, second)

    @typed
    def encode(
        self, model: AutoencoderModel[TinyAutoencoder], images: Float[Array, "b i j 3"], key: Array | None = None
    ) -> Float[Array, "b h w k"]:
        """Codes (i/factor, j/factor) fp32 of images in [-1, 1]; those of a published model are in about [-3, 3].

        Deterministic; the key is ignored. Errors: `ValueError` for a size that is no multiple of `factor`,
        `ConfigError` if there is no encoder.
        """
        return (self.latents(model, images).astype(jnp.float32) - self.shift) * self.scale

    @typed
    def decode(
        self, model: AutoencoderModel[TinyAutoencoder], codes: Float[Array, "b h w k"]
    ) -> Float[Array, "b i j 3"]:
        """Images, about [-1, 1], of codes: (h*factor, w*factor)."""
        z = codes.astype(jnp.float32) / self.scale + self.shift
        return model.autoencoder.decoder(z.astype(self.dtype)).astype(jnp.float32)

    @typed
    def latents(
        self, model: AutoencoderModel[TinyAutoencoder], images: Float[Array, "b i j 3"]
    ) -> Float[Array, "b h w k"]:
        """Codes before shift and scale, in the dtype of the convolutions."""
        encoder = model.autoencoder.encoder
        if encoder is None:
            raise ConfigError("encoder=None: this codec makes images of codes, but no codes of images")
        return encoder(shard(check_size(images, self.factor).astype(self.dtype), "batch", None, None, None))

    def measure(self, model: AutoencoderModel[TinyAutoencoder], batches: Iterable[ArrayLike]) -> tuple[float, float]:
        """(scale, shift) that give the codes of these images, batches of (b, i, j, 3), mean 0 and variance 1."""

        def moments(images: Array) -> tuple[Array, Array]:
            z = self.latents(model, images).astype(jnp.float32)
            return jnp.mean(z), jnp.mean(z * z)

        return standardising(moments, batches)

    def forward(
        self, model: AutoencoderModel[TinyAutoencoder], batch: ImageBatch, key: Array, step: Array, train: bool = True
    ) -> Reconstruction[Array]:
        """Encode and decode the images of a batch; with the codes before shift and scale."""
        decoder, z = model.autoencoder.decoder, self.latents(model, batch["image"])
        h = decoder.features(z)
        return Reconstruction(at_least_fp32(decoder.decode_head(h)), h, z)

    def generator_loss(
        self,
        model: AutoencoderModel[TinyAutoencoder],
        batch: ReconstructionBatch[Array],
        key: Array,
        step: Array,
        train: bool = True,
    ) -> LossOutput:
        """Reconstruction + perceptual + adversarial; the decoder's limit keeps the codes in its range."""
        loss, metrics = self.image_loss(model, batch, step)
        return LossOutput(loss, metrics | {"std": jnp.std(at_least_fp32(batch["outputs"].code))})


class Halving(nnx.Module):
    """3x3 convolution of stride 2: (b, i, j, c) -> (b, i/2, j/2, f); `entry`: with a bias, and a ReLU after it."""

    def __init__(self, c: int, f: int, key: Array, entry: bool = False):
        self.conv = Conv(c, f, key, stride=2, padding=((1, 1), (1, 1)), bias=entry)
        self.entry = entry

    def __call__(self, x: Array) -> Array:
        y = self.conv(x)
        return jax.nn.relu(y) if self.entry else y


class NormBranch(nnx.Module):
    """conv(relu(norm(conv(x)))) of 1x1 convolutions, with four times the channels inside and a norm of four groups."""

    def __init__(self, c: int, key: Array):
        first, second = jax.random.split(key)
        self.into = Conv(c, 4 * c, first, kernel=1, bias=False)
        self.norm = GroupNorm(4 * c, 4, 1e-5)
        self.out = Conv(4 * c, c, second, kernel=1, bias=False)

    def __call__(self, x: Array) -> Array:
        return self.out(jax.nn.relu(self.norm(self.into(x))))


class TinyBlock(nnx.Module):
    """relu(y + f(y)) of three convolutions f, where y is x, or x plus its normalised branch; channels are kept."""

    def __init__(self, c: int, key: Array, normed: bool):
        first, second = jax.random.split(key)
        self.pool = NormBranch(c, first) if normed else None
        self.residual = Residual(c, second, kernels=(3, 3, 3))

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(self.residual(x if self.pool is None else x + self.pool(x)))


Layer = Conv | Halving | Upsample | TinyBlock


def blocks(levels: Levels, n: int, normed: bool, key: Array) -> list[TinyBlock]:
    """The residual blocks of level n."""
    return [TinyBlock(levels.channels[n], k, normed) for k in jax.random.split(key, levels.blocks[n])]


def applied(layers: Iterable[Layer], x: Array) -> Array:
    """x after all layers, one after the other."""
    for layer in layers:
        x = layer(x)
    return x


class TinyEncoder(nnx.Module):
    """(b, i, j, 3) in [-1, 1] -> (b, i/factor, j/factor, k)."""

    def __init__(self, config: EncoderLevels, channels: int, key: Array):
        keys = iter(jax.random.split(key, 2 * len(config.channels) + len(config.entry) + 1))
        layers: list[Layer] = []
        c = 3  # of the image
        for f in config.entry:
            layers.append(Halving(c, f, next(keys), entry=True))
            c = f
        for n, f in enumerate(config.channels):
            if n or not config.entry:
                layers.append((Halving if n else Conv)(c, f, next(keys)))
            layers += blocks(config, n, config.normed and n == len(config.channels) - 1, next(keys))
            c = f
        self.layers = nnx.List(layers)
        self.out = Conv(c, channels, next(keys))

    @typed
    def __call__(self, images: Float[Array, "b i j 3"]) -> Float[Array, "b h w k"]:
        return self.out(applied(self.layers, (images + 1) / 2))


class TinyDecoder(ImageDecoder):
    """(b, h, w, k) -> (b, h*factor, w*factor, 3), about [-1, 1]."""

    def __init__(self, config: DecoderLevels, channels: int, key: Array):
        keys = iter(jax.random.split(key, 2 * len(config.channels) + 1))
        c = config.channels[0]
        self.stem = Conv(channels, c, next(keys))
        layers: list[Layer] = []
        for n, f in enumerate(config.channels):
            if n:
                layers.append(Upsample(c, next(keys), f, bias=False))
            layers += blocks(config, n, config.normed and n == 0, next(keys))
            c = f
        self.layers = nnx.List(layers)
        self.out = Conv(c, 3, next(keys))

    def features(self, z: Array) -> Array:
        """Input of the last convolution."""
        return applied(self.layers, jax.nn.relu(self.stem(LIMIT * jnp.tanh(z / LIMIT))))

    def decode_head(self, features: Array) -> Array:
        """The last convolution, from [0, 1] to [-1, 1]."""
        return 2 * self.out(features) - 1


class TinyAutoencoder(DecoderNetwork):
    """Encoder, if there is one, and decoder."""

    def __init__(self, config: TAESD, key: Array):
        first, second = jax.random.split(key)
        self.encoder = TinyEncoder(config.encoder, config.channels, first) if config.encoder else None
        self.decoder = TinyDecoder(config.decoder, config.channels, second)
