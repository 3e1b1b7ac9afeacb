"""Gaussian noising, x_t = alpha_t x_0 + sigma_t eps, in discrete steps; what a network may predict of it; its losses.

Ho et al. (2020, DDPM), Nichol & Dhariwal (2021, improved DDPM), Song et al. (2021, DDIM). Tables are made in float64 on
the host, where 1 - abar keeps its digits, and gathered in fp32. Times t count from 0, the least noisy; arrays of times
are int (b,) or a scalar, and x is (b, ...).
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Predicts = Literal["eps", "x0", "v", "velocity", "drift", "score"]
Variance = Literal["learned_range", "learned", "fixed_small", "fixed_large"]

CAP = 0.999
"""No step adds more noise than this (Nichol & Dhariwal 2021, section 3.2)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The cumulative products abar_t of a noising process, and everything that follows from them.

    Arrays are NumPy float64 (T,), those of `strided` traced fp32. alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t).
    """

    log_abar: Any
    """log of abar_t: the signal's share of the power after step t"""
    timestep_map: Any
    """int (T,): the step of the process the network was trained on that each step here is"""
    original: int
    """steps of that process"""

    @classmethod
    def of(cls, betas: Any) -> Schedule:
        """The process whose steps add noise of variance `betas` (T,), each in (0, 1].

        Errors: ValueError where one is not.
        """
        betas = np.asarray(betas, np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(f"betas {betas.shape}: one row of numbers above 0 and up to 1 is wanted")
        with np.errstate(divide="ignore"):
            return cls(np.cumsum(np.log1p(-betas)), np.arange(len(betas)), len(betas))

    @classmethod
    def named(cls, name: str, steps: int = 1000, *, zero_terminal_snr: bool = False) -> Schedule:
        """`linear` (Ho et al. 2020), `cosine` (Nichol & Dhariwal 2021, eq. 17; also `squaredcos_cap_v2`),
        `scaled_linear` (Rombach et al. 2022), `sigmoid`, `quadratic`, `constant`, `jsd`.

        zero_terminal_snr: shift and scale alpha so that nothing of the picture is left at the last step (Lin et al.
        2024, algorithm 1). Errors: ValueError for an unknown name, or for so few steps that a beta passes 1.
        """
        if name not in NAMES:
            raise ValueError(f"noise schedule {name!r} is not one of {', '.join(NAMES)}")
        schedule = cls.of(NAMES[name](steps))
        return schedule.with_zero_terminal_snr() if zero_terminal_snr else schedule

    def with_zero_terminal_snr(self) -> Schedule:
        """The same with alpha_T = 0 and alpha_0 as it was (Lin et al. 2024, algorithm 1)."""
        alpha = np.exp(self.log_abar / 2)
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        with np.errstate(divide="ignore"):
            return dataclasses.replace(self, log_abar=2 * np.log(alpha))

    def respaced(self, spacing: str) -> Schedule:
        """A process of fewer steps that passes through the same noise: `"100"`, `"10,6,4"`, `"ddim25"`, `"fast27"`."""
        kept = np.asarray(respacing(len(self.log_abar), spacing))
        return dataclasses.replace(self, log_abar=self.log_abar[kept], timestep_map=self.timestep_map[kept])

    def strided(self, steps: Array | int, bound: int, stride: Array | bool = False) -> Schedule:
        """As `respaced(str(steps))` with a traced number of steps, 1 to `bound`, in tables (bound,).

        stride: as `respaced(f"ddim{steps}")`, every k-th step from the first; traced. What stands behind the first
        `steps` entries repeats the last of them.
        """
        last = len(self) - 1
        place = jnp.minimum(jnp.arange(bound), steps - 1)
        even = jnp.round(place * (last / jnp.maximum(steps - 1, 1))).astype(jnp.int32)
        wide = -(-(last + 1) // steps)
        wide = jnp.where((steps - 1) * wide <= last, wide, (last + 1) // steps)
        index = jnp.clip(jnp.where(stride, place * wide, even), 0, last)
        gather = lambda table, dtype: jnp.asarray(table, dtype)[index]
        return Schedule(gather(self.log_abar, jnp.float32), gather(self.timestep_map, jnp.int32), self.original)

    def __len__(self) -> int:
        return self.log_abar.shape[0]

    @property
    def _xp(self) -> Any:
        return np if isinstance(self.log_abar, np.ndarray) else jnp

    @cached_property
    def alphas_cumprod(self) -> Any:
        return self._xp.exp(self.log_abar)

    @cached_property
    def alphas_cumprod_prev(self) -> Any:
        """abar_{t-1}, 1 before the first step."""
        return self._xp.exp(self._log_prev)

    @cached_property
    def alphas_cumprod_next(self) -> Any:
        """abar_{t+1}, 0 after the last step."""
        return self._xp.append(self.alphas_cumprod[1:], 0.0)

    @cached_property
    def _log_prev(self) -> Any:
        return self._xp.append(self._xp.zeros(1, self.log_abar.dtype), self.log_abar[:-1])

    @cached_property
    def betas(self) -> Any:
        """Variance of the noise that step t adds, 1 - abar_t / abar_{t-1}."""
        return -self._xp.expm1(self.log_abar - self._log_prev)

    @cached_property
    def log_betas(self) -> Any:
        return self._xp.log(self.betas)

    @cached_property
    def alpha(self) -> Any:
        return self._xp.exp(self.log_abar / 2)

    @cached_property
    def sigma(self) -> Any:
        return self._xp.sqrt(-self._xp.expm1(self.log_abar))

    @cached_property
    def snr(self) -> Any:
        """abar_t / (1 - abar_t)."""
        return self.alphas_cumprod / -self._xp.expm1(self.log_abar)

    @cached_property
    def posterior_variance(self) -> Any:
        """beta~_t = beta_t (1 - abar_{t-1}) / (1 - abar_t) (Ho et al. 2020, eq. 7)."""
        return self.betas * self._xp.expm1(self._log_prev) / self._xp.expm1(self.log_abar)

    @cached_property
    def posterior_log_variance(self) -> Any:
        """Its log; at t = 0, where it is minus infinity, that of t = 1."""
        v = self.posterior_variance
        return self._xp.log(self._xp.append(v[1:2], v[1:])) if len(self) > 1 else self._xp.log(self.betas)

    @cached_property
    def posterior_x0(self) -> Any:
        """Coefficient of x_0 in the posterior mean."""
        return self.betas * self._xp.exp(self._log_prev / 2) / -self._xp.expm1(self.log_abar)

    @cached_property
    def posterior_x_t(self) -> Any:
        """Coefficient of x_t in the posterior mean."""
        step = self._xp.sqrt(1 - self.betas)
        return step * self._xp.expm1(self._log_prev) / self._xp.expm1(self.log_abar)

    def rows(self, name: str, t: Array, like: Array) -> Array:
        """The table `name` at times t in fp32, with trailing dimensions to stand beside `like`."""
        return beside(jnp.asarray(getattr(self, name), jnp.float32)[t], like)

    def at(self, t: Array, like: Array) -> tuple[Array, Array]:
        """alpha_t and sigma_t beside `like`."""
        return self.rows("alpha", t, like), self.rows("sigma", t, like)


def beside(x: Array | float, like: Array) -> Array:
    """A scalar or (b,) with trailing dimensions to stand beside `like` (b, ...)."""
    x = jnp.asarray(x)
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim)) if x.ndim else x


def _linear(steps: int) -> np.ndarray:
    return np.linspace(0.1 / steps, 20 / steps, steps)


def _cosine(steps: int) -> np.ndarray:
    abar = lambda u: np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - abar(np.arange(1, steps + 1) / steps) / abar(np.arange(steps) / steps), CAP)


