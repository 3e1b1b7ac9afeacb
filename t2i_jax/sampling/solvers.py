"""Diffusion solvers: each is one short step function, and one loop runs any of them.

A step calls `denoise(x, i)` at stop i of a `SamplingGrid`, and returns the x of stop i + 1. All are written in terms of
alpha and sigma, so that they work with every process. The number of steps is traced.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from t2i_jax.core.arrays import Float, typed
from t2i_jax.core.noise import SamplingGrid
from t2i_jax.noise.schedule import expand_like


class Denoised(NamedTuple):
    """The prediction at x: x0, eps, and optional outputs."""

    x0: Array
    eps: Array
    v: Array | None = None
    """position of the variance of the reverse step, -1 to 1 between the two of the grid; None: the larger"""
    classifier_gradient: Array | None = None
    """gradient of log p(condition | x), scaled; not yet in x0 and eps"""


class SolverState(NamedTuple):
    """State of a multistep solver: x and x0 of the previous stop."""

    x: Array
    x0: Array
    slope: Array
    """predicted change of x0 over the step from the previous stop, extrapolated linearly"""
    first: Array
    """there is no previous stop"""
    second: Array
    """there is no stop before the previous one, so no slope"""


Denoise = Callable[[Array, Array], Denoised]
Noise = Callable[[Array], Array]
"""i -> standard normal numbers like x"""
Step = Callable[[SamplingGrid, Array, Array, Denoise, SolverState, Noise, Array], tuple[Array, SolverState]]
"""(path, i, x, denoise, past, noise, eta) -> the x of stop i + 1, and the new solver state"""


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Extra rounds of noise at every stop, which make the unknown part of x agree with the known one.

    The known part affects the rest only through `denoise`, and one evaluation per step is too little for that, however
    many steps there are. Lugmayr et al. (2022, RePaint, algorithm 1) return to the noisier stop by the process' own
    noise and denoise again, several times. Here each round at a stop with noise sigma goes to half of the noise
    variance and back, whatever the neighbouring stops are:

        x' = alpha x_0(x) + sigma (n_old + n_new) / sqrt(2)

    where n_old is the noise that the previous round added and n_new is new. This step of Langevin dynamics is due to
    Leimkuhler & Matthews (2013): it preserves Gaussian distributions of any covariance, while a step with entirely new
    noise, as RePaint's ancestral one, narrows them. More steps also mean more rounds, so errors fall with both. The
    remaining error: at a noisy stop the network sees the known part only through its noise, and the rest cannot agree
    with more than that.
    """

    count: Array
    """rounds at each stop, one evaluation each; none in pure noise, nor at the clean end"""
    noise: Callable[[Array, Array], Array]
    """(i, j) -> standard normal numbers like x, for round j at stop i"""
    hold: Callable[[Array, Array, Array], Array]
    """(x, i, j) -> x with its known part replaced by that of stop i, with the noise of round j"""
    first: Array
    """standard normal numbers like x: the initial noise is 1 / sqrt(2) times these plus as much of others"""


