"""Inpainting with exact denoisers of Gaussian pictures: what is drawn around a known part has the conditional law."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.models.diffusion import Diffusion
from t2i_jax.noise.processes import EDM, Discrete, Flow
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.sampling.progress import listening
from tests.fixtures.exact import Exact, exact, family_of

PROCESSES = {"discrete": Discrete("linear"), "flow": Flow(), "edm": EDM()}
COUNT, KNOWN = 4000, 1.5


def pair(correlation):
    return [[1.0, correlation], [correlation, 1.0]]


def given(count=COUNT):
    """Pictures of two numbers of which the first is known, as `sample` takes them."""
    known = jnp.broadcast_to(jnp.asarray([KNOWN, 0.0])[None, None, :, None], (count, 1, 2, 1))
    return {"known": known, "keep": jnp.broadcast_to(jnp.asarray([True, False])[None, None], (count, 1, 2))}


def keys(count=COUNT):
    return jax.vmap(jax.random.key)(jnp.arange(count))


def errors(process, options, correlation=0.9, solver=None):
    """Errors of mean and standard deviation of the second number given the first, as shares of the true ones."""
    family = family_of(process, 2)
    model = exact(family, [0, 0], pair(correlation))
    drawn = np.asarray(family.sample(model, {}, keys(), options, solver=solver, **given()))[:, 0, :, 0]
    np.testing.assert_allclose(drawn[:, 0], KNOWN, rtol=1e-5)
    return drawn[:, 1].mean() / (correlation * KNOWN) - 1, drawn[:, 1].std() / np.sqrt(1 - correlation**2) - 1


@pytest.mark.parametrize("solver", [None, "dpm++"])
@pytest.mark.parametrize("name", PROCESSES)
def test_errors_fall_with_rounds_and_the_default_halves_them(name, solver):
    """Of replacement alone at resample=1, as before there were rounds; 10 % and less at resample=10."""
    found = [errors(PROCESSES[name], DiffusionSampler(24, resample=k), solver=solver) for k in (1, 2, 4, 10)]
    means, spreads = np.abs(np.asarray(found)).T
    assert (np.diff(means) < 0.01).all() and (np.diff(spreads) < 0.01).all(), found
    assert means[1] < 0.5 * means[0] and spreads[1] < 0.5 * spreads[0], found
    assert means[-1] < 0.1 and spreads[-1] < 0.1, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "correlation"),
    [(None, 0.5), (None, -0.8), ("ddpm", 0.9), ("ancestral", 0.9), ("heun", 0.9), ("unipc", 0.9), ("dpm++sde", 0.9)],
)
@pytest.mark.parametrize("process", [*PROCESSES.values(), Discrete("cosine"), Flow(shift=3.0), EDM(data=1.0)], ids=str)
def test_ten_rounds_are_near_whatever_draws(process, solver, correlation):
    for steps in (24, 50):
        found = np.abs(errors(process, DiffusionSampler(steps, resample=10), correlation, solver))
        assert (found < 0.1).all(), (steps, found)


@pytest.mark.parametrize("name", PROCESSES)
def test_errors_fall_with_steps_too(name):
    few, more = (np.abs(errors(PROCESSES[name], DiffusionSampler(steps), solver="ddim")) for steps in (16, 128))
    assert (more < 0.5 * few + 0.01).all() and (more < 0.1).all(), (few, more)


@pytest.mark.parametrize("process", [Discrete("linear"), Flow(), EDM()], ids=["discrete", "flow", "edm"])
def test_rounds_leave_a_law_as_it_is_where_nothing_is_known(process):
    """Mean and spread of one number, which is to be drawn, by many rounds: the solver's own error is all there is."""
    family = family_of(process, 1)
    model, nothing = exact(family, [0.3], [[0.25]]), jnp.zeros((COUNT, 1, 1), bool)
    for k in (1, 6):
        more = {"known": jnp.zeros((COUNT, 1, 1, 1)), "keep": nothing}
        drawn = family.sample(model, {}, keys(), DiffusionSampler(32, resample=k), solver="heun", **more)
        assert abs(drawn.mean() - 0.3) < 0.03 and abs(drawn.std() / 0.5 - 1) < 0.06, (k, drawn.mean(), drawn.std())


CALLS: list[float] = []


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counting:
    """A network that puts the time of each call into CALLS."""

    inner: Exact

    def read(self, batch, dropped):
        return None

    def __call__(self, x, network_t, context, key=None):
        jax.debug.callback(lambda t: CALLS.append(float(t)), network_t[0])
        return self.inner(x, network_t, context, key)


def calls_of(family, options, **more):
    """How often the network is evaluated."""
    CALLS.clear()
    model = Counting(exact(family, [0, 0], pair(0.9)))
    jax.block_until_ready(family.sample(model, {}, keys(2), options, solver="ddim", **more))
    jax.effects_barrier()
    return len(CALLS)


@pytest.mark.parametrize("name", PROCESSES)
def test_evaluations_are_at_most_the_rounds_times_the_steps(name):
    family, steps = family_of(PROCESSES[name], 2), 6
    for k in (1, 2, 5):
        count = calls_of(family, DiffusionSampler(steps, resample=k), **given(2))
        assert count == k * steps - (k - 1) * (name == "flow")  # pure noise has nothing to bring to agree


def test_rounds_cost_nothing_where_nothing_is_known():
    assert calls_of(family_of(Flow(), 2), DiffusionSampler(6, resample=5)) == 6


def test_strength_and_progress_go_with_rounds():
    family, seen = family_of(Flow(), 2), []
    model = exact(family, [0, 0], pair(0.9))
    options = DiffusionSampler(10, strength=0.5, resample=4)
    with listening(lambda i, total, x: seen.append((i, total, x.shape))) as progress:
        drawn = family.sample(model, {}, keys(8), options, progress=progress, **given(8))
    assert sorted(seen) == [(i, 10, (8, 1, 2, 1)) for i in range(6, 11)]
    np.testing.assert_allclose(drawn[:, 0, 0, 0], KNOWN, rtol=1e-5)
    kept = family.sample(model, {}, keys(8), dataclasses.replace(options, strength=0.01), **given(8))
    np.testing.assert_allclose(kept, given(8)["known"], atol=1e-6)


def test_pictures_with_a_known_part_depend_on_their_own_key_only():
    family = family_of(Discrete("cosine", 50), 2)
    model, options = exact(family, [0, 0], pair(0.9)), DiffusionSampler(5, resample=3)
    whole = family.sample(model, {}, keys(4), options, **given(4))
    turned = family.sample(model, {}, keys(4)[::-1], options, **given(4))
    np.testing.assert_allclose(turned[::-1], whole, rtol=1e-5, atol=1e-6)


def test_resample_is_traced_and_at_least_one():
    family = family_of(Flow(), 2)
    assert isinstance(family, Diffusion)
    family.check(DiffusionSampler(resample=1))
    with pytest.raises(ValueError, match="resample 0: 1 to 1000"):
        family.check(DiffusionSampler(resample=0))
