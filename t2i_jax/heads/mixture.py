"""A mixture of Gaussians as a head (Tschannen et al. 2023, GIVT, arXiv:2312.02116)."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from t2i_jax.core.arrays import Float, typed
from t2i_jax.core.fields import Positive, Size
from t2i_jax.heads.draws import PositionKeys
from t2i_jax.heads.head import VectorHead
from t2i_jax.nn.layers import Linear
from t2i_jax.noise.schedule import expand_like
from t2i_jax.sampling.options import ARSampler
from t2i_jax.sampling.tokens import draw


class MixtureParams(NamedTuple):
    """Parameters of a mixture, fp32."""

    logits: Float[Array, "*b a"]
    """log-weights"""
    mean: Float[Array, "*b a k"]
    log_std: Float[Array, "*b a k"]
    """log standard deviations"""

    @typed
    def log_density(self, x: Float[Array, "*b k"]) -> Float[Array, "..."]:
        """log p of x."""
        gap = (x[..., None, :] - self.mean) * jnp.exp(-self.log_std)
        each = -0.5 * gap**2 - self.log_std - 0.5 * math.log(2 * math.pi)
        return jax.nn.logsumexp(jax.nn.log_softmax(self.logits) + each.sum(-1), -1)

    def near(self, other: MixtureParams) -> tuple[Array, Array, Array]:
        """The mixture near each component N of `other`: its log-density at the mean of N (..., a), and mean and
        precision (..., a, k) of a Gaussian that approximates it there.

        The Gaussian has the moments of the components, each weighted by its responsibility exp E_N[log w_b N_b(x)].
        """
        law = MixtureParams(self.logits[..., None, :], self.mean[..., None, :, :], self.log_std[..., None, :, :])
        variance, mean = jnp.exp(2 * law.log_std), other.mean[..., None, :]
        gap = (mean - law.mean) ** 2 + jnp.exp(2 * other.log_std[..., None, :])
        expected = jnp.sum(-0.5 * gap / variance - law.log_std, -1)
        share = jax.nn.softmax(jax.nn.log_softmax(law.logits) + expected, -1)[..., None]
        centre = jnp.sum(share * law.mean, -2, keepdims=True)
        spread = jnp.sum(share * (variance + (law.mean - centre) ** 2), -2)
        return law.log_density(other.mean), centre[..., 0, :], 1 / spread


def guided(law: MixtureParams, null: MixtureParams, scale: Array) -> MixtureParams:
    """A mixture approximating p^s p'^(1 - s), normalised, for two mixtures p and p'; scale s: a scalar or (b,).

    It is p (p / p')^(s - 1): each component of p is multiplied by the ratio, approximated as a ratio of Gaussians near
    the component (`MixtureParams.near`). This is exact for one component each, for components that do not overlap,
    whichever components of p' they are close to, and for equal mixtures, which guidance leaves unchanged. For
    overlapping components it is an approximation, off by a few per cent of the mass where p' is the wider mixture.

    Where p' is so narrow that a precision would fall below 1/100 of the conditional one (at 0 the product has no
    integral), guidance moves the mean in that dimension and keeps the standard deviation.
    """
    more = expand_like(scale - 1, law.mean)
    precision = jnp.exp(-2 * law.log_std)
    (here, mean, sharp), (there, null_mean, null_sharp) = law.near(law), null.near(law)
    proper = precision + more * (sharp - null_sharp) > 0.01 * precision
    sharp, null_sharp = jnp.where(proper, sharp, precision), jnp.where(proper, null_sharp, precision)
    total = precision + more * (sharp - null_sharp)
    shift = more * (sharp * (mean - law.mean) - null_sharp * (null_mean - law.mean))
    mass = 0.5 * jnp.sum(
        shift**2 / total + jnp.log(precision / total), -1
    )  # log of the integral of the shifted component
    logits = jax.nn.log_softmax(law.logits) + expand_like(scale - 1, here) * (here - there) + mass
    return MixtureParams(logits, law.mean + shift / total, -0.5 * jnp.log(total))


@dataclasses.dataclass(frozen=True)
class MixtureHead(VectorHead):
    """p(x | z) = sum_a w_a N(mu_a, sigma_a), with diagonal sigma; all parameters are a linear function of z."""

    components: Size = 16
    smallest: Positive = 1e-3
    """lower bound of standard deviations"""

    def init(self, key: Array, width: int) -> Linear:
        return Linear(width, self.components * (1 + 2 * self.dim), key, axes=("embed", None))

    def law(self, module: Linear, z: Array) -> MixtureParams:
        y = rearrange(module(z).astype(jnp.float32), "... (a k) -> ... a k", a=self.components)
        mean, raw = jnp.split(y[..., 1:], 2, -1)
        # Spread the initial means of the components: equal ones would stay equal.
        apart = jnp.linspace(-1, 1, self.components)[:, None] if self.components > 1 else 0.0
        return MixtureParams(y[..., 0], mean + apart, jnp.log(jax.nn.softplus(raw) + self.smallest))

    @typed
    def loss(
        self, module: Linear, z: Float[Array, "b t d"], x: Float[Array, "b t k"], key: Array, train: bool = True
    ) -> Float[Array, "b t"]:
        """-log p(x | z) in nats per dimension of a code."""
        return -self.law(module, z).log_density(x.astype(jnp.float32)) / self.dim

    @typed
    def sample(
        self,
        module: Linear,
        z: Float[Array, "b m d"],
        null: Float[Array, "b m d"] | None,
        draws: PositionKeys,
        guidance: Array,
        options: ARSampler,
    ) -> tuple[Float[Array, "b m k"], Float[Array, "b m"]]:
        """Codes fp32 and their log-density; the temperature scales standard deviations.

        With guidance it samples from `guided`, approximately p^s p'^(1 - s) with the unconditional p'.
        """
        law = self.law(module, z)
        if null is not None:
            law = guided(law, self.law(module, null), guidance)
        which = draw(jax.nn.softmax(law.logits), draws.uniform(0))[..., None, None]
        mean, log_std = (jnp.take_along_axis(y, which, -2)[..., 0, :] for y in (law.mean, law.log_std))
        scale = jnp.broadcast_to(options.temperature, mean.shape[:1])[:, None, None]
        x = mean + scale * jnp.exp(log_std) * draws.normal(1, self.dim)
        return x, law.log_density(x)
