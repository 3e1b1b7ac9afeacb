"""Processes that a model is trained on and solvers go back along: discrete steps, straight flow, and that of EDM.

All are x_t = alpha_t x_0 + sigma_t eps. A process draws training times, knows alpha and sigma of a time, what time the
network is told, and the `Path` of so many steps from noise to the picture. Numbers of steps are traced.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from t2i_jax.noise.schedule import Schedule, beside


class Path(NamedTuple):
    """The stops of a sampler, from noise to the picture, in tables of one bound; what is behind the last is idle."""

    t: Array
    """(n + 1,): the time that the network is told"""
    alpha: Array
    """(n + 1,)"""
    sigma: Array
    """(n + 1,), 0 where nothing is left to do"""
    low: Array
    """(n,): log-variance of a step back, given the picture"""
    high: Array
    """(n,): log-variance of the step forth between the same stops"""
    steps: Array
    """how many steps there are, 1 to n"""


@dataclasses.dataclass(frozen=True)
class Discrete:
    """So many steps of noise (Ho et al. 2020)."""

    schedule: str = "linear"
    """One of those of `Schedule.named`."""
    steps: int = 1000
    zero_terminal_snr: bool = False
    """End in noise alone (Lin et al. 2024); predict v then."""
    rescale_times: bool = False
    """Tell the network times of 1000 steps, however many there are."""

    scale = 1.0

    @cached_property
    def tables(self) -> Schedule:
        return Schedule.named(self.schedule, self.steps, zero_terminal_snr=self.zero_terminal_snr)

    @property
    def bound(self) -> int:
        return self.steps

    def draw(self, key: Array, b: int) -> Array:
        """Times int (b,), all alike."""
        return jax.random.randint(key, (b,), 0, self.steps)

    def at(self, t: Array, like: Array) -> tuple[Array, Array]:
        """alpha and sigma at times t (b,), beside `like`."""
        return self.tables.at(t, like)

    def told(self, t: Array) -> Array:
        """The time that the network is told."""
        return t * (1000 / self.steps) if self.rescale_times else t

    def path(self, steps: Array | int, stride: Array | bool = False) -> Path:
        """Back through `steps` of the steps: the first and the last and those evenly between, or every k-th from the
        first (as published samplers of DDIM have it) where `stride` says so."""
        schedule = self.tables.strided(steps, self.bound, stride)
        place = steps - 1 - jnp.arange(self.bound + 1)
        index, end = jnp.maximum(place, 0), place < 0
        at = lambda table: jnp.asarray(table, jnp.float32)[index]
        return Path(
            at(self.told(schedule.timestep_map)),
            jnp.where(end, 1.0, at(schedule.alpha)),
            jnp.where(end, 0.0, at(schedule.sigma)),
            at(schedule.posterior_log_variance)[:-1],
            at(schedule.log_betas)[:-1],
            jnp.asarray(steps, jnp.int32),
        )


@dataclasses.dataclass(frozen=True)
class Flow:
    """A straight way, alpha = 1 - t and sigma = t (Liu et al. 2023; Lipman et al. 2023); predict velocity."""

    times: Literal["uniform", "logit_normal"] = "logit_normal"
    """How training times are drawn; logit_normal (Esser et al. 2024, eq. 19) prefers the middle."""
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    """t becomes s t / (1 + (s - 1) t): more noise for more pixels (Esser et al. 2024, eq. 23)."""
    toward: bool = False
    """Tell the network the picture's share 1 - t instead of 1000 t, as SiT does."""
    bound: int = 1000
    """Most steps of a sampler."""

    scale = 1.0

    def shifted(self, t: Array) -> Array:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def draw(self, key: Array, b: int) -> Array:
        """Times (b,) in (0, 1)."""
        if self.times == "uniform":
            return self.shifted(jax.random.uniform(key, (b,), minval=1e-5))
        return self.shifted(jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (b,))))

    def at(self, t: Array, like: Array) -> tuple[Array, Array]:
        t = beside(t, like)
        return 1 - t, t

    def told(self, t: Array) -> Array:
        return 1 - t if self.toward else 1000 * t

    def path(self, steps: Array | int, stride: Array | bool = False) -> Path:
        """Even steps of t from 1 to 0, then shifted."""
        t = self.shifted(jnp.maximum(1 - jnp.arange(self.bound + 1) / steps, 0))
        return along(self.told(t), 1 - t, t, steps)


@dataclasses.dataclass(frozen=True)
class EDM:
    """Noise of standard deviation s on pictures of standard deviation `data` (Karras et al. 2022); predict v.

    Divided by sqrt(s^2 + data^2), as the network reads it, x is alpha x_0 / data + sigma eps with tan = s / data, and
    what EDM's network predicts is v of that, up to its sign, with equal weights: eqs. 7 and 8 in other letters.
    """

    data: float = 0.5
    """Standard deviation of pictures, or latents."""
    mean: float = -1.2
    std: float = 1.2
    """log s is drawn from a normal distribution in training."""
    low: float = 0.002
    high: float = 80.0
    """s at the ends of a sampler's way."""
    rho: float = 7.0
    bound: int = 1000
    """Most steps of a sampler."""

    @property
    def scale(self) -> float:
        """What pictures are multiplied by."""
        return 1 / self.data

    def draw(self, key: Array, b: int) -> Array:
        """log s (b,)."""
        return self.mean + self.std * jax.random.normal(key, (b,))

    def at(self, t: Array, like: Array) -> tuple[Array, Array]:
        angle = jnp.arctan(jnp.exp(beside(t, like)) / self.data)
        return jnp.cos(angle), jnp.sin(angle)

    def told(self, t: Array) -> Array:
        """A quarter of log s, in thousandths, which is how waves of times are spaced."""
        return 250 * t

    def path(self, steps: Array | int, stride: Array | bool = False) -> Path:
        """s from high to low as eq. 5 has it, then 0."""
        ends = [end ** (1 / self.rho) for end in (self.high, self.low)]
        n = jnp.arange(self.bound + 1)
        s = (ends[0] + jnp.minimum(n / jnp.maximum(steps - 1, 1), 1) * (ends[1] - ends[0])) ** self.rho
        angle = jnp.where(n < steps, jnp.arctan(s / self.data), 0.0)
        return along(self.told(jnp.log(s)), jnp.cos(angle), jnp.sin(angle), steps)


Process = Discrete | Flow | EDM


def along(t: Array, alpha: Array, sigma: Array, steps: Array | int) -> Path:
    """The path through these stops, with the variances that follow from them."""
    kept = alpha[:-1] / jnp.maximum(alpha[1:], 1e-12)
    high = jnp.maximum(sigma[:-1] ** 2 - (kept * sigma[1:]) ** 2, 1e-20)
    low = high * (sigma[1:] / jnp.maximum(sigma[:-1], 1e-12)) ** 2
    return Path(t, alpha, sigma, jnp.log(jnp.maximum(low, 1e-20)), jnp.log(high), jnp.asarray(steps, jnp.int32))