@typed
def solve(
    step: Step,
    denoise: Denoise,
    x: Float[Array, " b *x"],
    path: SamplingGrid,
    noise: Noise,
    eta: Array | float = 0.0,
    start: Array | int = 0,
    on_step: Callable[[Array, Array], Array] = lambda x, i: x,
    rounds: Rounds | None = None,
) -> Float[Array, " b *x"]:
    """Solve from x at stop `start` to the last stop, in `path.steps - start` steps.

    eta: share of new noise, for solvers that use it; a scalar or (b,). on_step(x, i): applied to the x of stop i.
    rounds: run at each stop before its step; multistep solvers then take first-order steps.
    """
    eta = jnp.asarray(eta, jnp.float32)
    past = SolverState(x, jnp.zeros_like(x), jnp.zeros_like(x), jnp.bool_(True), jnp.bool_(True))

    def body(i: Array, carry: tuple[Array, SolverState, Array | None]) -> tuple[Array, SolverState, Array | None]:
        x, past, shared = carry
        if rounds is not None and shared is not None:
            x, shared = _renewed(rounds, denoise, path, i, x, shared)
            # x has left the trajectory of the multistep solver's state.
            moved = rounds.count > 0
            past = past._replace(first=past.first | moved, second=past.second | moved)
        x, past = step(path, i, x, denoise, past, noise, eta)
        if rounds is not None and shared is not None:
            # A solver shrinks noise by the ratio of sigma / alpha where x is pure noise, and less elsewhere:
            # keep the part of the old noise that remains in x, and draw the rest of n_old anew.
            ratio = jnp.exp(log_ratio(path, i) - log_ratio(path, i + 1))
            shared = ratio * shared + jnp.sqrt(jnp.maximum(1 - ratio**2, 0)) * rounds.noise(i, rounds.count)
        return on_step(x, i + 1), past, shared

    carry = x, past, None if rounds is None else rounds.first
    return jax.lax.fori_loop(jnp.asarray(start, jnp.int32), path.steps, body, carry)[0]


