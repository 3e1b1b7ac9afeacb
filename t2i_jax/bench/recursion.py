"""Results of solvers on Gaussian images, in float64 NumPy: the papers' formulas, without `sampling.solvers`.

The best denoiser of images N(mean, std^2) is linear in x, so the x of every stop is linear in the normal numbers it
was made of. It is kept as its coefficients: of 1, of the noise that the sampler starts from, and of the noise of each
step. Mean and standard deviation follow without drawing anything.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Denoiser = Callable[[Array, int], Array]
"""(x, i) -> E[x_0 | x] at stop i, on coefficients"""


def law(x: Array) -> tuple[float, float]:
    """Mean and standard deviation of coefficients (n + 2,)."""
    return float(x[0]), float(np.linalg.norm(x[1:]))


def gaussian(alpha: Array, sigma: Array, mean: float, std: float) -> Denoiser:
    """(x, i) -> E[x_0 | x] at stop i, on coefficients."""

    def x0(x: Array, i: int) -> Array:
        a, s = alpha[i], sigma[i]
        gain = a * std**2 / (a**2 * std**2 + s**2)
        one = np.zeros_like(x)
        one[0] = mean
        return one + gain * (x - a * one)

    return x0


def recursion(solver: str, eta: float, alpha: Array, sigma: Array, mean: float, std: float) -> tuple[float, float]:
    """Mean and standard deviation that a solver draws of images N(mean, std^2), from N(0, 1) at the first stop.

    alpha, sigma: float64 (n + 1,) of the stops, the last 1 and 0. eta: where the solver has one. Solvers are those of
    `sampling.solvers.SOLVERS`, fixed_large for ddpm. Errors: KeyError for another.
    """
    steps = len(alpha) - 1
    x, noise = np.eye(steps + 2)[1], np.eye(steps + 2)[2:]
    x0 = gaussian(alpha, sigma, mean, std)
    if solver in MULTISTEP:
        return law(MULTISTEP[solver](x, x0, alpha, sigma, eta, noise))
    for i in range(steps):
        x = SINGLE[solver](x, x0, alpha, sigma, eta, i) @ np.vstack([np.eye(steps + 2), noise[i]])
    return law(x)


# -- one step: coefficients of the next x, that of the step's own noise last


def _ddpm(x: Array, x0: Denoiser, alpha: Array, sigma: Array, eta: float, i: int) -> Array:
    """Ho et al. (2020), algorithm 2 with eqs. 6 and 7 and the variance beta; the last step adds no noise."""
    kept = alpha[i] / alpha[i + 1]
    beta = sigma[i] ** 2 - (kept * sigma[i + 1]) ** 2
    mean = (alpha[i + 1] * beta * x0(x, i) + kept * sigma[i + 1] ** 2 * x) / sigma[i] ** 2
    return np.append(mean, eta * beta**0.5 if i < len(alpha) - 2 else 0.0)


def _ddim(x: Array, x0: Denoiser, alpha: Array, sigma: Array, eta: float, i: int) -> Array:
    """Song et al. (2021), eq. 12 with the sigma_t(eta) of eq. 16."""
    abar_ratio = (alpha[i] / alpha[i + 1]) ** 2
    beta = sigma[i] ** 2 - abar_ratio * sigma[i + 1] ** 2  # 1 - abar_t / abar_{t - 1} where variance is preserved
    new = eta * sigma[i + 1] / sigma[i] * beta**0.5
    found = x0(x, i)
    eps = (x - alpha[i] * found) / sigma[i]
    return np.append(alpha[i + 1] * found + (sigma[i + 1] ** 2 - new**2) ** 0.5 * eps, new)


def _euler(x: Array, x0: Denoiser, alpha: Array, sigma: Array, eta: float, i: int) -> Array:
    """dy / ds = (y - x_0) / s with y = x / alpha and s = sigma / alpha (Karras et al. 2022, eq. 3)."""
    found = x0(x, i)
    if alpha[i] == 0:  # y is infinite: the same line, of which y / s is the noise
        return np.append(alpha[i + 1] * found + sigma[i + 1] * x / sigma[i], 0.0)
    y, s, s1 = x / alpha[i], sigma[i] / alpha[i], sigma[i + 1] / alpha[i + 1]
    return np.append(alpha[i + 1] * (y + (s1 - s) * (y - found) / s), 0.0)


def _heun(x: Array, x0: Denoiser, alpha: Array, sigma: Array, eta: float, i: int) -> Array:
    """Karras et al. (2022), algorithm 1, along alpha' x_0 + sigma' eps; Euler's step to sigma = 0."""

    def slope(x: Array, i: int) -> tuple[Array, Array]:
        found = x0(x, i)
        return found, (x - alpha[i] * found) / sigma[i]

    d = slope(x, i)
    da, ds = alpha[i + 1] - alpha[i], sigma[i + 1] - sigma[i]
    guess = x + da * d[0] + ds * d[1]
    if sigma[i + 1] > 0:
        e = slope(guess, i + 1)
        guess = x + (da * (d[0] + e[0]) + ds * (d[1] + e[1])) / 2
    return np.append(guess, 0.0)


