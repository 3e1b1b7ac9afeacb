"""Discrete VAE: a categorical distribution over codes at each grid position, trained through a relaxed sample.

The codec of DALL-E (Ramesh et al. 2021, arXiv:2102.12092, 2.1 and A) and the smaller one of DALLE-pytorch. The encoder
outputs logits; training mixes the rows of the codebook by a Gumbel-softmax sample (Jang et al. 2016; Maddison et al.
2016), encoding takes the largest logit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax
from einops import repeat
from flax import nnx
from jax import Array

from t2i_jax.codecs import losses
from t2i_jax.codecs.game import check_size
from t2i_jax.codecs.quantize import usage
from t2i_jax.core.arrays import Float, Int, typed
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import BaseCodec
from t2i_jax.core.fields import DEEPEST, Checked, Count, Layers, NotNegative, Positive, Range, Size
from t2i_jax.core.sharding import shard
from t2i_jax.core.specs import CodecSpec, CodeSpec
from t2i_jax.core.types import Compute, LossOutput, Objective
from t2i_jax.nn.conv import Residual
from t2i_jax.nn.layers import Conv, Embedding, fan_in, param


@dataclasses.dataclass(frozen=True)
class OpenAIdVAE(Checked):
    """DALL-E's network: groups of bottleneck blocks, with max-pooling and nearest-neighbour upsampling in between."""

    channels: Size = 256
    """channels of the finest group; each coarser one has twice as many"""
    groups: Size = 4
    blocks: Layers = 2
    """blocks of each group"""
    code: Size = 128
    """size of a row of the codebook"""

    @property
    def factor(self) -> int:
        return 2 ** (self.groups - 1)

    @property
    def gain(self) -> float:
        """Factor of each block's branch; it keeps the sum of all branches bounded."""
        return (self.groups * self.blocks) ** -2

    def widths(self) -> tuple[int, ...]:
        return tuple(self.channels * 2**n for n in range(self.groups))

    def encoder(self, codes: int, key: Array) -> DVAEEncoder:
        return DVAEEncoder(self, codes, key)

    def decoder(self, outputs: int, key: Array) -> DVAEDecoder:
        return DVAEDecoder(self, outputs, key)


@dataclasses.dataclass(frozen=True)
class DALLEPytorchVAE(Checked):
    """DALLE-pytorch's network: convolutions of stride 2, then residual blocks; the decoder mirrors it."""

    channels: Size = 64
    layers: Layers = 3
    blocks: Annotated[int, Range(0, DEEPEST)] = 0
    """residual blocks at the coarsest resolution; if any, the decoder starts with a 1x1 convolution"""
    code: Size = 512
    """size of a row of the codebook"""

    @property
    def factor(self) -> int:
        return 2**self.layers

    def encoder(self, codes: int, key: Array) -> Down:
        return Down(self, codes, key)

    def decoder(self, outputs: int, key: Array) -> Up:
        return Up(self, outputs, key)


