"""Gaussian noising, x_t = alpha_t x_0 + sigma_t eps: prediction targets, reverse steps, and losses.

Ho et al. (2020, DDPM), Nichol & Dhariwal (2021, improved DDPM), Song et al. (2021, DDIM). Times t are int (b,) or a
scalar, indices into a `Schedule`; x is (b, ...).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from t2i_jax.core.arrays import Float, Int, typed
from t2i_jax.core.noise import Predicts
from t2i_jax.noise.schedule import Schedule, expand_like, rows

Variance = Literal["learned_range", "learned", "fixed_small", "fixed_large"]

# -- predictions of a network, and the x_0 and eps that they imply


def split(kind: Predicts, value: Array, x: Array, alpha: Array | float, sigma: Array | float) -> tuple[Array, Array]:
    """(x_0, eps) from a prediction at x = alpha x_0 + sigma eps.

    v = alpha eps - sigma x_0 (Salimans & Ho 2022); velocity = eps - x_0 (Liu et al. 2023); drift = x_0 - eps, its
    negative, toward the image (Ma et al. 2024, SiT); score = -eps / sigma.
    alpha, sigma: shaped to multiply x. Where alpha is 0, eps and score do not determine x_0; where sigma is 0, x0 does
    not determine eps.
    """
    if kind == "eps":
        return (x - sigma * value) / alpha, value
    if kind == "x0":
        return value, (x - alpha * value) / sigma
    if kind == "v":
        power = alpha**2 + sigma**2
        return (alpha * x - sigma * value) / power, (sigma * x + alpha * value) / power
    if kind in ("velocity", "drift"):
        value = value if kind == "velocity" else -value
        return (x - sigma * value) / (alpha + sigma), (x + alpha * value) / (alpha + sigma)
    if kind == "score":
        return (x + sigma**2 * value) / alpha, -sigma * value
    raise ValueError(f"prediction {kind!r} is not one of {', '.join(get_args(Predicts))}")


def join(kind: Predicts, x0: Array, eps: Array, alpha: Array | float, sigma: Array | float) -> Array:
    """The target of a network that predicts `kind`; with `split` it converts between all kinds."""
    if kind not in get_args(Predicts):
        raise ValueError(f"prediction {kind!r} is not one of {', '.join(get_args(Predicts))}")
    return {
        "eps": lambda: eps,
        "x0": lambda: x0,
        "v": lambda: alpha * eps - sigma * x0,
        "velocity": lambda: eps - x0,
        "drift": lambda: x0 - eps,
        "score": lambda: -eps / sigma,
    }[kind]()


def loss_weight(
    name: str, kind: Predicts, alpha: Array | float, sigma: Array | float, gamma: float = 5.0
) -> Array | float:
    """The weight of the squared error of a prediction.

    `uniform`: 1 on the prediction itself. The others are weights of the error in x_0, converted to the prediction:
    `snr`, `truncated_snr` max(snr, 1) (Salimans & Ho 2022), `min_snr` min(snr, gamma) (Hang et al. 2023).
    """
    if name == "uniform":
        return 1.0
    alpha, sigma = jnp.asarray(alpha), jnp.asarray(sigma)
    snr = alpha**2 / sigma**2
    weights = {
        "snr": lambda: snr,
        "truncated_snr": lambda: jnp.maximum(snr, 1),
        "min_snr": lambda: jnp.minimum(snr, gamma),
    }
    if name not in weights:
        raise ValueError(f"loss weight {name!r} is not one of uniform, {', '.join(weights)}")
    # Squared error of the prediction for a unit error in x_0.
    squared = {
        "eps": snr,
        "x0": 1.0,
        "v": (alpha**2 / sigma + sigma) ** 2,
        "velocity": (alpha / sigma + 1) ** 2,
        "drift": (alpha / sigma + 1) ** 2,
        "score": snr / sigma**2,
    }[kind]
    return weights[name]() / squared


# -- one step forward, one step back


class GaussianParams(NamedTuple):
    """A diagonal Gaussian; `x0` is the predicted image it was computed from, if any."""

    mean: Array
    log_variance: Array
    x0: Array

    @property
    def variance(self) -> Array:
        return jnp.exp(self.log_variance)


@typed
def q_sample(
    schedule: Schedule, x0: Float[Array, " b *x"], t: Int[Array, "*b"], eps: Float[Array, " b *x"]
) -> Float[Array, " b *x"]:
    """x_t = alpha_t x_0 + sigma_t eps (Ho et al. 2020, eq. 4)."""
    alpha, sigma = schedule.at(t, x0)
    return alpha * x0 + sigma * eps


@typed
def posterior(
    schedule: Schedule, x0: Float[Array, " b *x"], x: Float[Array, " b *x"], t: Int[Array, "*b"]
) -> GaussianParams:
    """q(x_{t-1} | x_t = x, x_0) (Ho et al. 2020, eqs. 6 and 7); its log-variance at t = 0 is that of t = 1."""
    mean = rows(schedule.posterior_x0, t, x) * x0 + rows(schedule.posterior_x_t, t, x) * x
    return GaussianParams(mean, jnp.broadcast_to(rows(schedule.posterior_log_variance, t, x), x.shape), x0)


@typed
def learned_range(schedule: Schedule, v: Float[Array, " b *x"], t: Int[Array, "*b"]) -> Float[Array, " b *x"]:
    """Log-variance between those of the posterior, v = -1, and of beta_t, v = 1 (Nichol & Dhariwal 2021, eq. 15)."""
    low, high = rows(schedule.posterior_log_variance, t, v), rows(schedule.log_betas, t, v)
    share = (v + 1) / 2
    return share * high + (1 - share) * low


@typed
def log_variance(
    schedule: Schedule, kind: Variance, v: Float[Array, " b *x"] | None, x: Float[Array, " b *x"], t: Int[Array, "*b"]
) -> Float[Array, " b *x"]:
    """Log-variance of the reverse step: learned, from v, or fixed to beta~_t (small) or beta_t
    (large)."""
    if kind == "fixed_small":
        return jnp.broadcast_to(rows(schedule.posterior_log_variance, t, x), x.shape)
    if kind == "fixed_large":  # beta_0 would destroy the image: step 0 takes the posterior's variance
        first = rows(schedule.posterior_log_variance, jnp.zeros_like(t), x)
        large = rows(schedule.log_betas, t, x)
        return jnp.broadcast_to(jnp.where(expand_like(t, x) == 0, first, large), x.shape)
    if v is None:
        raise ValueError(f"variance {kind!r} is one that the network predicts, and this one predicts none")
    return v if kind == "learned" else learned_range(schedule, v, t)


@typed
def p_mean_variance(
    schedule: Schedule,
    prediction: Float[Array, " b *x"],
    x: Float[Array, " b *x"],
    t: Int[Array, "*b"],
    *,
    v: Float[Array, " b *x"] | None = None,
    predicts: Predicts = "eps",
    variance: Variance = "learned_range",
    clip: bool | Array = False,
    clip_range: float = 1.0,
) -> GaussianParams:
    """The network's p(x_{t-1} | x_t = x) (Ho et al. 2020, eq. 11); `x0` is the predicted image.

    prediction, v: the network's prediction and its variance output. clip: clip the predicted image to
    [-clip_range, clip_range].
    """
    x0, _ = split(predicts, prediction, x, *schedule.at(t, x))
    x0 = clipped(x0, clip, clip_range)
    return posterior(schedule, x0, x, t)._replace(log_variance=log_variance(schedule, variance, v, x, t))


@typed
def clipped(x0: Float[Array, " b *x"], clip: bool | Array, bound: float = 1.0) -> Float[Array, " b *x"]:
    """x0, clipped to [-bound, bound] where `clip` (a scalar or (b,)) is True."""
    return jnp.where(expand_like(clip, x0), jnp.clip(x0, -bound, bound), x0)


@typed
def thresholded(
    x0: Float[Array, " b *x"], quantile: Array | float, most: Array | float = math.inf
) -> Float[Array, " b *x"]:
    """clip(x0, -s, s) / s for s the quantile of |x0| of an image, at least 1 and at most `most`: dynamic thresholding
    (Saharia et al. 2022, Imagen, 2.3).

    quantile, most: scalars or (b,). Where the quantile is 0, x0 is returned as it is; `most` 1 is clipping.
    """

    def divided() -> Array:
        sizes = jnp.sort(jnp.abs(x0).reshape(len(x0), -1), 1)
        last = sizes.shape[1] - 1
        place = jnp.broadcast_to(quantile, len(x0)) * last
        low = jnp.clip(place.astype(jnp.int32), 0, last)
        below, above = (jnp.take_along_axis(sizes, n[:, None], 1)[:, 0] for n in (low, jnp.minimum(low + 1, last)))
        s = expand_like(jnp.clip(below + (place - low) * (above - below), 1, most), x0)
        return jnp.where(expand_like(jnp.asarray(quantile) > 0, x0), jnp.clip(x0, -s, s) / s, x0)

    return jax.lax.cond(jnp.any(jnp.asarray(quantile) > 0), divided, lambda: x0)  # to sort takes time


@typed
def ddpm_step(
    p: GaussianParams, t: Int[Array, "*b"], noise: Float[Array, " b *x"], temperature: Array | float = 1.0
) -> Float[Array, " b *x"]:
    """A sample from p(x_{t-1} | x_t); its mean at t = 0 (Ho et al. 2020, algorithm 2)."""
    scale = jnp.where(t == 0, 0.0, jnp.asarray(temperature))
    return p.mean + expand_like(scale, p.mean) * jnp.exp(p.log_variance / 2) * noise


# -- the variational bound


def normal_kl(p: GaussianParams, q: GaussianParams) -> Array:
    """Elementwise KL(p || q), in nats."""
    ratio = jnp.exp(p.log_variance - q.log_variance)
    gap = (p.mean - q.mean) ** 2 * jnp.exp(-q.log_variance)
    return 0.5 * (q.log_variance - p.log_variance - 1 + ratio + gap)


@jax.custom_jvp
def exact_tanh(x: Array) -> Array:
    """tanh, accurate to the last bit near 1 and -1, where it is differenced; `jnp.tanh` is off by several bits
    there."""
    y = jnp.exp(-2 * jnp.abs(x))
    return jnp.sign(x) * (1 - 2 * y / (1 + y))


@exact_tanh.defjvp
def _exact_tanh_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = exact_tanh(*primals)
    return y, (1 - y * y) * tangents[0]


@typed
def discretised_log_likelihood(x: Float[Array, " b *x"], p: GaussianParams) -> Float[Array, " b *x"]:
    """log p of pixels x in [-1, 1], each an interval of width 2/255 (Ho et al. 2020, eq. 13), in nats."""
    inverse = jnp.exp(-p.log_variance / 2)
    # All published networks approximate the error function by this tanh.
    cdf = lambda z: 0.5 * (1 + exact_tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    above, below = cdf(inverse * (x - p.mean + 1 / 255)), cdf(inverse * (x - p.mean - 1 / 255))
    log = lambda mass: jnp.log(jnp.maximum(mass, 1e-12))
    return jnp.where(x < -0.999, log(above), jnp.where(x > 0.999, log(1 - below), log(above - below)))


@typed
def vb_terms(
    schedule: Schedule, x0: Float[Array, " b *x"], x: Float[Array, " b *x"], t: Int[Array, "*b"], p: GaussianParams
) -> Float[Array, " b"]:
    """The term of the variational bound at t, in bits per dimension (Nichol & Dhariwal 2021, eqs. 4 to 6)."""
    kl = normal_kl(posterior(schedule, x0, x, t), p)
    mean = lambda y: y.reshape(y.shape[0], -1).mean(-1) / math.log(2)
    return jnp.where(t == 0, mean(-discretised_log_likelihood(x0, p)), mean(kl))