SINGLE = {
    "ddpm": _ddpm,
    "ddim": _ddim,
    "ancestral": lambda x, x0, alpha, sigma, eta, i: _ddim(x, x0, alpha, sigma, 1.0, i),
    "euler": _euler,
    "heun": _heun,
}


# -- multistep solvers, of first order where lambda is infinite, in the first step and in the last


def _lambdas(alpha: Array, sigma: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.log(alpha) - np.log(sigma)


def _dpm(x: Array, x0: Denoiser, alpha: Array, sigma: Array, eta: float, noise: Array) -> Array:
    """Lu et al. (2022), DPM-Solver++(2M), algorithm 2; with eta 1 SDE-DPM-Solver++(2M), eq. 18 and appendix."""
    lambdas, steps, before = _lambdas(alpha, sigma), len(alpha) - 1, None
    for i in range(steps):
        found, d = x0(x, i), x0(x, i)
        h = lambdas[i + 1] - lambdas[i]
        if before is not None and i < steps - 1 and np.isfinite(lambdas[i - 1]):
            r = (lambdas[i] - lambdas[i - 1]) / h
            d = (1 + 1 / (2 * r)) * found - before / (2 * r)
        if eta:
            fading = np.exp(-2 * h)
            ratio = sigma[i + 1] / sigma[i] * np.exp(-h)
            x = ratio * x + alpha[i + 1] * (1 - fading) * d + sigma[i + 1] * (1 - fading) ** 0.5 * noise[i]
        else:
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * (np.exp(-h) - 1) * d
        before = found
    return x


def _unipc(x: Array, x0: Denoiser, alpha: Array, sigma: Array, eta: float, noise: Array) -> Array:
    """Zhao et al. (2023), algorithms 1 (UniC-2) and 2 (UniP-2) on x_0 (appendix), with B(h) = e^h - 1.

    For the prediction of x_0 h enters as -h. The corrector's weights solve R a = phi / B, eq. 5 of the paper.
    """
    lambdas, steps = _lambdas(alpha, sigma), len(alpha) - 1
    xs, founds = [x], [x0(x, 0)]  # corrected, and what is found at the guesses
    for i in range(steps):
        h = lambdas[i + 1] - lambdas[i]
        line = sigma[i + 1] / sigma[i] * xs[i] - alpha[i + 1] * np.expm1(-h) * founds[i]
        second = i > 0 and np.isfinite(lambdas[i - 1])
        guess = line
        r = (lambdas[i - 1] - lambdas[i]) / h if second else np.nan
        if second and i < steps - 1:
            guess = line - alpha[i + 1] * np.expm1(-h) * 0.5 * (founds[i - 1] - founds[i]) / r
        if i == steps - 1:
            return guess
        found = x0(guess, i + 1)
        if not np.isfinite(h):
            corrected = guess
        elif not second:
            corrected = line - alpha[i + 1] * np.expm1(-h) * 0.5 * (found - founds[i])
        else:
            b = np.expm1(-h)
            phi = [b / -h - 1, (b / -h - 1) / -h - 0.5]
            weights = np.linalg.solve(np.asarray([[1.0, 1.0], [r, 1.0]]), np.asarray([phi[0], 2 * phi[1]]) / b)
            parts = weights[0] * (founds[i - 1] - founds[i]) / r + weights[1] * (found - founds[i])
            corrected = line - alpha[i + 1] * b * parts
        xs.append(corrected)
        founds.append(found)
    return x


MULTISTEP = {
    "dpm++": _dpm,
    "dpm++sde": lambda x, x0, alpha, sigma, eta, noise: _dpm(x, x0, alpha, sigma, 1.0, noise),
    "unipc": _unipc,
}