def _sigmoid(steps: int) -> np.ndarray:
    return (0.1 + 19.9 / (1 + np.exp(-np.linspace(-6, 6, steps)))) / steps


NAMES = {
    "linear": _linear,
    "cosine": _cosine,
    "squaredcos_cap_v2": _cosine,
    "scaled_linear": lambda steps: np.linspace(0.85**0.5, 12**0.5, steps) ** 2 / steps,
    "quadratic": lambda steps: np.linspace(0.1**0.5, 20**0.5, steps) ** 2 / steps,
    "sigmoid": _sigmoid,
    "constant": lambda steps: np.full(steps, 20 / steps),
    "jsd": lambda steps: 1.0 / np.linspace(steps, 1, steps),
}
"""Variances of the noise of each of so many steps; in 1000 steps they are those of the papers."""


def respacing(steps: int, spacing: str) -> list[int]:
    """Which of `steps` steps are kept, in rising order.

    `"a,b,c"` cuts the process into equal sections and takes so many steps of each, first and last included; `"ddimN"`
    takes every k-th for the smallest k that gives N; `"fast27"` is that of GLIDE. Python's rounding, halves to even.
    Errors: ValueError where that many steps cannot be had.
    """
    if spacing == "fast27":
        return sorted({*respacing(steps, "10,10,3,2,2")} - {steps - 1} | {steps - 3})
    if spacing.startswith("ddim"):
        count = int(spacing.removeprefix("ddim"))
        for stride in range(1, steps):
            if len(range(0, steps, stride)) == count:
                return list(range(0, steps, stride))
        raise ValueError(f"spacing {spacing!r}: no whole stride takes {count} of {steps} steps")
    counts = [int(n) for n in spacing.split(",")]
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (i < steps % len(counts))
        if not 0 < count <= size:
            raise ValueError(f"spacing {spacing!r}: section {i} has {size} steps, of which {count} cannot be taken")
        place, stride = 0.0, (size - 1) / (count - 1) if count > 1 else 1
        for _ in range(count):
            kept.append(start + round(place))
            place += stride
        start += size
    return kept


