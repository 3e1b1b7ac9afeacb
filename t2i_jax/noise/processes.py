"""Noise processes for training and sampling: discrete steps, straight flow, and EDM.

All are x_t = alpha_t x_0 + sigma_t eps. A process samples training times, gives alpha and sigma at a time, the time
input of the network, and the `SamplingGrid` of a number of steps from noise to the image. Numbers of steps are traced.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from t2i_jax.core.arrays import Float, Int, Num, typed
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import Checked, Finite, Positive, Size
from t2i_jax.core.noise import NoiseProcess, Predicts, SamplingGrid, Spacing
from t2i_jax.noise.gaussian import p_mean_variance, vb_terms
from t2i_jax.noise.schedule import BETWEEN, NAMES, SECTIONS, Schedule, expand_like

NOISE = 1e-3

T = TypeVar("T", float, Array)


@dataclasses.dataclass(frozen=True)
class Discrete(Checked):
    """A chain of discrete noising steps (Ho et al. 2020).

    >>> process = Discrete("cosine", steps=50)
    >>> process.max_steps, process.solver
    (50, 'ddpm')
    """

    schedule: str = "linear"
    """A name of `Schedule.named`."""
    steps: Size = 1000
    zero_terminal_snr: bool = False
    """End in pure noise (Lin et al. 2024); requires predicting v."""
    rescale_times: bool = False
    """Scale network times to a process of 1000 steps, whatever the number of steps."""
    ends: tuple[float, float] | None = None
    """First and last noise variance of 1000 steps, of a schedule of `noise.schedule.BETWEEN`; None: those of its
    paper."""

    # Without annotations, so that they are no fields.
    scale = 1.0
    solver = "ddpm"
    """Ancestral sampling of the learned reverse chain (Ho et al. 2020, algorithm 2)."""

    def __post_init__(self):
        super().__post_init__()
        if self.schedule not in NAMES:
            raise ConfigError(f"schedule {self.schedule!r}: one of {', '.join(NAMES)}")
        if self.ends is not None and not 0 < self.ends[0] <= self.ends[1] < 1:
            raise ConfigError(f"ends {self.ends}: first and last variance, above 0, rising, below 1")
        if self.ends is not None and self.schedule not in BETWEEN:
            raise ConfigError(f"ends {self.ends}: schedule {self.schedule!r} has none; {', '.join(BETWEEN)} have")

    @cached_property
    def tables(self) -> Schedule:
        return Schedule.named(self.schedule, self.steps, zero_terminal_snr=self.zero_terminal_snr, ends=self.ends)

    @property
    def max_steps(self) -> int:
        return self.steps

    @property
    def starts_from_pure_noise(self) -> bool:
        return float(self.tables.alpha[-1]) == 0

    @property
    def time_levels(self) -> int:
        return 1000 if self.rescale_times else self.steps

    def variance_bound(self, x0: Array, x: Array, t: Array, prediction: Array, v: Array, predicts: Predicts) -> Array:
        p = p_mean_variance(self.tables, prediction, x, t, v=v, predicts=predicts)
        return vb_terms(self.tables, x0, x, t, p)

    def same_noise(self, other: NoiseProcess) -> bool:
        return self == other

    @typed
    def quantile(self, u: Float[Array, " b"]) -> Int[Array, " b"]:
        """Quantiles of training times at u in (0, 1); all steps are equally likely."""
        return jnp.clip(jnp.floor(u * self.steps).astype(jnp.int32), 0, self.steps - 1)

    @typed
    def alpha_sigma(self, t: Num[Array, "*b"], like: Float[Array, " b *x"]) -> tuple[Array, Array]:
        """alpha and sigma at times t, shaped to multiply `like`; fractional times are interpolated between two
        steps."""
        if jnp.issubdtype(t.dtype, jnp.integer):
            return self.tables.at(t, like)
        alpha, sigma = self._between(t)
        return expand_like(alpha, like), expand_like(sigma, like)

    def _between(self, t: Array) -> tuple[Array, Array]:
        """alpha and sigma at fractional times, interpolated and rescaled to alpha^2 + sigma^2 = 1."""
        table = lambda values: jnp.interp(t, jnp.arange(self.steps), jnp.asarray(values, jnp.float32))
        alpha, sigma = table(self.tables.alpha), table(self.tables.sigma)
        return alpha / jnp.hypot(alpha, sigma), sigma / jnp.hypot(alpha, sigma)

    @typed
    def network_time(self, t: Num[Array, "*b"]) -> Num[Array, "*b"]:
        """The time input of the network."""
        return t * (1000 / self.steps) if self.rescale_times else t

    def timesteps(self, steps: Array | int, stride: Array | bool = False, spacing: Spacing = "default") -> SamplingGrid:
        """Reverse grid of `steps` of the steps: the first, the last and evenly spaced ones between; with `stride` every
        k-th step from the first (as in published DDIM samplers), if some k gives that many.

        `leading` ends at the noise of step 0, see `Schedule.leading`. Those of `SECTIONS` have their own number of
        steps. Other spacings stop between steps, at fractional times.
        """
        if spacing == "leading":
            schedule, steps = self.tables.leading(steps, self.max_steps)
            first = steps  # of the entries, the last stop is entry 0
        elif spacing in SECTIONS:
            schedule = self.tables.respaced(spacing)
            steps = len(schedule)
            first = steps - 1
        else:
            schedule = self.tables.strided(steps, self.max_steps, stride if spacing == "default" else False)
            first = steps - 1
        place = first - jnp.arange(self.max_steps + 1)
        index, end = jnp.maximum(place, 0), place < 0
        at = lambda table: jnp.asarray(table, jnp.float32)[index]
        path = SamplingGrid(
            at(self.network_time(jnp.asarray(schedule.timestep_map))),
            jnp.where(end, 1.0, at(schedule.alpha)),
            jnp.where(end, 0.0, at(schedule.sigma)),
            at(schedule.posterior_log_variance)[:-1],
            at(schedule.log_betas)[:-1],
            jnp.asarray(steps, jnp.int32),
        )
        if spacing in ("default", "leading", *SECTIONS):
            return path
        if spacing == "even":
            t = jnp.maximum(place, 0) * ((self.steps - 1) / jnp.maximum(steps - 1, 1))
            return along(self.network_time(t), *self._between(t), path.steps, path)
        ratio = respaced(path, self.tables.sigma[0] / self.tables.alpha[0], spacing)
        angles = jnp.asarray(np.arctan2(self.tables.sigma, self.tables.alpha), jnp.float32)
        t = jnp.interp(jnp.arctan(ratio), angles, jnp.arange(self.steps))
        alpha = 1 / jnp.hypot(1.0, ratio)
        return along(self.network_time(t), alpha, ratio * alpha, path.steps, path)


@dataclasses.dataclass(frozen=True)
class Flow(Checked):
    """A straight path, alpha = 1 - t and sigma = t (Liu et al. 2023; Lipman et al. 2023); the natural target is
    velocity.

    >>> Flow().solver, Flow().starts_from_pure_noise
    ('euler', True)
    """

    times: Literal["uniform", "logit_normal"] = "logit_normal"
    """Distribution of training times; logit_normal (Esser et al. 2024, eq. 19) favours the middle."""
    mean: Finite = 0.0
    std: Positive = 1.0
    shift: Positive = 1.0
    """t becomes s t / (1 + (s - 1) t): more noise for more pixels (Esser et al. 2024, eq. 23)."""
    toward: bool = False
    """The network's time is the signal share 1 - t instead of 1000 t, as in SiT."""
    max_steps: Size = 1000
    """Maximum number of sampling steps."""

    scale = 1.0
    solver = "euler"
    """Euler: one evaluation per step along nearly straight paths, as in published models (Esser et al. 2024)."""
    starts_from_pure_noise = True
    variance_bound = None

    @property
    def time_levels(self) -> int | None:
        return None if self.toward else 1000

    def same_noise(self, other: NoiseProcess) -> bool:
        return isinstance(other, Flow) and self.toward == other.toward

    def shifted(self, t: T) -> T:
        return self.shift * t / (1 + (self.shift - 1) * t)

    @typed
    def quantile(self, u: Float[Array, " b"]) -> Float[Array, " b"]:
        """Quantiles in (0, 1) of training times at u in (0, 1)."""
        if self.times == "uniform":
            return self.shifted(1e-5 + (1 - 1e-5) * u)
        return self.shifted(jax.nn.sigmoid(self.mean + self.std * jax.scipy.special.ndtri(u)))

    @typed
    def alpha_sigma(self, t: Num[Array, "*b"], like: Float[Array, " b *x"]) -> tuple[Array, Array]:
        t = expand_like(t, like)
        return 1 - t, t

    @typed
    def network_time(self, t: Num[Array, "*b"]) -> Num[Array, "*b"]:
        return 1 - t if self.toward else 1000 * t

    def timesteps(self, steps: Array | int, stride: Array | bool = False, spacing: Spacing = "default") -> SamplingGrid:
        """Evenly spaced t from 1 to 0, then shifted; `stride` is for Discrete."""
        n = jnp.arange(self.max_steps + 1)
        # The ends are selected by integers: n / steps may miss 0 and 1 by rounding.
        u = jnp.where(n < steps, 1 - n / steps, 0.0)
        t = jnp.where(n == 0, 1.0, self.shifted(u))
        path = along(self.network_time(t), 1 - t, t, steps)
        if spacing in ("default", "even") or self.max_steps == 1:
            return path
        least = self.shifted(1 / self.max_steps)
        ratio = respaced(path, least / (1 - least), spacing)
        return along(self.network_time(ratio / (1 + ratio)), 1 / (1 + ratio), ratio / (1 + ratio), steps, path)