@dataclasses.dataclass(frozen=True)
class DVAE(BaseCodec["DVAEModel"]):
    """The codec and its training settings. The defaults are DALL-E's."""

    codes: Size = 8192
    network: OpenAIdVAE | DALLEPytorchVAE = OpenAIdVAE()
    pixels: Literal["laplace", "l2", "l1", "smooth_l1"] = "laplace"
    """the logit-Laplace density of A.3, for which the decoder outputs locations and scales, or a mean difference"""
    kl: NotNegative = 0.0
    """weight of KL(q || uniform) per image, summed over its codes; the likelihood is a mean over pixels"""
    kl_warmup: Count = 0
    """steps of a warm-up of that weight from 0"""
    temperature: Positive = 1.0
    """initial temperature of the relaxed sample"""
    last_temperature: Positive = 1 / 16
    anneal: Count = 150_000
    """steps of the cosine decay to `last_temperature`; 0: constant"""
    straight_through: bool = False
    """decode the single sampled code, with the gradient of the relaxed sample"""
    half: Literal["both", "encoder", "decoder"] = "both"
    """keep one side only, as in the released files of DALL-E"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the convolutions; logits and losses are always fp32"""

    @property
    def vocabulary(self) -> int:
        """Number of codes; codes are below it."""
        return self.codes

    @property
    def factor(self) -> int:
        """Pixels per code along a side."""
        return self.network.factor

    @property
    def outputs(self) -> int:
        """Output channels of the decoder."""
        return 6 if self.pixels == "laplace" else 3

    @property
    def spec(self) -> CodecSpec:
        """Shape and dtype of the codes of an image."""
        code = CodeSpec("int32", sizes=(self.codes,))
        return CodecSpec(self.factor, code, encodes=self.half != "decoder", decodes=self.half != "encoder")

    def init(self, key: Array) -> DVAEModel:
        return DVAEModel(self, key)

    @typed
    def encode(
        self, model: DVAEModel, images: Float[Array, "b i j 3"], key: Array | None = None
    ) -> Int[Array, "b h w"]:
        """Codes int32 below `vocabulary`, (i/factor, j/factor), of images in [-1, 1].

        Deterministic; the key is ignored.
        """
        return jnp.argmax(self.logits(model, images), -1).astype(jnp.int32)

    @typed
    def decode(self, model: DVAEModel, codes: Int[Array, "b h w"]) -> Float[Array, "b i j 3"]:
        """Images, about [-1, 1], of codes: (h*factor, w*factor)."""
        return self.from_logit_space(self.decode_head(model, self.embed(model, codes)))

    @typed
    def embed(self, model: DVAEModel, codes: Int[Array, "*b"]) -> Float[Array, "*b k"]:
        """The vectors of codes."""
        return model.codebook(codes)

    @typed
    def logits(self, model: DVAEModel, images: Float[Array, "b i j 3"]) -> Float[Array, "b h w v"]:
        """log q(code | image) up to a constant, fp32.

        Errors: `ValueError` for a size that is no multiple of `factor`, `ConfigError` if there is no encoder.
        """
        if model.encoder is None:
            raise ConfigError(f"half={self.half!r}: this codec has no encoder")
        x = shard(self.to_logit_space(check_size(images, self.factor)).astype(self.dtype), "batch", None, None, None)
        return model.encoder(x)

    @typed
    def decode_head(self, model: DVAEModel, vectors: Float[Array, "b h w k"]) -> Float[Array, "b i j o"]:
        """The `outputs` numbers of the decoder for each pixel, fp32."""
        if model.decoder is None:
            raise ConfigError(f"half={self.half!r}: this codec has no decoder")
        return model.decoder(vectors.astype(self.dtype)).astype(jnp.float32)

    def to_logit_space(self, images: Array) -> Array:
        """Encoder input for images: kept away from the ends of (0, 1) for the logit (A.3)."""
        return 0.5 + 0.4 * images if self.pixels == "laplace" else images

    @typed
    def from_logit_space(self, y: Float[Array, "b i j o"]) -> Float[Array, "b i j 3"]:
        """The image of a decoder output: the inverse of `to_logit_space` at the mode of the density."""
        if self.pixels != "laplace":
            return y
        return jnp.clip((jax.nn.sigmoid(y[..., :3]) - 0.5) / 0.4, -1, 1)

    # -- training

    @property
    def compute(self) -> Compute:
        """Settings of the computation."""
        return Compute(self.dtype)

    def with_compute(self, compute: Compute) -> DVAE:
        """The same codec with other settings of the computation."""
        compute.check(self.capabilities)
        return dataclasses.replace(self, dtype=compute.dtype)

    def objectives(self) -> dict[str, Objective]:
        return {"codec": Objective(self.loss)}

    def loss(
        self, model: DVAEModel, batch: dict[str, Array], key: Array, step: Array | int = 0, train: bool = True
    ) -> LossOutput:
        """-ELBO with a relaxed sample (eq. 1). batch: `image` float (b, i, j, 3) in [-1, 1]."""
        logits = self.logits(model, batch["image"])
        gumbel = jax.random.gumbel(key, logits.shape)
        y = self.relaxed(model, logits, gumbel, self.temperature_at(step))
        distance, divergence = self.terms(batch["image"], y, logits)
        weight = self.kl * (jnp.clip(step / self.kl_warmup, 0, 1) if self.kl_warmup else 1.0)
        image = jnp.clip(self.from_logit_space(y), -1, 1)
        metrics = {self.pixels: distance, "kl": divergence, "psnr": losses.psnr(batch["image"], image)}
        return LossOutput(distance + weight * divergence, metrics | usage(jnp.argmax(logits, -1), self.codes))

    def temperature_at(self, step: Array | int) -> Array:
        """Temperature of the relaxation at a step."""
        if not self.anneal:
            return jnp.float32(self.temperature)
        schedule = optax.cosine_decay_schedule(self.temperature, self.anneal, self.last_temperature / self.temperature)
        return jnp.asarray(schedule(step))

    @typed
    def relaxed(
        self,
        model: DVAEModel,
        logits: Float[Array, "b h w v"],
        gumbel: Float[Array, "b h w v"],
        temperature: Array | float,
    ) -> Float[Array, "b i j o"]:
        """Decoder output for codebook rows mixed by softmax((logits + gumbel) / temperature)."""
        weights = jax.nn.softmax((logits + gumbel) / temperature)
        if self.straight_through:
            hard = jax.nn.one_hot(jnp.argmax(weights, -1), self.codes)
            weights = weights + jax.lax.stop_gradient(hard - weights)
        return self.decode_head(model, weights @ model.codebook.w[...])

    @typed
    def terms(
        self, images: Float[Array, "b i j 3"], y: Float[Array, "b i j o"], logits: Float[Array, "b h w v"]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Reconstruction loss of images given the decoder output, and KL(q || uniform) per image."""
        logq = jax.nn.log_softmax(logits)
        divergence = (jnp.exp(logq) * (logq + math.log(self.codes))).sum((1, 2, 3)).mean()
        if self.pixels == "laplace":
            return losses.logit_laplace(self.to_logit_space(images), y[..., :3], y[..., 3:]), divergence
        return losses.reconstruction(images, y, self.pixels), divergence


class DVAEModel(nnx.Module):
    """Encoder, codebook and decoder."""

    def __init__(self, config: DVAE, key: Array):
        keys = jax.random.split(key, 3)
        self.encoder = None if config.half == "decoder" else config.network.encoder(config.codes, keys[0])
        self.codebook = (
            None if config.half == "encoder" else Embedding(config.codes, config.network.code, keys[1], std=1.0)
        )
        self.decoder = None if config.half == "encoder" else config.network.decoder(config.outputs, keys[2])


# -- DALL-E


class Bottleneck(nnx.Module):
    """x + gain * four convolutions with relu, a quarter of the channels inside: (b, i, j, c) -> (b, i, j, f)."""

    def __init__(self, c: int, f: int, kernels: tuple[int, ...], gain: float, key: Array):
        keys = jax.random.split(key, 5)
        widths = (c, f // 4, f // 4, f // 4, f)
        self.convs = nnx.List([Conv(widths[n], widths[n + 1], keys[n], kernel=kernels[n]) for n in range(4)])
        self.shortcut = Conv(c, f, keys[4], kernel=1) if c != f else None
        self.gain = gain

    def __call__(self, x: Array) -> Array:
        y = x
        for conv in self.convs:
            y = conv(jax.nn.relu(y))
        return (x if self.shortcut is None else self.shortcut(x)) + self.gain * y


def groups(config: OpenAIdVAE, widths: tuple[int, ...], kernels: tuple[int, ...], key: Array) -> nnx.List:
    """Groups of blocks; `widths` holds the input width of the first group, then the output width of each."""
    keys = jax.random.split(key, (config.groups, config.blocks))
    block = lambda c, f, key: Bottleneck(c, f, kernels, config.gain, key)
    return nnx.List(
        [
            nnx.List([block(c if m == 0 else f, f, keys[n, m]) for m in range(config.blocks)])
            for n, (c, f) in enumerate(itertools.pairwise(widths))
        ]
    )


class DVAEEncoder(nnx.Module):
    """(b, i, j, 3) -> logits (b, i/factor, j/factor, v) fp32."""

    def __init__(self, config: OpenAIdVAE, codes: int, key: Array):
        keys, widths = jax.random.split(key, 3), config.widths()
        self.stem = Conv(3, widths[0], keys[0], kernel=7)
        self.groups = groups(config, (widths[0], *widths), (3, 3, 3, 1), keys[1])
        self.out = Conv(widths[-1], codes, keys[2], kernel=1)

    def __call__(self, x: Array) -> Array:
        x = self.stem(x)
        for n, group in enumerate(self.groups):
            if n:
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            for block in group:
                x = block(x)
        return self.out(jax.nn.relu(x).astype(jnp.float32))


class DVAEDecoder(nnx.Module):
    """Rows of the codebook (b, h, w, k) -> (b, h*factor, w*factor, outputs)."""

    def __init__(self, config: OpenAIdVAE, outputs: int, key: Array):
        keys, widths = jax.random.split(key), config.widths()[::-1]
        self.bias = param(jnp.zeros(config.code), None)
        self.groups = groups(config, (config.code, *widths), (1, 3, 3, 3), keys[0])
        self.out = Conv(widths[-1], outputs, keys[1], kernel=1)

    def __call__(self, z: Array) -> Array:
        x = z + self.bias[...].astype(z.dtype)
        for n, group in enumerate(self.groups):
            if n:
                x = repeat(x, "b i j c -> b (i p) (j q) c", p=2, q=2)
            for block in group:
                x = block(x)
        return self.out(jax.nn.relu(x))


# -- DALLE-pytorch


class Doubling(nnx.Module):
    """Transposed 4x4 convolution of stride 2: (b, i, j, c) -> (b, 2i, 2j, f)."""

    def __init__(self, c: int, f: int, key: Array):
        self.w = param(fan_in(key, (4, 4, c, f), 2.0), None, None, None, "conv")  # 2 x 2 taps contribute to each output
        self.b = param(jnp.zeros(f), "conv")

    def __call__(self, x: Array) -> Array:
        y = jax.lax.conv_general_dilated(
            x,
            self.w[...][::-1, ::-1].astype(x.dtype),
            (1, 1),
            ((2, 2), (2, 2)),
            lhs_dilation=(2, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.b[...].astype(x.dtype)


class Down(nnx.Module):
    """(b, i, j, 3) -> logits (b, i/factor, j/factor, v) fp32."""

    def __init__(self, config: DALLEPytorchVAE, codes: int, key: Array):
        keys, c = jax.random.split(key, config.layers + config.blocks + 1), config.channels
        self.layers = nnx.List(
            [
                Conv(c if n else 3, c, keys[n], kernel=4, stride=2, padding=((1, 1), (1, 1)))
                for n in range(config.layers)
            ]
        )
        self.blocks = nnx.List([Residual(c, keys[config.layers + n], kernels=(3, 3, 1)) for n in range(config.blocks)])
        self.out = Conv(c, codes, keys[-1], kernel=1)

    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        for block in self.blocks:
            x = block(x)
        return self.out(x.astype(jnp.float32))


class Up(nnx.Module):
    """Rows of the codebook (b, h, w, k) -> (b, h*factor, w*factor, outputs)."""

    def __init__(self, config: DALLEPytorchVAE, outputs: int, key: Array):
        keys, c = jax.random.split(key, config.layers + config.blocks + 2), config.channels
        self.stem = Conv(config.code, c, keys[-2], kernel=1) if config.blocks else None
        first = c if config.blocks else config.code
        self.blocks = nnx.List([Residual(c, keys[config.layers + n], kernels=(3, 3, 1)) for n in range(config.blocks)])
        self.layers = nnx.List([Doubling(c if n else first, c, keys[n]) for n in range(config.layers)])
        self.out = Conv(c, outputs, keys[-1], kernel=1)

    def __call__(self, z: Array) -> Array:
        x = z if self.stem is None else self.stem(z)
        for block in self.blocks:
            x = block(x)
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return self.out(x)
