"""Exact denoisers of Gaussian pictures, in the place of a network: what a sampler makes of them is its own error."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.networks.dit import DiT
from t2i_jax.noise.gaussian import join
from t2i_jax.noise.processes import EDM, Discrete, Flow, Process


@partial(jax.tree_util.register_dataclass, data_fields=["mean", "covariance"], meta_fields=["process", "predicts"])
@dataclasses.dataclass(frozen=True)
class Exact:
    """Predicts what the best network would, of pictures (1, n, 1) whose n numbers are normal."""

    process: Process
    predicts: str
    mean: Array
    covariance: Array

    def read(self, batch, dropped):
        return None

    def __call__(self, x: Array, told: Array, context, key=None) -> Array:
        alpha, sigma = self.process.alpha_sigma(time_of(self.process, told), x)
        mean, covariance = self.mean * self.process.scale, self.covariance * self.process.scale**2
        a, s = alpha.reshape(-1)[0], sigma.reshape(-1)[0]
        gain = a * covariance @ jnp.linalg.inv(a**2 * covariance + s**2 * jnp.eye(len(mean)))
        y = x[:, 0, :, 0]
        x0 = mean + (y - a * mean) @ gain.T
        x0 = x0[:, None, :, None]
        return join(self.predicts, x0, (x - alpha * x0) / sigma, alpha, sigma)


def time_of(process: Process, told: Array) -> Array:
    """The time of a process, as `Process.at` takes it, of what its network is told."""
    if isinstance(process, EDM):
        return told / 250
    if isinstance(process, Flow):
        return 1 - told if process.toward else told / 1000
    return told * (process.steps / 1000) if process.rescale_times else told * 1.0


def family_of(process: Process, count: int, **fields) -> Diffusion:
    """A `Diffusion` along `process` for pictures of `count` numbers in a row."""
    noisy = isinstance(process, Flow) or (isinstance(process, Discrete) and process.zero_terminal_snr)
    predicts = "velocity" if isinstance(process, Flow) else "v" if noisy or isinstance(process, EDM) else "eps"
    network = DiT((1, count), channels=1, patch=1, learn_variance=False, condition=ClassEmbedder(0))
    return Diffusion(network, process, predicts, condition_dropout=0.0, **fields)


def exact(family: Diffusion, mean, covariance) -> Exact:
    f = lambda x: jnp.asarray(np.asarray(x), jnp.float32)
    return Exact(family.process, family.predicts, f(mean), f(covariance))
