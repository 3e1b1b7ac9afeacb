"""Solvers: exact on a Gaussian whose score is known, of their order, alike where they should be; guidance."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import examples.multistep  # noqa: F401  (registers lms)
from t2i_jax.noise.gaussian import ddpm_step, p_mean_variance
from t2i_jax.noise.processes import EDM, Discrete, Flow
from t2i_jax.noise.schedule import Schedule
from t2i_jax.sampling import guidance
from t2i_jax.sampling.solvers import SOLVERS, Denoised, solve

MEAN, STD = 0.6, 0.5  # of the pictures, which are single numbers

PROCESSES = [Discrete("cosine", 1000), Flow(max_steps=1024), EDM(data=1.0, max_steps=1024)]


def exact(path, x, i):
    """The mean of x_0 given x, and the noise that it leaves."""
    a, s = path.alpha[i], path.sigma[i]
    x0 = MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)
    return Denoised(x0, (x - a * x0) / s)


@partial(jax.jit, static_argnames=("process", "solver"))
def ran(process, solver, x, steps, key, eta=0.0):
    path = process.timesteps(steps)
    noise = lambda i: jax.random.normal(jax.random.fold_in(key, i), x.shape)
    return solve(SOLVERS[solver], lambda x, i: exact(path, x, i), x, path, noise, eta)


@partial(jax.jit, static_argnames=("process", "solver"))
def error(process, solver, steps):
    """At the end of the middle three quarters of the way, where quantiles should still be quantiles.

    The first step may come from a lambda of minus infinity and the last always goes to infinity: no order holds there.
    """
    path, start, stop = process.timesteps(steps), steps // 8, 7 * steps // 8
    law = lambda i: (path.alpha[i] * MEAN, jnp.sqrt((path.alpha[i] * STD) ** 2 + path.sigma[i] ** 2))
    z = jnp.linspace(-2, 2, 9)[:, None]
    (mean, std), (end_mean, end_std) = law(start), law(stop)
    path = path._replace(steps=stop)
    x = solve(SOLVERS[solver], lambda x, i: exact(path, x, i), mean + std * z, path, jnp.zeros_like, 0.0, start)
    return jnp.abs(x - (end_mean + end_std * z)).max()


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpm++", 2), ("unipc", 2), ("lms", 2)])
def test_deterministic_solvers_converge_at_their_order(process, solver, order):
    few, more = (float(error(process, solver, n)) for n in (16, 64))
    assert more < 0.05 and few / max(more, 2e-6) > 4 ** (order - 0.4), (few, more)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("solver", ["euler", "heun", "dpm++", "unipc"])
def test_deterministic_solvers_keep_quantiles_to_the_end(process, solver):
    z = jnp.linspace(-2, 2, 9)[:, None]
    path = process.timesteps(100)
    a, s = path.alpha[0], path.sigma[0]
    x = a * MEAN + jnp.sqrt((a * STD) ** 2 + s**2) * z
    out = ran(process, solver, x, 100, jax.random.key(0))
    np.testing.assert_allclose(out, MEAN + STD * z, atol=0.03)


def test_better_solvers_are_better():
    errors = {name: error(PROCESSES[0], name, 24) for name in ("euler", "heun", "dpm++", "unipc")}
    assert max(errors["heun"], errors["dpm++"], errors["unipc"]) < errors["euler"] / 3


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(("solver", "eta"), [("ddpm", 1.0), ("ddim", 0.7), ("ancestral", 0.0), ("dpm++sde", 0.0)])
def test_random_solvers_draw_the_law(process, solver, eta):
    x = jax.random.normal(jax.random.key(1), (4000, 1))
    out = np.asarray(ran(process, solver, x, 200, jax.random.key(2), eta))
    assert abs(out.mean() - MEAN) < 0.04 and abs(out.std() - STD) < 0.04


def test_ddpm_along_a_path_is_that_of_the_tables():
    process, few = Discrete("linear", 100), Schedule.named("linear", 100).respaced("10")
    rng = np.random.default_rng(0)
    eps, v, noise = (jnp.asarray(rng.normal(size=(10, 2, 3)), jnp.float32) for _ in range(3))
    path, x = process.timesteps(10), jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    v = jnp.tanh(v)
    said = lambda x, i: Denoised((x - path.sigma[i] * eps[i]) / path.alpha[i], eps[i], v[i])
    ours = solve(SOLVERS["ddpm"], said, x, path, lambda i: noise[i], 1.0)
    for i in range(10):
        t = jnp.full(2, 9 - i)
        x = ddpm_step(p_mean_variance(few, eps[i], x, t, v=v[i]), t, noise[i])
    np.testing.assert_allclose(ours, x, rtol=1e-4, atol=1e-4)


def test_a_gradient_moves_samples_to_the_posterior():
    """Pictures N(MEAN, STD^2) seen through y = x_0 + noise: the noised likelihood's gradient gives p(x_0 | y)."""
    process, y, noise_std = Discrete("linear", 1000), 1.5, 0.4
    path = jax.jit(process.timesteps)(200)

    def denoise(x, i):
        d, a, s = exact(path, x, i), path.alpha[i], path.sigma[i]
        spread = STD**2 * s**2 / (a**2 * STD**2 + s**2) + noise_std**2
        log_p = lambda x: -0.5 * (y - exact(path, x, i).x0[:, 0]) ** 2 / spread
        return d._replace(classifier_gradient=guidance.classifier_gradient(log_p, x, 1.0))

    precision = 1 / STD**2 + 1 / noise_std**2
    mean = (MEAN / STD**2 + y / noise_std**2) / precision
    x = jax.random.normal(jax.random.key(3), (4000, 1))
    for solver, eta in (("ddpm", 1.0), ("dpm++", 0.0)):
        draw = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(4), i), x.shape)
        out = np.asarray(jax.jit(lambda x, s=solver, e=eta, d=draw: solve(SOLVERS[s], denoise, x, path, d, e))(x))
        assert abs(out.mean() - mean) < 0.04 and abs(out.std() - precision**-0.5) < 0.04


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "process",
    [Flow(max_steps=8), Discrete("linear", 50), Discrete("linear", 50, zero_terminal_snr=True)],
    ids=["flow", "discrete", "zero terminal snr"],
)
def test_gradients_leave_what_is_drawn_finite_and_of_scale_0_as_it_was(process, solver):
    """Also where the first stop is noise alone, alpha = 0."""
    path, noise = (
        jax.jit(process.timesteps)(6),
        lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(5), i), (4, 1)),
    )
    log_p = lambda x: -((x[:, 0] - 1) ** 2)

    @jax.jit
    def drawn(scale):
        pull = lambda x: None if scale is None else guidance.classifier_gradient(log_p, x, scale)
        denoise = lambda x, i: exact(path, x, i)._replace(classifier_gradient=pull(x))
        return solve(SOLVERS[solver], denoise, noise(99), path, noise, 0.5)

    without, off, on = drawn(None), drawn(0.0), drawn(1.0)
    np.testing.assert_allclose(off, without, rtol=1e-5, atol=1e-6)
    assert np.isfinite(on).all() and float(jnp.abs(on - without).max()) > 1e-3


def test_guidance_composes():
    value, null = jax.random.normal(jax.random.key(0), (2, 2, 4, 4, 5))
    np.testing.assert_array_equal(guidance.guide(value, null, 1.0), value)
    np.testing.assert_allclose(guidance.guide(value, null, jnp.asarray([0.0, 3.0]))[0], null[0], atol=1e-6)
    three = guidance.guide(value, null, 4.0, channels=3)
    np.testing.assert_array_equal(three[..., 3:], value[..., 3:])
    np.testing.assert_allclose(three[..., :3], (null + 4 * (value - null))[..., :3], rtol=1e-4, atol=1e-5)
    guided = guidance.guide(value, null, 6.0)
    back = guidance.rescale(guided, value, 1.0)
    np.testing.assert_allclose(back.std((1, 2, 3)), value.std((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(guidance.rescale(guided, value, 0.0), guided, rtol=1e-6)
    scales = [float(guidance.within(5.0, at, 0.25, 0.75)) for at in (0.0, 0.25, 0.5, 0.75)]
    assert scales == [1.0, 5.0, 5.0, 1.0]
