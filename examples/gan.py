"""A family: a conditional GAN that makes an image in one step (Goodfellow et al. 2014).

The generator and the discriminator are objectives with parameters of their own. The losses are hinges (Lim & Ye 2017,
arXiv:1705.02894), and the discriminator compares image and condition by a product (Miyato & Koyama 2018,
arXiv:1802.05637, eq. 3).

    from examples.gan import GAN
    experiment = Experiment(GAN((32, 32), condition=ClassEmbedder(10)), data)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.conditions import Batch, Condition
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import BaseFamily
from t2i_jax.core.fields import FREE, Grid, NotNegative, Range, Size
from t2i_jax.core.specs import WEIGHT, BatchSpec, CodeSpec, SampleSpec
from t2i_jax.core.types import Capabilities, Compute, LossOutput, Objective
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.nn.conv import Upsample
from t2i_jax.nn.layers import Conv, LayerNorm, Linear
from t2i_jax.nn.losses import row_mean
from t2i_jax.sampling.options import Options
from t2i_jax.sampling.progress import Progress, report


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GANSampler(Options):
    """Options of a GAN's sampler."""

    temperature: Annotated[float | Array, Range(low=0)] = 1.0
    """standard deviation of the noise; below 1 images are more alike and more typical"""


@dataclasses.dataclass(frozen=True)
class GAN(BaseFamily[GANSampler]):
    """A convolutional generator from noise and a condition, a discriminator, and their losses."""

    size: Grid = (32, 32)
    """rows and columns of pixels, multiples of 4"""
    width: Size = 64
    noise: Size = 64
    """size of the noise vector"""
    penalty: NotNegative = 1.0
    """weight of the squared gradient of D at real images, with which the game converges (Mescheder et al. 2018, R1)"""
    condition: Condition = ClassEmbedder(10)
    compute: Compute = Compute()
    sampling: Annotated[GANSampler, FREE] = GANSampler()

    def __post_init__(self):
        super().__post_init__()
        if self.size[0] % 4 or self.size[1] % 4:
            raise ConfigError(f"GAN.size {self.size}: multiples of 4")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(family=True)

    def sample_spec(self) -> SampleSpec:
        return SampleSpec(self.size, CodeSpec("float32", (3,)))

    def condition_spec(self) -> BatchSpec:
        return self.condition.batch_spec()

    def batch_spec(self) -> BatchSpec:
        return {"image": self.sample_spec().field, **self.condition_spec(), "weight": WEIGHT}

    def init(self, key: Array) -> GANNetwork:
        return GANNetwork(self, key)

    def objectives(self) -> dict[str, Objective[GANNetwork, Batch]]:
        return {
            "generator": Objective(self.generator_loss, ("condition", "norm", "generator")),
            "discriminator": Objective(self.discriminator_loss, ("discriminator",)),
        }

    def generator_loss(self, model: GANNetwork, batch: Batch, key: Array, step: Array, train: bool) -> LossOutput:
        """-mean D(G(z, c), c)."""
        c = model.embed(batch)
        fake = model.generator(jax.random.normal(key, (len(c), self.noise)), c)
        loss = row_mean(-model.discriminator(fake, c), batch)
        return LossOutput(loss, {"loss": loss})

    def discriminator_loss(self, model: GANNetwork, batch: Batch, key: Array, step: Array, train: bool) -> LossOutput:
        """mean max(0, 1 - D(x, c)) + max(0, 1 + D(G(z, c), c)) + penalty / 2 |dD/dx|^2."""
        c = model.embed(batch)
        fake = model.generator(jax.random.normal(key, (len(c), self.noise)), c)
        fake = model.discriminator(fake, c)
        real, back = jax.vjp(lambda x: model.discriminator(x, c), batch["image"])
        slope = jnp.sum(back(jnp.ones_like(real))[0] ** 2, (1, 2, 3))
        loss = row_mean(jax.nn.relu(1 - real) + jax.nn.relu(1 + fake) + self.penalty / 2 * slope, batch)
        return LossOutput(loss, {"loss": loss, "real": row_mean(real, batch), "fake": row_mean(fake, batch)})

    def sample(
        self,
        model: GANNetwork,
        condition: Batch,
        keys: Array,
        options: GANSampler | None = None,
        *,
        guided: bool | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Images float (b, i, j, 3) in [-1, 1], one for each row of the condition and each key of `keys` (b,)."""
        return _sample(self, model, condition, keys, (options or self.sampling).arrays(), progress)


@partial(jax.jit, static_argnames="config")
def _sample(
    config: GAN, model: GANNetwork, condition: Batch, keys: Array, options: GANSampler, progress: Progress | None
) -> Array:
    z = jax.vmap(lambda key: jax.random.normal(key, (config.noise,)))(keys)
    scale = jnp.broadcast_to(jnp.asarray(options.temperature), (len(keys),))
    images = model.generator(z * scale[:, None], model.embed(condition))
    report(progress, jnp.int32(1), 1, images)
    return images


class Generator(nnx.Module):
    """Noise z (b, k) and a condition c (b, d) -> images (b, i, j, 3) in [-1, 1]."""

    def __init__(self, config: GAN, key: Array):
        keys, (rows, columns) = jax.random.split(key, 5), config.size
        self.grid = rows // 4, columns // 4
        self.into = Linear(config.noise + config.width, self.grid[0] * self.grid[1] * config.width, keys[0], std=None)
        self.first, self.second = Upsample(config.width, keys[1]), Upsample(config.width, keys[2])
        self.out = Conv(config.width, 3, keys[3])

    def __call__(self, z: Array, c: Array) -> Array:
        y = self.into(jnp.concatenate([z, c], -1))
        y = rearrange(y, "b (i j d) -> b i j d", i=self.grid[0], j=self.grid[1])
        y = self.second(jax.nn.leaky_relu(self.first(jax.nn.leaky_relu(y, 0.2)), 0.2))
        return jnp.tanh(self.out(jax.nn.leaky_relu(y, 0.2)))


class Discriminator(nnx.Module):
    """Images (b, i, j, 3) and a condition c (b, d) -> logits (b,), high for real."""

    def __init__(self, config: GAN, key: Array):
        keys = jax.random.split(key, 4)
        self.first = Conv(3, config.width, keys[0], kernel=4, stride=2)
        self.second = Conv(config.width, config.width, keys[1], kernel=4, stride=2)
        self.out = Linear(config.width, 1, keys[2], std=None)
        self.project = Linear(config.width, config.width, keys[3], std=None)

    def __call__(self, x: Array, c: Array) -> Array:
        y = jax.nn.leaky_relu(self.second(jax.nn.leaky_relu(self.first(x), 0.2)), 0.2).mean((1, 2))
        return self.out(y)[:, 0] + jnp.einsum("bd,bd->b", y, self.project(c))


class GANNetwork(nnx.Module):
    """The parameters of a `GAN`."""

    def __init__(self, config: GAN, key: Array):
        keys = jax.random.split(key, 3)
        self.condition: Callable[..., Any] = config.condition.init(keys[0], config.width)
        self.norm = LayerNorm(config.width)
        self.generator, self.discriminator = Generator(config, keys[1]), Discriminator(config, keys[2])

    def embed(self, batch: Batch) -> Array:
        """The mean (b, d) of the condition's tokens, normalised."""
        dropped = jnp.zeros(len(next(iter(batch.values()))), bool)
        tokens, valid = self.condition(batch, dropped, jnp.float32)
        return self.norm(jnp.sum(tokens * valid[..., None], 1) / jnp.maximum(valid.sum(1, keepdims=True), 1))