def _renewed(
    rounds: Rounds, denoise: Denoise, path: SamplingGrid, i: Array, x: Array, old: Array
) -> tuple[Array, Array]:
    """The x of stop i after its rounds, and the noise that the last one added."""
    alpha, sigma = path.alpha[i], path.sigma[i]

    def body(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, old = carry
        x0, new = with_classifier_gradient(denoise, path)(x, i).x0, rounds.noise(i, j)
        return rounds.hold(alpha * x0 + sigma * math.sqrt(0.5) * (old + new), i, j), new

    return jax.lax.fori_loop(0, jnp.where(alpha > 0, rounds.count, 0), body, (x, old))


BLIND = 1e-3
"""Ratio of signal to noise (of standard deviations) up to which a classifier is not followed.

Noise has no information on the image there: the gradient is the classifier's error, and x0 would be that over the
ratio, 20,000 times the error where the cosine schedule begins. Schedules that end in more signal, such as the linear
one with 0.006, are followed at every stop.
"""


def with_classifier_gradient(denoise: Denoise, path: SamplingGrid) -> Denoise:
    """`denoise` with the classifier gradient added to the score (Dhariwal & Nichol 2021, algorithm 2)."""

    def shifted(x: Array, i: Array) -> Denoised:
        d = denoise(x, i)
        if d.classifier_gradient is None:
            return d
        alpha, sigma = path.alpha[i], path.sigma[i]
        informed = alpha > BLIND * sigma
        ratio = jnp.where(informed, sigma / jnp.where(informed, alpha, 1.0), 0.0)
        eps = d.eps - jnp.where(informed, sigma, 0.0) * d.classifier_gradient
        return d._replace(eps=eps, x0=d.x0 + ratio * sigma * d.classifier_gradient, classifier_gradient=None)

    return shifted


def ddpm(
    path: SamplingGrid, i: Array, x: Array, denoise: Denoise, past: SolverState, noise: Noise, eta: Array
) -> tuple[Array, SolverState]:
    """Ancestral step of the reverse chain (Ho et al. 2020, algorithm 2), with the variance that the network predicts.

    A classifier gradient shifts the mean by the variance times it (Dhariwal & Nichol 2021, algorithm 1). eta scales the
    noise; 1 is exact.
    """
    d = denoise(x, i)
    a, s, a1, s1 = path.alpha[i], path.sigma[i], path.alpha[i + 1], path.sigma[i + 1]
    last = i == path.steps - 1
    mean = a1 * jnp.exp(path.high[i]) / s**2 * d.x0 + a / a1 * (s1 / s) ** 2 * x
    if d.v is None:
        log_variance = jnp.where(last, path.low[i], path.high[i])
    else:
        log_variance = path.low[i] + (d.v + 1) / 2 * (path.high[i] - path.low[i])
    if d.classifier_gradient is not None:
        mean = mean + jnp.exp(log_variance) * d.classifier_gradient
    return mean + expand_like(jnp.where(last, 0.0, eta), x) * jnp.exp(log_variance / 2) * noise(i), past


def ddim(
    path: SamplingGrid, i: Array, x: Array, denoise: Denoise, past: SolverState, noise: Noise, eta: Array
) -> tuple[Array, SolverState]:
    """x' = alpha' x0 + sigma' eps, with eta^2 of the posterior variance as new noise (Song et al. 2021, eq. 12)."""
    d = with_classifier_gradient(denoise, path)(x, i)
    a1, s1 = path.alpha[i + 1], path.sigma[i + 1]
    new = jnp.where(s1 > 0, expand_like(eta, x) * s1 / path.sigma[i] * jnp.exp(path.high[i] / 2), 0.0)
    return a1 * d.x0 + jnp.sqrt(jnp.maximum(s1**2 - new**2, 0)) * d.eps + new * noise(i), past


def euler(
    path: SamplingGrid, i: Array, x: Array, denoise: Denoise, past: SolverState, noise: Noise, eta: Array
) -> tuple[Array, SolverState]:
    """Euler step along x0 d alpha + eps d sigma: `ddim` without noise.

    For a flow this follows the velocity, for variance-exploding processes (x - x0) / sigma.
    """
    return ddim(path, i, x, denoise, past, noise, jnp.zeros_like(eta))


def ancestral(
    path: SamplingGrid, i: Array, x: Array, denoise: Denoise, past: SolverState, noise: Noise, eta: Array
) -> tuple[Array, SolverState]:
    """`ddim` with eta = 1: all the noise of the posterior."""
    return ddim(path, i, x, denoise, past, noise, jnp.ones_like(eta))


def heun(
    path: SamplingGrid, i: Array, x: Array, denoise: Denoise, past: SolverState, noise: Noise, eta: Array
) -> tuple[Array, SolverState]:
    """Heun's step: the mean of the slopes at both ends, along x0 d alpha + eps d sigma; two evaluations.

    As in Karras et al. (2022, algorithm 1), but in x = alpha x0 + sigma eps instead of x / alpha: equal to second
    order. The step to sigma = 0 is Euler's.
    """
    denoise = with_classifier_gradient(denoise, path)
    d = denoise(x, i)
    a, s, a1, s1 = path.alpha[i], path.sigma[i], path.alpha[i + 1], path.sigma[i + 1]
    guess = a1 * d.x0 + s1 * d.eps

    def mean() -> Array:
        e = denoise(guess, i + 1)
        return x + (a1 - a) * (d.x0 + e.x0) / 2 + (s1 - s) * (d.eps + e.eps) / 2

    return jax.lax.cond(s1 > 0, mean, lambda: guess), past


def log_ratio(path: SamplingGrid, i: Array) -> Array:
    """lambda = log(alpha / sigma): -inf in pure noise, inf at the clean image."""
    return jnp.log(path.alpha[i]) - jnp.log(path.sigma[i])


def _slope(path: SamplingGrid, i: Array, x0: Array, past: SolverState) -> tuple[Array, Array]:
    """h, the step in lambda from stop i, and the slope of x0 over it; 0 where the slope is unknown, and in the last
    step, which is of first order (Lu et al. 2022, DPM-Solver++; Zhao et al. 2023)."""
    h, before = log_ratio(path, i + 1) - log_ratio(path, i), log_ratio(path, i) - log_ratio(path, jnp.maximum(i - 1, 0))
    known = ~past.first & (i < path.steps - 1) & jnp.isfinite(h) & jnp.isfinite(before)
    r = jnp.where(known, before / jnp.where(known, h, 1.0), 1.0)
    return h, jnp.where(known, (x0 - past.x0) / r, 0.0)


def dpm_solver(
    path: SamplingGrid, i: Array, x: Array, denoise: Denoise, past: SolverState, noise: Noise, eta: Array
) -> tuple[Array, SolverState]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); eta adds noise, and eta = 1 solves the SDE (eq. 18)."""
    d = with_classifier_gradient(denoise, path)(x, i)
    h, slope = _slope(path, i, d.x0, past)
    a1, s1, eta = path.alpha[i + 1], path.sigma[i + 1], expand_like(eta, x)
    lost = jnp.where(eta > 0, h * jnp.where(eta > 0, eta, 1.0), 0.0)
    kept = jnp.where(s1 > 0, s1 / path.sigma[i] * jnp.exp(-lost), 0.0)
    new = jnp.where(s1 > 0, s1 * jnp.sqrt(-jnp.expm1(-2 * lost)), 0.0)
    x1 = kept * x - a1 * jnp.expm1(-h - lost) * (d.x0 + slope / 2) + new * noise(i)
    return x1, SolverState(x, d.x0, slope, jnp.bool_(False), past.first)


def dpm_solver_sde(
    path: SamplingGrid, i: Array, x: Array, denoise: Denoise, past: SolverState, noise: Noise, eta: Array
) -> tuple[Array, SolverState]:
    """`dpm_solver` with eta = 1: the SDE solver."""
    return dpm_solver(path, i, x, denoise, past, noise, jnp.ones_like(eta))


def unipc(
    path: SamplingGrid, i: Array, x: Array, denoise: Denoise, past: SolverState, noise: Noise, eta: Array
) -> tuple[Array, SolverState]:
    """UniPC of order 2 with B(h) = e^h - 1 (Zhao et al. 2023, algorithms 1 and 2), on x0; one evaluation per step.

    x was predicted at the previous stop. Its evaluation corrects x, and the corrected x predicts that of the next stop.
    """
    d = with_classifier_gradient(denoise, path)(x, i)
    x = jnp.where(past.first, x, _corrected(path, jnp.maximum(i - 1, 0), d.x0, past))
    h, slope = _slope(path, i, d.x0, past)
    kept = jnp.where(path.sigma[i + 1] > 0, path.sigma[i + 1] / path.sigma[i], 0.0)
    guess = kept * x - path.alpha[i + 1] * jnp.expm1(-h) * (d.x0 + slope / 2)
    return guess, SolverState(x, d.x0, slope, jnp.bool_(False), past.first)


def _corrected(path: SamplingGrid, i: Array, x0: Array, past: SolverState) -> Array:
    """x at stop i + 1, corrected: from x and x0 at stop i, and the x0 evaluated at the predicted x of stop i + 1."""
    h, before = log_ratio(path, i + 1) - log_ratio(path, i), log_ratio(path, i) - log_ratio(path, jnp.maximum(i - 1, 0))
    whole = jnp.expm1(-h)
    first = -whole / h - 1
    b1, b2 = first / whole, 2 * (-first / h - 0.5) / whole
    second_order = ~past.second & jnp.isfinite(before)
    w_slope = jnp.where(second_order, (b1 - b2) / (1 + before / h), 0.0)
    w_new = jnp.where(second_order, b1 - w_slope, 0.5)
    # In pure noise h is infinite: only the prediction itself can be corrected.
    w_slope, w_new = (jnp.where(jnp.isfinite(h), w, 0.0) for w in (w_slope, w_new))
    kept = path.sigma[i + 1] / path.sigma[i]
    mixed = past.x0 * whole + whole * (w_slope * past.slope + w_new * (x0 - past.x0))
    return kept * past.x - path.alpha[i + 1] * mixed


SOLVERS: dict[str, Step] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "ancestral": ancestral,
    "heun": heun,
    "dpm++": dpm_solver,
    "dpm++sde": dpm_solver_sde,
    "unipc": unipc,
}
"""Solvers by the name that a config has; a user's own is `SOLVERS["name"] = step`."""
_OF_PACKAGE = dict(SOLVERS)


def has_own_solvers() -> bool:
    """Whether a program has added or replaced solvers."""
    return SOLVERS != _OF_PACKAGE


def default_eta(solver: str) -> float:
    """The eta of a solver where options give none; `ancestral` and `dpm++sde` add all of their noise whatever it is."""
    return 1.0 if solver == "ddpm" else 0.0
