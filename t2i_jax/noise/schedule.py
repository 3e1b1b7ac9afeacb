"""Noise schedules in discrete steps: tables of alpha_bar, and respacing to fewer steps.

Tables are computed in float64 on the host, where 1 - abar keeps its digits, and gathered in fp32. Times t count from 0,
the least noisy; arrays of times are int (b,) or a scalar.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from t2i_jax.core.arrays import Float, Int, Num, typed

Table = np.ndarray | Array

CAP = 0.999
"""No step adds more noise than this (Nichol & Dhariwal 2021, section 3.2)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The cumulative products abar_t of a noising process, and the quantities derived from them.

    Arrays are NumPy float64 (T,), those of `strided` traced fp32. alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t).
    """

    log_abar: Table
    """log abar_t, with abar_t the signal's share of the power after step t"""
    timestep_map: Table
    """int (T,): the corresponding step of the process that the network was trained on"""
    original: int
    """number of steps of that process"""

    @classmethod
    def of(cls, betas: ArrayLike) -> Schedule:
        """The process whose steps add noise of variance `betas` (T,), each in (0, 1].

        Errors: ValueError where one is not.
        """
        betas = np.asarray(betas, np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(f"betas {betas.shape}: one row of numbers above 0 and up to 1 is wanted")
        with np.errstate(divide="ignore"):
            return cls(np.cumsum(np.log1p(-betas)), np.arange(len(betas)), len(betas))

    @classmethod
    def named(
        cls,
        name: str,
        steps: int = 1000,
        *,
        zero_terminal_snr: bool = False,
        ends: tuple[float, float] | None = None,
    ) -> Schedule:
        """A schedule by name: `linear` (Ho et al. 2020), `cosine` (Nichol & Dhariwal 2021, eq. 17; also
        `squaredcos_cap_v2`), `scaled_linear` (Rombach et al. 2022), `sigmoid`, `quadratic`, `constant`, `jsd`.

        zero_terminal_snr: shift and scale alpha so that no signal is left at the last step (Lin et al. 2024, algorithm
        1). ends: first and last variance in 1000 steps, of a schedule of `BETWEEN`; None: the paper's. Errors:
        ValueError for an unknown name, for ends of another schedule, or for so few steps that a beta exceeds 1.
        """
        if name not in NAMES:
            raise ValueError(f"noise schedule {name!r} is not one of {', '.join(NAMES)}")
        if ends is not None and name not in BETWEEN:
            raise ValueError(f"noise schedule {name!r} has no ends; {', '.join(BETWEEN)} have")
        low, high = (1000 * end for end in ends or (0, 0))
        schedule = cls.of(BETWEEN[name](steps, low, high) if ends else NAMES[name](steps))
        return schedule.with_zero_terminal_snr() if zero_terminal_snr else schedule

    def with_zero_terminal_snr(self) -> Schedule:
        """The same schedule with alpha_T = 0 and alpha_0 unchanged (Lin et al. 2024, algorithm 1)."""
        alpha = np.exp(self.log_abar / 2)
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        with np.errstate(divide="ignore"):
            return dataclasses.replace(self, log_abar=2 * np.log(alpha))

    def respaced(self, spacing: str) -> Schedule:
        """A process of fewer steps with the same noise levels: `"100"`, `"10,6,4"`, `"ddim25"`, `"fast27"`.

        A single step is the noisiest, where samplers begin; published programs keep the least noisy one.
        """
        kept = np.asarray(respacing(len(self.log_abar), spacing))
        if len(kept) == 1:
            kept[0] = len(self.log_abar) - 1
        return dataclasses.replace(self, log_abar=self.log_abar[kept], timestep_map=self.timestep_map[kept])

    def strided(self, steps: Array | int, bound: int, stride: Array | bool = False) -> Schedule:
        """As `respaced(str(steps))`, for a traced number of steps, 1 to `bound`, in tables (bound,).

        stride: as `respaced(f"ddim{steps}")`, every k-th step from the first, if some k gives that many, else evenly
        spaced; traced. A single step is the noisiest. Entries after the first `steps` repeat the last of them.
        """
        last = len(self) - 1
        place = jnp.minimum(jnp.arange(bound), steps - 1)
        even = jnp.round(place * (last / jnp.maximum(steps - 1, 1))).astype(jnp.int32)
        even = jnp.where(steps == 1, last, even)
        wide = -(-(last + 1) // steps)
        whole = stride & (steps > 1) & ((steps - 1) * wide <= last)
        index = jnp.clip(jnp.where(whole, place * wide, even), 0, last)
        return self._gathered(index)

    def leading(self, steps: Array | int, bound: int) -> tuple[Schedule, Array]:
        """Steps 0 and 1, 1 + k, 1 + 2 k, ... for k = T // steps, in tables (bound,), and the number of those from 1 on,
        which is not always `steps`; traced. Entries after them repeat the last of them.

        Samplers of latent diffusion go along these from the noisiest to step 0 (Rombach et al. 2022).
        """
        last = len(self) - 1
        wide = jnp.maximum((last + 1) // jnp.asarray(steps, jnp.int32), 1)
        count = jnp.maximum((last - 1) // wide + 1, 1)
        place = jnp.minimum(jnp.arange(bound), count)
        return self._gathered(jnp.where(place == 0, 0, jnp.minimum(1 + (place - 1) * wide, last))), count

    def _gathered(self, index: Array) -> Schedule:
        """The process of these steps, traced."""
        gather = lambda table, dtype: jnp.asarray(table, dtype)[index]
        return Schedule(gather(self.log_abar, jnp.float32), gather(self.timestep_map, jnp.int32), self.original)

    def __len__(self) -> int:
        return self.log_abar.shape[0]

    @property
    def _xp(self) -> ModuleType:
        return np if isinstance(self.log_abar, np.ndarray) else jnp

    @cached_property
    def alphas_cumprod(self) -> Table:
        return self._xp.exp(self.log_abar)

    @cached_property
    def _log_prev(self) -> Table:
        return self._xp.append(self._xp.zeros(1, self.log_abar.dtype), self.log_abar[:-1])

    @cached_property
    def betas(self) -> Table:
        """Variance of the noise that step t adds, 1 - abar_t / abar_{t-1}."""
        return -self._xp.expm1(self.log_abar - self._log_prev)

    @cached_property
    def log_betas(self) -> Table:
        return self._xp.log(self.betas)

    @cached_property
    def alpha(self) -> Table:
        return self._xp.exp(self.log_abar / 2)

    @cached_property
    def sigma(self) -> Table:
        return self._xp.sqrt(-self._xp.expm1(self.log_abar))

    @cached_property
    def snr(self) -> Table:
        """abar_t / (1 - abar_t)."""
        return self.alphas_cumprod / -self._xp.expm1(self.log_abar)

    @cached_property
    def posterior_variance(self) -> Table:
        """beta~_t = beta_t (1 - abar_{t-1}) / (1 - abar_t) (Ho et al. 2020, eq. 7)."""
        return self.betas * self._xp.expm1(self._log_prev) / self._xp.expm1(self.log_abar)

    @cached_property
    def posterior_log_variance(self) -> Table:
        """Its log; at t = 0, where it is -inf, the value of t = 1, or log beta_0 if there is only one step."""
        v = self.posterior_variance
        first = self._xp.where(v[1:2] > 0, v[1:2], self.betas[:1]) if len(self) > 1 else self.betas
        return self._xp.log(self._xp.append(first, v[1:]))

    @cached_property
    def posterior_x0(self) -> Table:
        """Coefficient of x_0 in the posterior mean."""
        return self.betas * self._xp.exp(self._log_prev / 2) / -self._xp.expm1(self.log_abar)

    @cached_property
    def posterior_x_t(self) -> Table:
        """Coefficient of x_t in the posterior mean."""
        step = self._xp.sqrt(1 - self.betas)
        return step * self._xp.expm1(self._log_prev) / self._xp.expm1(self.log_abar)

    @typed
    def at(self, t: Int[Array, "*b"], like: Float[Array, " b *x"]) -> tuple[Array, Array]:
        """alpha_t and sigma_t, shaped to multiply `like`."""
        return rows(self.alpha, t, like), rows(self.sigma, t, like)


@typed
def rows(table: Table, t: Int[Array, "*b"], like: Num[Array, "*x"]) -> Float[Array, "..."]:
    """A table at times t in fp32, with trailing dimensions to broadcast against `like`."""
    return expand_like(jnp.asarray(table, jnp.float32)[t], like)


@typed
def stratified(key: Array, b: int) -> Float[Array, " {b}"]:
    """Random numbers in (0, 1), one in each of b equal intervals, in random order; each is marginally uniform.

    Means over them have less variance than over independent numbers (Kingma et al. 2021, VDM, appendix I.1).
    """
    order, jitter = jax.random.split(key)
    # Keep away from the ends of the interval, so that rounding cannot move a number into the next.
    edge = min(b * 2.0**-22, 0.25)
    inside = jax.random.uniform(jitter, (b,), minval=edge, maxval=1 - edge)
    return (jax.random.permutation(order, b) + inside) / b


@typed
def midpoints(b: int) -> Float[Array, " {b}"]:
    """The midpoints of b equal intervals of (0, 1): a fixed grid, for losses that are compared with each other."""
    return (jnp.arange(b) + 0.5) / b


@typed
def spread(key: Array, b: int, train: bool) -> Float[Array, " {b}"]:
    """Numbers in (0, 1) for the quantile function of times: `stratified` in training, else `midpoints`."""
    return stratified(key, b) if train else midpoints(b)


@typed
def spread_of_each(key: Array, repeat: int, n: int, train: bool) -> Float[Array, "{repeat} {n}"]:
    """Numbers in (0, 1), for `repeat` training times of each of n tokens: each column has one number in
    each of `repeat` equal intervals. Uniform within the intervals in training, else on a fixed even lattice."""
    if train:
        inside = jax.random.uniform(key, (repeat, n), minval=2.0**-22, maxval=1 - 2.0**-22)
    else:  # multiples of the golden ratio, modulo 1
        steps = (jnp.arange(n, dtype=jnp.uint32) + 1) * jnp.uint32(0x9E3779B9)
        inside = jnp.clip(steps.astype(jnp.float32) * 2.0**-32, 2.0**-22, 1 - 2.0**-22)
    return (jnp.arange(repeat)[:, None] + inside) / repeat


def expand_like(x: Array | float, like: Array) -> Array:
    """A scalar or (b,) with trailing dimensions to broadcast against `like` (b, ...)."""
    x = jnp.asarray(x)
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim)) if x.ndim else x


def _cosine(steps: int) -> np.ndarray:
    abar = lambda u: np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - abar(np.arange(1, steps + 1) / steps) / abar(np.arange(steps) / steps), CAP)


def _linear(steps: int, low: float, high: float) -> np.ndarray:
    return np.linspace(low / steps, high / steps, steps)


def _squared(steps: int, low: float, high: float) -> np.ndarray:
    """Roots of the variances are evenly spaced; "linear" of latent diffusion's configurations."""
    return np.linspace(low**0.5, high**0.5, steps) ** 2 / steps


BETWEEN = {"linear": _linear, "scaled_linear": _squared, "quadratic": _squared}
"""Functions from the number of steps, and the first and the last variance times that number, to the variances."""
NAMES = {
    "linear": lambda steps: _linear(steps, 0.1, 20),
    "cosine": _cosine,
    "squaredcos_cap_v2": _cosine,
    "scaled_linear": lambda steps: _squared(steps, 0.85, 12),
    "quadratic": lambda steps: _squared(steps, 0.1, 20),
    "sigmoid": lambda steps: (0.1 + 19.9 / (1 + np.exp(-np.linspace(-6, 6, steps)))) / steps,
    "constant": lambda steps: np.full(steps, 20 / steps),
    "jsd": lambda steps: 1.0 / np.linspace(steps, 1, steps),
}
"""Functions from the number of steps to the noise variances (steps,); for 1000 steps they are those of the papers."""


SECTIONS: dict[str, str] = {
    "fast27": "10,10,3,2,2",
    "smart27": "7,4,2,1,2,4,7",
    "smart50": "10,6,4,3,2,2,3,4,6,10",
    "smart100": "1,1,1,1,2,2,2,2,2,2,3,3,4,4,5,5,6,7,7,8,9,10,13",
    "smart185": "1,1,2,2,2,3,3,3,4,5,6,7,8,9,10,11,12,13,14,15,16,18,20",
    "super27": "1,1,1,1,1,1,1,2,5,13",
    "super40": "2,2,2,2,2,2,3,4,6,15",
    "super100": "4,4,6,6,8,8,10,10,14,30",
}
"""Steps of each section by name: those of DeepFloyd IF, and GLIDE's fast27, whose last step is two before the noisiest
(DeepFloyd's program, and diffusers, keep the noisiest under this name)."""


def respacing(steps: int, spacing: str) -> list[int]:
    """The indices of the `steps` steps that are kept, in rising order.

    `"a,b,c"` cuts the process into equal sections and takes that many steps of each, first and last included; `"ddimN"`
    takes every k-th step for the smallest k that gives N; names are those of `SECTIONS`. Halves are rounded to even, as
    in Python. A single step of a section is its first.
    Errors: ValueError if that many steps cannot be taken.
    """
    if spacing in SECTIONS:
        kept = respacing(steps, SECTIONS[spacing])
        return sorted({*kept} - {steps - 1} | {steps - 3}) if spacing == "fast27" else kept
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
