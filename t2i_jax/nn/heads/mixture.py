"""A mixture of Gaussians as a head (Tschannen et al. 2023, GIVT, arXiv:2312.02116)."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from t2i_jax.nn.draw import Sampling, draw
from t2i_jax.nn.heads.draws import Draws
from t2i_jax.nn.layers import Linear
from t2i_jax.noise.guidance import guide


class Law(NamedTuple):
    """Parameters of a mixture, fp32: log-weights (..., a), means and log standard deviations (..., a, k)."""

    logits: Array
    mean: Array
    log_std: Array

    def log_density(self, x: Array) -> Array:
        """log p of x (..., k): (...)."""
        gap = (x[..., None, :] - self.mean) * jnp.exp(-self.log_std)
        each = -0.5 * gap**2 - self.log_std - 0.5 * math.log(2 * math.pi)
        return jax.nn.logsumexp(jax.nn.log_softmax(self.logits) + each.sum(-1), -1)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """p(x | z) = sum_a w_a N(mu_a, sigma_a), with diagonal sigma; all of it a linear function of z."""

    dim: int = 16
    """numbers k of a code"""
    components: int = 16
    smallest: float = 1e-3
    """no standard deviation is below this"""

    def init(self, key: Array, width: int) -> Linear:
        return Linear(width, self.components * (1 + 2 * self.dim), key, axes=("embed", None))

    def entrance(self, key: Array, width: int) -> Linear:
        return Linear(self.dim, width, key, std=None, axes=(None, "embed"))

    def empty(self, b: int, t: int) -> Array:
        return jnp.zeros((b, t, self.dim))

    def law(self, module: Linear, z: Array) -> Law:
        y = rearrange(module(z).astype(jnp.float32), "... (a k) -> ... a k", a=self.components)
        mean, raw = jnp.split(y[..., 1:], 2, -1)
        # Components begin a standard deviation apart from each other, or they would stay alike.
        apart = jnp.linspace(-1, 1, self.components)[:, None] if self.components > 1 else 0.0
        return Law(y[..., 0], mean + apart, jnp.log(jax.nn.softplus(raw) + self.smallest))

    def loss(self, module: Linear, z: Array, x: Array, key: Array) -> Array:
        """-log p(x | z) in nats per number of a code: (b, t)."""
        return -self.law(module, z).log_density(x.astype(jnp.float32)) / self.dim

    def sample(
        self, module: Linear, z: Array, null: Array | None, draws: Draws, guidance: Array, options: Sampling
    ) -> tuple[Array, Array]:
        """Codes (b, m, k) fp32 and their log-density; the temperature scales standard deviations.

        Guidance moves log-weights, means and log standard deviations of each component away from the unconditional
        ones: exact for a mixture of one where the deviations agree, and an approximation beyond.
        """
        law = self.law(module, z)
        if null is not None:
            law = Law(*(guide(a, b, guidance) for a, b in zip(law, self.law(module, null), strict=True)))
        which = draw(jax.nn.softmax(law.logits), draws.uniform(0))[..., None, None]
        mean, log_std = (jnp.take_along_axis(y, which, -2)[..., 0, :] for y in (law.mean, law.log_std))
        scale = jnp.broadcast_to(options.temperature, mean.shape[:1])[:, None, None]
        x = mean + scale * jnp.exp(log_std) * draws.normal(1, self.dim)
        return x, law.log_density(x)