# -- what a network predicts, and what that says of x_0 and eps


def split(kind: Predicts, value: Array, x: Array, alpha: Array | float, sigma: Array | float) -> tuple[Array, Array]:
    """(x_0, eps) from what is predicted of x = alpha x_0 + sigma eps.

    v = alpha eps - sigma x_0 (Salimans & Ho 2022); velocity = eps - x_0 (Liu et al. 2023); drift = x_0 - eps, the same
    towards the picture (Ma et al. 2024, SiT); score = -eps / sigma.
    alpha, sigma: beside x. Where alpha is 0, eps and score do not say x_0; where sigma is 0, x0 does not say eps.
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
    """What a network of that kind should predict; with `split` every kind becomes every other."""
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

    `uniform`: 1 on whatever is predicted. Others are weights of the error in x_0, carried over: `snr`, `truncated_snr`
    max(snr, 1) (Salimans & Ho 2022), `min_snr` min(snr, gamma) (Hang et al. 2023).
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
    # What an error of one in x_0 is in the prediction, squared.
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


class Normal(NamedTuple):
    """A diagonal Gaussian; `x0` is the picture it was made of, where there is one."""

    mean: Array
    log_variance: Array
    x0: Array

    @property
    def variance(self) -> Array:
        return jnp.exp(self.log_variance)


def q_sample(schedule: Schedule, x0: Array, t: Array, eps: Array) -> Array:
    """x_t = alpha_t x_0 + sigma_t eps (Ho et al. 2020, eq. 4)."""
    alpha, sigma = schedule.at(t, x0)
    return alpha * x0 + sigma * eps


def posterior(schedule: Schedule, x0: Array, x: Array, t: Array) -> Normal:
    """q(x_{t-1} | x_t = x, x_0) (Ho et al. 2020, eqs. 6 and 7); its log-variance at t = 0 is that of t = 1."""
    mean = schedule.rows("posterior_x0", t, x) * x0 + schedule.rows("posterior_x_t", t, x) * x
    return Normal(mean, jnp.broadcast_to(schedule.rows("posterior_log_variance", t, x), x.shape), x0)


def learned_range(schedule: Schedule, v: Array, t: Array) -> Array:
    """Log-variance between those of the posterior, v = -1, and of beta_t, v = 1 (Nichol & Dhariwal 2021, eq. 15)."""
    low, high = schedule.rows("posterior_log_variance", t, v), schedule.rows("log_betas", t, v)
    share = (v + 1) / 2
    return share * high + (1 - share) * low


def log_variance(schedule: Schedule, kind: Variance, v: Array | None, x: Array, t: Array) -> Array:
    """Log-variance of the step back: learned, of `v` like x, or fixed to beta~_t (small) or beta_t (large)."""
    if kind == "fixed_small":
        return jnp.broadcast_to(schedule.rows("posterior_log_variance", t, x), x.shape)
    if kind == "fixed_large":  # the first step would destroy what is there: it takes the posterior's variance
        first = schedule.rows("posterior_log_variance", jnp.zeros_like(t), x)
        large = schedule.rows("log_betas", t, x)
        return jnp.broadcast_to(jnp.where(beside(t, x) == 0, first, large), x.shape)
    if v is None:
        raise ValueError(f"variance {kind!r} is one that the network predicts, and this one predicts none")
    return v if kind == "learned" else learned_range(schedule, v, t)


def p_mean_variance(
    schedule: Schedule,
    prediction: Array,
    x: Array,
    t: Array,
    *,
    v: Array | None = None,
    predicts: Predicts = "eps",
    variance: Variance = "learned_range",
    clip: bool | Array = False,
) -> Normal:
    """p(x_{t-1} | x_t = x) as the network has it (Ho et al. 2020, eq. 11); `x0` is the picture it has in mind.

    prediction, v: like x, what the network says of x and of the variance. clip: bring that picture into [-1, 1].
    """
    x0, _ = split(predicts, prediction, x, *schedule.at(t, x))
    x0 = clipped(x0, clip)
    return posterior(schedule, x0, x, t)._replace(log_variance=log_variance(schedule, variance, v, x, t))


def clipped(x0: Array, clip: bool | Array) -> Array:
    """x0 in [-1, 1] where `clip` (a scalar or (b,)) says so."""
    return jnp.where(beside(clip, x0), jnp.clip(x0, -1, 1), x0)


def ddpm_step(p: Normal, t: Array, noise: Array, temperature: Array | float = 1.0) -> Array:
    """A draw from p(x_{t-1} | x_t); its mean at t = 0 (Ho et al. 2020, algorithm 2)."""
    scale = jnp.where(t == 0, 0.0, jnp.asarray(temperature))
    return p.mean + beside(scale, p.mean) * jnp.exp(p.log_variance / 2) * noise


def ddim_step(
    schedule: Schedule, x0: Array, x: Array, t: Array, noise: Array | float = 0.0, eta: Array | float = 0.0
) -> Array:
    """x_{t-1} from x_t = x and the picture in mind (Song et al. 2021, eq. 12); eta 0 adds no noise, 1 is ancestral."""
    alpha, sigma = schedule.at(t, x)
    abar_prev = schedule.rows("alphas_cumprod_prev", t, x)
    eps = (x - alpha * x0) / sigma
    spread = beside(eta, x) * jnp.sqrt(schedule.rows("posterior_variance", t, x))
    mean = x0 * jnp.sqrt(abar_prev) + jnp.sqrt(jnp.maximum(1 - abar_prev - spread**2, 0)) * eps
    return mean + jnp.where(beside(t, x) == 0, 0.0, spread) * noise


def ddim_reverse_step(schedule: Schedule, x0: Array, x: Array, t: Array) -> Array:
    """x_{t+1} from x_t = x: the way of `ddim_step` at eta 0 backwards, from a picture to its noise."""
    alpha, sigma = schedule.at(t, x)
    abar = schedule.rows("alphas_cumprod_next", t, x)
    return x0 * jnp.sqrt(abar) + jnp.sqrt(1 - abar) * (x - alpha * x0) / sigma


# -- the variational bound


def normal_kl(p: Normal, q: Normal) -> Array:
    """KL(p || q) of every number, in nats."""
    ratio = jnp.exp(p.log_variance - q.log_variance)
    gap = (p.mean - q.mean) ** 2 * jnp.exp(-q.log_variance)
    return 0.5 * (q.log_variance - p.log_variance - 1 + ratio + gap)


@jax.custom_jvp
def exact_tanh(x: Array) -> Array:
    """tanh to the last bit near 1 and -1, where differences of it are taken: `jnp.tanh` is off by several there."""
    y = jnp.exp(-2 * jnp.abs(x))
    return jnp.sign(x) * (1 - 2 * y / (1 + y))


@exact_tanh.defjvp
def _exact_tanh_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = exact_tanh(*primals)
    return y, (1 - y * y) * tangents[0]


def discretised_log_likelihood(x: Array, p: Normal) -> Array:
    """log p of pixels x in [-1, 1] that stand for intervals of width 2/255 (Ho et al. 2020, eq. 13), in nats."""
    inverse = jnp.exp(-p.log_variance / 2)
    # The tanh stands for the error function in every published network, and so it does here.
    cdf = lambda z: 0.5 * (1 + exact_tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    above, below = cdf(inverse * (x - p.mean + 1 / 255)), cdf(inverse * (x - p.mean - 1 / 255))
    log = lambda mass: jnp.log(jnp.maximum(mass, 1e-12))
    return jnp.where(x < -0.999, log(above), jnp.where(x > 0.999, log(1 - below), log(above - below)))


def vb_terms(schedule: Schedule, x0: Array, x: Array, t: Array, p: Normal) -> Array:
    """The term of the variational bound at t, in bits per dimension: (b,) (Nichol & Dhariwal 2021, eqs. 4 to 6)."""
    kl = normal_kl(posterior(schedule, x0, x, t), p)
    mean = lambda y: y.reshape(y.shape[0], -1).mean(-1) / math.log(2)
    return jnp.where(t == 0, mean(-discretised_log_likelihood(x0, p)), mean(kl))