@dataclasses.dataclass(frozen=True)
class EDM(Checked):
    """Noise of standard deviation s on images of standard deviation `data` (Karras et al. 2022); predict v.

    Divided by sqrt(s^2 + data^2), as the network reads it, x is alpha x_0 / data + sigma eps with sigma / alpha = s /
    data. The output of EDM's network is v for this x, up to its sign, with equal weights: eqs. 7 and 8 in this
    notation.
    """

    data: Positive = 0.5
    """Standard deviation of images, or latents."""
    mean: Finite = -1.2
    std: Positive = 1.2
    """Mean and standard deviation of log s in training, which is normally distributed."""
    low: Positive = 0.002
    high: Positive = 80.0
    """s at the ends of sampling."""
    rho: Positive = 7.0
    max_steps: Size = 1000
    """Maximum number of sampling steps."""

    solver = "heun"
    """Heun's method, as in Karras et al. (2022, algorithm 1)."""
    starts_from_pure_noise = False
    time_levels = None
    variance_bound = None

    def __post_init__(self):
        super().__post_init__()
        if not self.low < self.high:
            raise ConfigError(f"low {self.low} and high {self.high}: least and most noise, low < high")

    @property
    def scale(self) -> float:
        """Factor by which images are multiplied."""
        return 1 / self.data

    def same_noise(self, other: NoiseProcess) -> bool:
        return isinstance(other, EDM) and self.data == other.data

    @typed
    def quantile(self, u: Float[Array, " b"]) -> Float[Array, " b"]:
        """Quantiles of log s in training at u in (0, 1)."""
        return self.mean + self.std * jax.scipy.special.ndtri(u)

    @typed
    def alpha_sigma(self, t: Num[Array, "*b"], like: Float[Array, " b *x"]) -> tuple[Array, Array]:
        angle = jnp.arctan(jnp.exp(expand_like(t, like)) / self.data)
        return jnp.cos(angle), jnp.sin(angle)

    @typed
    def network_time(self, t: Num[Array, "*b"]) -> Num[Array, "*b"]:
        """c_noise = log(s) / 4, times 1000 to match the frequencies of time embeddings."""
        return 250 * t

    def timesteps(self, steps: Array | int, stride: Array | bool = False, spacing: Spacing = "default") -> SamplingGrid:
        """s from high to low as in eq. 5, then 0; `stride` is for Discrete.

        Even spacing is even in arctan(s / data), from that of `high` to 0 (Lu & Song 2024, TrigFlow).
        """
        n = jnp.arange(self.max_steps + 1)
        share = jnp.where(n < steps - 1, n / jnp.maximum(steps - 1, 1), 1.0)
        ends = [end ** (1 / self.rho) for end in (self.high, self.low)]
        ratio = (ends[0] + jnp.where(n > 0, share, 0.0) * (ends[1] - ends[0])) ** self.rho / self.data
        path = self._along(ratio, steps)
        if spacing in ("default", "karras"):
            return path
        if spacing == "even":
            ratio = jnp.tan(math.atan(self.high / self.data) * (1 - n / steps))
            return self._along(jnp.where(n < steps, ratio, self.low / self.data), steps, path)
        return self._along(respaced(path, self.low / self.data, spacing), steps, path)

    def _along(self, ratio: Array, steps: Array | int, ends: SamplingGrid | None = None) -> SamplingGrid:
        angle = jnp.arctan(ratio)
        return along(self.network_time(jnp.log(ratio * self.data)), jnp.cos(angle), jnp.sin(angle), steps, ends)


