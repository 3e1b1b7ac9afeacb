"""Solvers along the stops of diffusers' schedulers, with the same noise: the same trajectories."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.noise.gaussian import split
from t2i_jax.noise.processes import Discrete, along
from t2i_jax.sampling.solvers import SOLVERS, Denoised, SolverState

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

STEPS = 10
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROCESS = Discrete("scaled_linear")
EVEN = BETAS | {"timestep_spacing": "linspace"}
PLUS = EVEN | {"lower_order_final": False}
NOISE = np.random.default_rng(0).normal(size=(STEPS + 1, 2, 3)).astype(np.float32)


def said(x, t, xp=np):
    """What a network would say of x at time t: nothing that any law has, and not too wild."""
    return xp.tanh(0.9 * x + 0.4 * xp.sin(t / 300.0)) - 0.2 * xp.roll(x, 1, -1)


def their_way(scheduler, monkeypatch, x, **step):
    """x and what follows it at each step, and the stops: times, sigma over alpha."""
    module = importlib.import_module(type(scheduler).__module__)
    taken = iter(torch.tensor(NOISE[1:]))
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(taken))
    x, way = torch.tensor(x), []
    for t in scheduler.timesteps:
        read = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out = torch.tensor(said(read.numpy(), np.float32(t)))
        x = scheduler.step(out, t, x, **step).prev_sample
        way.append(x.numpy())
    return np.stack(way)


def our_way(solver, path, x, predicts="eps", eta=0.0, v=None):
    """x at each stop behind the first."""

    def denoise(x, i):
        x0, eps = split(predicts, said(x, path.t[i], jnp), x, path.alpha[i], path.sigma[i])
        return Denoised(x0, eps, None if v is None else jnp.full_like(x, v))

    def step(carry, i):
        noise = lambda i: jnp.asarray(NOISE[1:])[i]
        carry = SOLVERS[solver](path, i, carry[0], denoise, carry[1], noise, jnp.float32(eta))
        return carry, carry[0]

    yes, zeros = jnp.bool_(True), jnp.zeros_like(x)
    past = SolverState(jnp.asarray(x), zeros, zeros, yes, yes)
    return np.asarray(jax.jit(lambda x: jax.lax.scan(step, (x, past), jnp.arange(STEPS))[1])(x))


def stops(scheduler):
    """The path of a scheduler whose sigmas are those of noise on pictures as they are."""
    sigma = np.asarray(scheduler.sigmas, np.float64)
    alpha = (1 + sigma**2) ** -0.5
    t = np.append(np.asarray(scheduler.timesteps, np.float64), 0)
    f = lambda x: jnp.asarray(x, jnp.float32)
    return along(f(t), f(alpha), f(alpha * sigma), STEPS)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())


def made(kind, **fields):
    scheduler = getattr(diffusers, kind)(**fields)
    scheduler.set_timesteps(STEPS)
    return scheduler


@pytest.mark.parametrize(("variance", "v"), [("fixed_large", None), ("fixed_small", -1.0)])
def test_ddpm(monkeypatch, variance, v):
    scheduler = made("DDPMScheduler", **EVEN, variance_type=variance, clip_sample=False)
    path = PROCESS.timesteps(STEPS)
    np.testing.assert_array_equal(path.t[:STEPS], scheduler.timesteps)
    close(our_way("ddpm", path, NOISE[0], eta=1.0, v=v), their_way(scheduler, monkeypatch, NOISE[0]))


def test_ddim(monkeypatch):
    scheduler = made("DDIMScheduler", **BETAS, timestep_spacing="leading", clip_sample=False)
    path = PROCESS.timesteps(STEPS, stride=True)
    np.testing.assert_array_equal(path.t[:STEPS], scheduler.timesteps)
    close(our_way("ddim", path, NOISE[0], eta=0.7), their_way(scheduler, monkeypatch, NOISE[0], eta=0.7))


@pytest.mark.parametrize(
    ("solver", "kind"), [("euler", "EulerDiscreteScheduler"), ("ancestral", "EulerAncestralDiscreteScheduler")]
)
def test_euler(monkeypatch, solver, kind):
    scheduler = made(kind, **EVEN)
    path = PROCESS.timesteps(STEPS)
    np.testing.assert_allclose(path.t[:STEPS], scheduler.timesteps)
    np.testing.assert_allclose(path.sigma[: STEPS + 1] / path.alpha[: STEPS + 1], scheduler.sigmas, rtol=1e-4)
    theirs = their_way(scheduler, monkeypatch, NOISE[0] / float(path.alpha[0]))
    close(our_way(solver, path, NOISE[0]), theirs * np.asarray(path.alpha)[1 : STEPS + 1, None, None])


@pytest.mark.parametrize(
    ("solver", "kind", "fields"),
    [
        ("dpm++", "DPMSolverMultistepScheduler", PLUS | {"prediction_type": "v_prediction"}),
        ("dpm++sde", "DPMSolverMultistepScheduler", PLUS | {"algorithm_type": "sde-dpmsolver++"}),
        ("unipc", "UniPCMultistepScheduler", EVEN | {"solver_type": "bh2"}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_multistep(monkeypatch, solver, kind, fields):
    scheduler = made(kind, **fields)
    kind = {"v_prediction": "v"}.get(fields.get("prediction_type"), "eps")
    theirs = their_way(scheduler, monkeypatch, NOISE[0])
    ours = our_way(solver, stops(scheduler), NOISE[0], kind)
    close(ours, theirs)


@pytest.mark.parametrize(
    ("solver", "kind"), [("euler", "FlowMatchEulerDiscreteScheduler"), ("heun", "FlowMatchHeunDiscreteScheduler")]
)
def test_flow(monkeypatch, solver, kind):
    scheduler = made(kind, shift=3.0)
    theirs = their_way(scheduler, monkeypatch, NOISE[0])
    if solver == "heun":  # theirs tells each guess too, and asks twice at every stop but the first
        theirs = np.concatenate([theirs[1::2], theirs[-1:]])
    sigma = np.unique(np.asarray(scheduler.sigmas))[::-1]
    t = np.append(np.unique(np.asarray(scheduler.timesteps))[::-1], 0)
    path = along(jnp.asarray(t), jnp.asarray(1 - sigma), jnp.asarray(sigma.copy()), STEPS)
    close(our_way(solver, path, NOISE[0], "velocity"), theirs)
