"""The interface of noise processes, and the grids that samplers follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

from jax import Array

Predicts = Literal["eps", "x0", "v", "velocity", "drift", "score"]
"""Prediction type of a network at x_t; see `noise.gaussian.split`."""


Named = Literal["fast27", "smart27", "smart50", "smart100", "smart185", "super27", "super40", "super100"]
"""Discrete steps that published samplers keep, by their names; see `noise.schedule.SECTIONS`."""
Spacing = Literal["default", "even", "karras", "log_snr", "leading", Named]
"""Spacing of the stops of a sampling grid: the process' default, even in its own time, even in (sigma / alpha)^(1 / 7)
(Karras et al. 2022, eq. 5), or even in log(alpha / sigma) (Lu et al. 2022, DPM-Solver).

`karras` and `log_snr` end at the least noise of the process: that of the first step of Discrete, of `low` of EDM, of
the last of `max_steps` steps of Flow. Where a grid begins in pure noise, or nearly (alpha below `processes.NOISE`),
log(alpha / sigma) is -inf: they keep the first two stops of the default grid and space the others from the second on.

`leading`, of discrete steps alone, is that of latent diffusion's samplers (Rombach et al. 2022): every k-th step, k = T
// steps, from the second on, which may be more than `steps` of them, and the last stop has the noise of the first step.
In diffusers it is "leading" with an offset of 1, and `set_alpha_to_one` False.

`Named` ones, also of discrete steps alone, have a number of steps of their own.
"""


class SamplingGrid(NamedTuple):
    """The stops of a sampler, from noise to image, in tables of fixed size; entries after stop `steps` are unused."""

    t: Array
    """(n + 1,): time input of the network"""
    alpha: Array
    """(n + 1,)"""
    sigma: Array
    """(n + 1,), 0 at the clean end"""
    low: Array
    """(n,): log-variance of a reverse step, given the clean image"""
    high: Array
    """(n,): log-variance of the forward step between the same stops"""
    steps: Array
    """number of steps, 1 to n"""


VarianceBound = Callable[[Array, Array, Array, Array, Array, Predicts], Array]
"""(x0, x, t, prediction, v, predicts) -> (b,)"""


class NoiseProcess(Protocol):
    """x_t = alpha_t x_0 + sigma_t eps: a frozen config of the noise process of training and sampling."""

    @property
    def max_steps(self) -> int:
        """Maximum number of sampling steps."""
        ...

    @property
    def scale(self) -> float:
        """Factor by which images are multiplied before noise is added."""
        ...

    @property
    def solver(self) -> str:
        """The default solver, a key of `sampling.solvers.SOLVERS`."""
        ...

    @property
    def starts_from_pure_noise(self) -> bool:
        """Whether alpha is 0 where a sampler begins."""
        ...

    @property
    def time_levels(self) -> int | None:
        """Number of noise levels, if network times are their indices; None for other times."""
        ...

    @property
    def variance_bound(self) -> VarianceBound | None:
        """The term of the variational bound in bits per dimension, which trains the variance v of a reverse step; None
        if steps have no variance to learn."""
        ...

    def same_noise(self, other: NoiseProcess) -> bool:
        """Whether the noise at each network time is the same in both processes."""
        ...

    def quantile(self, u: Array) -> Array:
        """Quantiles (b,) of training times at u (b,) in (0, 1)."""
        ...

    def alpha_sigma(self, t: Array, like: Array) -> tuple[Array, Array]:
        """alpha and sigma at times t (b,), shaped to multiply `like`."""
        ...

    def network_time(self, t: Array) -> Array:
        """The time input of the network."""
        ...

    def timesteps(self, steps: Array | int, stride: Array | bool = False, spacing: Spacing = "default") -> SamplingGrid:
        """The grid of a traced number of reverse steps, 1 to `max_steps`; stride: take every k-th of discrete steps."""
        ...