@typed
def along(
    t: Num[Array, " n"],
    alpha: Float[Array, " n"],
    sigma: Float[Array, " n"],
    steps: Array | int,
    ends: SamplingGrid | None = None,
) -> SamplingGrid:
    """The grid through these stops, with the variances of its steps; from stop `steps` on it is at the clean
    end, alpha = 1 and sigma = 0. ends: a grid whose first stop and clean end replace those given."""
    n = jnp.arange(len(t))
    if ends is not None:
        taken = (n == 0) | (n >= steps)
        t, alpha, sigma = (jnp.where(taken, *x) for x in ((ends.t, t), (ends.alpha, alpha), (ends.sigma, sigma)))
    alpha, sigma = jnp.where(n < steps, alpha, 1.0), jnp.where(n < steps, sigma, 0.0)
    kept = alpha[:-1] / jnp.maximum(alpha[1:], 1e-12)
    high = jnp.maximum(sigma[:-1] ** 2 - (kept * sigma[1:]) ** 2, 1e-20)
    low = high * (sigma[1:] / jnp.maximum(sigma[:-1], 1e-12)) ** 2
    return SamplingGrid(t, alpha, sigma, jnp.log(jnp.maximum(low, 1e-20)), jnp.log(high), jnp.asarray(steps, jnp.int32))


@typed
def respaced(path: SamplingGrid, least: float | Array, spacing: Spacing) -> Float[Array, " n"]:
    """sigma / alpha of stops spaced by `karras` or `log_snr`, from that of `path` down to `least` at stop
    `path.steps` - 1; the value at stop 0 is meaningless where `path` begins in pure noise.

    Errors: ValueError for another spacing.
    """
    bend = {"karras": (lambda x: x ** (1 / 7), lambda y: y**7), "log_snr": (jnp.log, jnp.exp)}
    if spacing in ("leading", *SECTIONS):
        raise ValueError(f"spacing {spacing!r}: it is one of discrete steps, which this process has not")
    if spacing not in bend:
        raise ValueError(f"spacing {spacing!r} is not one of {', '.join(get_args(Spacing))}")
    forth, back = bend[spacing]
    first, last = (path.alpha[0] < NOISE).astype(jnp.int32), path.steps - 1
    share = jnp.clip((jnp.arange(len(path.t)) - first) / jnp.maximum(last - first, 1), 0, 1)
    high, low = forth(path.sigma[first] / path.alpha[first]), forth(jnp.float32(least))
    return back(high + share * (low - high))
