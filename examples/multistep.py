"""A solver: linear multistep of second order in sigma / alpha (Liu et al. 2022, PNDM, arXiv:2202.09778, section 3.3).

from examples import multistep
experiment = Experiment(Diffusion(DiT(...), solver="lms"), data)
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from t2i_jax.core.noise import SamplingGrid
from t2i_jax.sampling.solvers import SOLVERS, Denoise, Noise, SolverState, with_classifier_gradient


def lms(
    path: SamplingGrid, i: Array, x: Array, denoise: Denoise, past: SolverState, noise: Noise, eta: Array
) -> tuple[Array, SolverState]:
    """x / alpha moves along eps, extrapolated linearly to the middle of the step; one evaluation per step.

    d(x / alpha) = eps d(sigma / alpha), so Adams-Bashforth of order 2 with steps of unequal length. The first step, and
    one out of pure noise, is `ddim`'s.
    """
    d = with_classifier_gradient(denoise, path)(x, i)
    before = jnp.maximum(i - 1, 0)
    ratio = lambda n: path.sigma[n] / jnp.maximum(path.alpha[n], 1e-12)
    h, h_before = ratio(i + 1) - ratio(i), ratio(i) - ratio(before)
    known = ~past.first & (path.alpha[before] > 0)
    old = (past.x - path.alpha[before] * past.x0) / path.sigma[before]
    change = jnp.where(known, h / (2 * jnp.where(known, h_before, 1.0)), 0.0) * (d.eps - old)
    # Of the same x, with eps + change: x0 is smaller by sigma / alpha times the change.
    x0 = d.x0 - jnp.where(known, ratio(i), 0.0) * change
    x1 = path.alpha[i + 1] * x0 + path.sigma[i + 1] * (d.eps + change)
    return x1, SolverState(x, d.x0, jnp.zeros_like(x), jnp.bool_(False), past.first)


SOLVERS["lms"] = lms
