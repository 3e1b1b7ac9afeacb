"""Paths end where they should for every number of steps, and solvers draw what independent recursions say."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.bench import solvers as bench
from t2i_jax.bench.recursion import law, recursion
from t2i_jax.cli import main
from t2i_jax.noise.processes import EDM, Discrete, Flow, along
from t2i_jax.noise.schedule import NAMES, Schedule
from t2i_jax.sampling.solvers import SOLVERS, Denoised, solve
from tests.fixtures.exact import time_of

SPACINGS = ("default", "even", "karras", "log_snr")
KINDS = {
    **bench.PROCESSES,
    **{f"Discrete, {name}, 50 steps": Discrete(name, 50) for name in sorted(NAMES)},
    "Flow, shift 1.15": Flow(shift=1.15),
    "Flow, shift 0.3": Flow(shift=0.3, toward=True),
    "EDM, rho 1": EDM(rho=1.0),
}
MEAN, STD = 0.6, 0.3
SIZE = max(bench.STEPS) + 2


def fine(process, path, steps):
    """The clean end is exact, every step lessens the noise, and what follows from the stops is finite."""
    alpha, sigma = (np.asarray(x)[: steps + 1] for x in (path.alpha, path.sigma))
    assert sigma[-1] == 0 and alpha[-1] == 1 and int(path.steps) == steps
    assert (np.asarray(path.sigma)[steps:] == 0).all() and (np.asarray(path.alpha)[steps:] == 1).all()
    with np.errstate(divide="ignore"):
        assert (np.diff(alpha / sigma) > 0).all() and (alpha >= 0).all()
    assert all(np.isfinite(np.asarray(x)[:steps]).all() for x in (path.t, path.low, path.high))
    if isinstance(process, Flow):
        assert alpha[0] == 0 and sigma[0] == 1


FEW = ("Discrete, linear", "Discrete, cosine", "Discrete, jsd, 50 steps", "Flow", "Flow, shift 1.15", "EDM")


@pytest.mark.parametrize("name", FEW)
def test_paths_end_clean_for_every_number_of_steps_compiled_and_not(name):
    process = KINDS[name]
    compiled = jax.jit(process.timesteps)
    for steps in (*range(1, min(process.max_steps, 200) + 1), process.max_steps - 1, process.max_steps):
        fine(process, compiled(jnp.int32(steps)), steps)
    for steps in (1, 2, 3, 25, 41, 47, 50):
        fine(process, process.timesteps(steps), steps)
    for spacing in SPACINGS[1:]:
        compiled = jax.jit(partial(process.timesteps, spacing=spacing))
        for steps in (1, 2, 3, 7, 25, 49, 50):
            fine(process, compiled(jnp.int32(steps)), steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_paths_end_clean_up_to_their_bound(name):
    process = KINDS[name]
    for spacing in SPACINGS:
        compiled = jax.jit(partial(process.timesteps, spacing=spacing))
        for steps in range(1, process.max_steps + 1):
            fine(process, compiled(jnp.int32(steps)), steps)
    for steps in range(1, 201 if process.max_steps > 200 else process.max_steps + 1):
        fine(process, process.timesteps(steps), steps)


@pytest.mark.parametrize("process", [Discrete("linear"), Discrete("cosine", 60, zero_terminal_snr=True)], ids=str)
def test_strided_steps_begin_in_noise_or_where_published_ones_do(process):
    compiled = jax.jit(process.timesteps)
    for steps in (*range(1, 60), process.steps - 1, process.steps):
        path = compiled(jnp.int32(steps), True)
        fine(process, path, steps)
        first, widest = int(path.t[0]), -(-process.steps // steps)
        published = [k for k in range(1, process.steps) if len(range(0, process.steps, k)) == steps]
        assert first == (min(published) * (steps - 1) if published and steps > 1 else process.steps - 1)
        assert first >= process.steps - widest


@pytest.mark.parametrize("stride", [False, True])
@pytest.mark.parametrize("name", bench.PROCESSES)
def test_one_step_begins_in_noise_and_gives_the_mean(name, stride):
    """Of whatever the network says of the variance: nothing of it is used in the last step."""
    process = bench.PROCESSES[name]
    path = jax.jit(process.timesteps)(jnp.int32(1), stride)
    two = process.timesteps(2, False)
    np.testing.assert_allclose(path.sigma[0], two.sigma[0], rtol=1e-6)
    np.testing.assert_allclose(path.alpha[0], two.alpha[0], rtol=1e-5)
    x = jax.random.normal(jax.random.key(0), (5, 1))
    for solver in SOLVERS:
        denoise = lambda x, i: Denoised(jnp.full_like(x, MEAN), x, jnp.tanh(x))
        out = solve(SOLVERS[solver], denoise, x, path, lambda i: x + 1, 1.0)
        np.testing.assert_allclose(out, MEAN, rtol=1e-5)


def test_one_step_of_a_process_is_the_noisiest():
    """Sections are as published: of one with one step, the first is kept."""
    whole = Schedule.named("linear", 100)
    for spacing, last in {"1": 99, "4": 99, "3,1": 50, "5,5": 99, "ddim4": 75}.items():
        assert whole.respaced(spacing).timestep_map[-1] == last
    for schedule in (whole.respaced("1"), whole.strided(1, 8), Schedule.named("linear", 1)):
        assert np.isfinite(np.asarray(schedule.posterior_log_variance)[0])


@pytest.mark.parametrize("spacing", SPACINGS[1:])
@pytest.mark.parametrize("name", [*FEW, "Discrete, linear, zero terminal SNR", "Flow, shift 0.3", "EDM, rho 1"])
def test_stops_are_spaced_as_named_and_networks_are_told_their_times(name, spacing):
    process, steps = KINDS[name], 12
    path, default = process.timesteps(steps, spacing=spacing), process.timesteps(steps)
    np.testing.assert_allclose(path.sigma[0] / path.alpha[0], default.sigma[0] / default.alpha[0], rtol=1e-4)
    found = process.alpha_sigma(time_of(process, path.t[:steps]), jnp.zeros(steps))
    np.testing.assert_allclose(path.alpha[:steps], found[0], rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(path.sigma[:steps], found[1], rtol=2e-3)
    first = int(path.alpha[0] < 1e-3)
    ratio = np.asarray(path.sigma, np.float64)[first:steps] / np.asarray(path.alpha, np.float64)[first:steps]
    if spacing == "even":
        time = np.asarray(time_of(process, path.t))
        if isinstance(process, EDM):
            time = np.arctan(np.exp(time) / process.data)
        if isinstance(process, Flow):
            time = time / (process.shift - (process.shift - 1) * time)
        gaps = np.diff(time[:steps])
    else:
        rho = process.rho if isinstance(process, EDM) else 7
        gaps = np.diff(np.log(ratio) if spacing == "log_snr" else ratio ** (1 / rho))
    np.testing.assert_allclose(gaps, gaps.mean(), rtol=1e-2)
    if spacing != "even":
        least = process.timesteps(process.max_steps)
        last = least.sigma[process.max_steps - 1] / least.alpha[process.max_steps - 1]
        np.testing.assert_allclose(ratio[-1], last, rtol=1e-3)


def test_an_unknown_spacing_is_refused():
    for process in (Discrete(), Flow(), EDM()):
        with pytest.raises(ValueError, match="spacing 'odd' is not one of default, even"):
            process.timesteps(4, spacing="odd")  # pyright: ignore[reportArgumentType]


# -- laws


def close(found, path, solver, eta, steps, std):
    """Mean and standard deviation within 1 % of what the recursion gives over the same stops."""
    alpha, sigma = (np.asarray(x, np.float64)[: steps + 1] for x in (path.alpha, path.sigma))
    mean, spread = law(np.asarray(found, np.float64))
    wanted = recursion(solver, eta, alpha, sigma, MEAN, std)
    assert abs(mean - wanted[0]) <= 0.01 * std, (steps, mean, wanted)
    assert abs(spread - wanted[1]) <= 0.01 * wanted[1] + 1e-6, (steps, spread, wanted)


@pytest.mark.parametrize("kind", bench.KINDS)
@pytest.mark.parametrize("name", bench.PROCESSES)
def test_compiled_solvers_agree_with_recursions_from_the_papers(name, kind):
    solver, eta = bench.KINDS[kind]
    for steps in bench.STEPS:
        for spacing, std in (("default", STD), ("default", 0.1), ("log_snr", STD)):
            path = bench.path_of(bench.PROCESSES[name], steps, spacing)
            close(bench.drawn(solver, path, MEAN, std, SIZE, eta), path, solver, eta, steps, std)


def run(process, solver, eta, steps):
    """Path and solver in one, as a sampler has them."""
    path, x = process.timesteps(steps), jax.nn.one_hot(1, SIZE)
    return bench.coefficients(solver, path, MEAN, STD, SIZE, eta, jnp.int32(0), x), path


@pytest.mark.slow
@pytest.mark.parametrize("kind", bench.KINDS)
@pytest.mark.parametrize("name", bench.PROCESSES)
def test_solvers_agree_with_recursions_compiled_with_their_path_and_eager(name, kind):
    process, (solver, eta) = bench.PROCESSES[name], bench.KINDS[kind]
    compiled = jax.jit(partial(run, process, solver, eta))
    for steps in bench.STEPS:
        for found, path in (compiled(jnp.int32(steps)), run(process, solver, eta, steps)):
            close(found, path, solver, eta, steps, STD)


@pytest.mark.parametrize("kind", ["dpm++", "heun", "ddpm"])
@pytest.mark.parametrize("name", ["Discrete, linear", "Flow, shift 3", "EDM"])
def test_eager_solvers_agree_with_recursions(name, kind):
    solver, eta = bench.KINDS[kind]
    for steps in (1, 25):
        close(*run(bench.PROCESSES[name], solver, eta, steps), solver, eta, steps, STD)


ORDERS = {"ddpm": 1, "ddim": 1, "ddim, eta 1": 1, "heun": 2, "dpm++": 2, "dpm++sde": 2, "unipc": 2}


@pytest.mark.parametrize("name", ["Discrete, linear", "Discrete, cosine", "Flow", "Flow, shift 3", "EDM"])
@pytest.mark.parametrize("kind", ORDERS)
def test_errors_against_the_law_fall_at_the_order_of_the_solver(name, kind):
    assert bench.order(kind, bench.PROCESSES[name], 48, MEAN, 0.5, SIZE) > ORDERS[kind] - 0.35


@pytest.mark.parametrize("name", bench.PROCESSES)
def test_errors_at_the_end_vanish_with_steps(name):
    for kind in bench.KINDS:
        few, more = (bench.compared(kind, bench.PROCESSES[name], n, MEAN, 0.5, size=SIZE) for n in (25, 200))
        gaps = [abs(x["std"] - 1) + abs(x["mean"]) for x in (few, more)]
        assert gaps[1] < 0.08 and gaps[1] < 0.6 * gaps[0] + 0.006, (kind, gaps)


@pytest.mark.parametrize("solver", ["dpm++", "dpm++sde", "unipc"])
def test_the_last_step_of_a_multistep_solver_is_of_first_order_however_long_it_is(solver):
    """Also where a path of one's own ends a little above the clean end."""
    path = Flow().timesteps(20)
    sigma = path.sigma.at[20].set(1e-7)
    near = path._replace(sigma=sigma, alpha=path.alpha.at[20].set(1 - 1e-7))
    ends = [law(np.asarray(bench.drawn(solver, p, MEAN, 0.1, SIZE, 0.0), np.float64)) for p in (path, near)]
    np.testing.assert_allclose(*ends, rtol=1e-3)


def test_paths_through_given_stops_end_clean():
    path = along(jnp.linspace(1, 0, 9), jnp.linspace(0, 1, 9), jnp.linspace(1, 1e-8, 9), 6)
    assert path.sigma[6] == 0 and path.alpha[6] == 1 and path.sigma[5] > 0


@pytest.mark.slow
def test_the_page_of_solvers_is_made_by_one_command(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "COUNT", 100)
    out = tmp_path / "page.md"
    main(["bench", "solvers", "--steps", "1", "8", "--std", "0.5", "--out", str(out)])
    text = out.read_text()
    assert all(f"## {name}, mean 0.6, std 0.5" in text for name in bench.PROCESSES) and "## Inpainting" in text
    assert out.with_suffix(".png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        main(["bench", "solvers", "--steps", "0"])
