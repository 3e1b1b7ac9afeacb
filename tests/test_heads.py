"""Heads sample the distribution that they are trained on, and their losses are lowest at it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t2i_jax.heads import DiffusionHead, FlowHead, ImageKeys, MixtureHead, SoftmaxHead
from t2i_jax.heads.mixture import MixtureParams, guided
from t2i_jax.nn import losses
from t2i_jax.sampling.options import ARSampler

CENTRES, SPREAD = np.asarray([-1.5, 0.5]), 0.3
WEIGHTS = np.asarray([0.3, 0.7])
COUNT = 2048


class Exact:
    """The network that knows the law: a mixture of two normals in one dimension, the same for every z."""

    def __init__(self, head):
        self.head = head

    def embed(self, z):
        return z

    def expectation(self, x, alpha, sigma):
        """E[x_0 | alpha x_0 + sigma eps = x]."""
        variance = alpha**2 * SPREAD**2 + sigma**2
        gap = x - alpha * CENTRES
        share = jax.nn.softmax(jnp.log(WEIGHTS) - gap**2 / (2 * variance), -1)
        return jnp.sum(share * (CENTRES + alpha * SPREAD**2 / variance * gap), -1, keepdims=True)

    def __call__(self, x, t, embedded):
        if isinstance(self.head, FlowHead):
            t = t[:, None] / 1000
            x0 = self.expectation(x, 1 - t, t)
            return (x - x0) / jnp.maximum(t, 1e-4)  # eps - x0, from x = (1 - t) x0 + t eps
        abar = jnp.asarray(self.head.process().alphas_cumprod, jnp.float32)[t][:, None]
        alpha, sigma = jnp.sqrt(abar), jnp.sqrt(1 - abar)
        eps = (x - alpha * self.expectation(x, alpha, sigma)) / sigma
        return jnp.concatenate([eps, jnp.zeros_like(eps)], -1)


def draws(b, m, seed=0):
    return ImageKeys(jax.random.split(jax.random.key(seed), b)).at(0, jnp.tile(jnp.arange(m), (b, 1)))


def sampled(head, module, temperature=1.0):
    z = jnp.zeros((COUNT, 1, 1))
    options = ARSampler(temperature=temperature).arrays()
    draw = jax.jit(lambda draws, options: head.sample(module, z, None, draws, jnp.ones(COUNT), options)[0])
    return np.sort(np.asarray(draw(draws(COUNT, 1), options)).reshape(-1))


def distance(x):
    """Between the distribution of sorted numbers and the law (Kolmogorov and Smirnov)."""
    erf = np.vectorize(math.erf)
    cdf = sum(w * 0.5 * (1 + erf((x - c) / SPREAD / math.sqrt(2))) for w, c in zip(WEIGHTS, CENTRES, strict=True))
    return np.abs(cdf - np.arange(len(x)) / len(x)).max()


@pytest.mark.parametrize(
    "head", [DiffusionHead(dim=1, respacing="250"), FlowHead(dim=1, steps=20)], ids=["diffusion", "flow"]
)
def test_a_network_that_knows_the_law_draws_from_it(head):
    drawn = sampled(head, Exact(head))
    assert distance(drawn) < 1.95 / math.sqrt(COUNT), "a chance below one in a thousand"


@pytest.mark.parametrize("steps, tolerance", [(8, 0.05), (20, 0.005)])
@pytest.mark.parametrize("std", [0.02, 0.05, 0.3, 1.0, 1.5])
def test_the_flow_head_draws_narrow_and_wide_gaussians(std, steps, tolerance):
    """The deviation that comes out, by the exact velocity of N(0.5, std^2), with two evaluations a step."""
    calls = []

    class Exact:
        embed = staticmethod(lambda z: z)

        def __call__(self, x, t, embedded):
            calls.append(t)
            t = t[:, None] / 1000
            gap = (x - (1 - t) * 0.5) / ((1 - t) ** 2 * std**2 + t**2)
            return t * gap - (0.5 + (1 - t) * std**2 * gap)

    head, z, places = FlowHead(dim=1, steps=steps), jnp.zeros((64, 1, 1)), draws(64, 1)
    sample = lambda temperature: head.sample(
        Exact(), z, None, places, jnp.ones(64), ARSampler(temperature=temperature).arrays()
    )[0]
    assert f"length={steps}" in str(jax.make_jaxpr(sample)(1.0)) and len(calls) == 2
    noise = np.asarray(places.normal(0, 1))
    for temperature in (1.0, 0.5):
        drawn = np.asarray(jax.jit(sample)(temperature)) - 0.5
        gain = (drawn * noise).sum() / (noise**2).sum()
        np.testing.assert_allclose(gain, temperature * std, rtol=tolerance)
        np.testing.assert_allclose(drawn, gain * noise, atol=1e-5)


def narrows(draw):
    """Colder draws are narrower, all of them and those about each centre, step by step."""
    drawn = [draw(t) for t in (1.0, 0.8, 0.5)]
    widths = [x.std() for x in drawn]
    near = [np.abs(x[:, None] - CENTRES).min(1).mean() for x in drawn]
    assert 1.1 > widths[0] > 1.05 * widths[1] > 1.1 * widths[2]
    assert near[0] > 1.05 * near[1] > 1.1 * near[2]


def test_colder_draws_are_narrower():
    head = DiffusionHead(dim=1, respacing="25")
    narrows(lambda t: sampled(head, Exact(head), t))


def from_the_law(key, count):
    which, noise = jax.random.split(key)
    centres = jnp.where(jax.random.uniform(which, (count,)) < WEIGHTS[0], *CENTRES)
    return centres + SPREAD * jax.random.normal(noise, (count,))


def test_a_fitted_diffusion_head_recovers_the_law_and_narrows_it():
    """By a two-sample test, from a network that knows nothing but draws."""
    head = DiffusionHead(dim=1, width=64, depth=2, schedule="linear", respacing="100", repeat=2)
    steps, z = 500, jnp.zeros((512, 1, 1))
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def step(state, key):
        module, moments = state
        x = from_the_law(key, len(z))[:, None, None]
        slopes = jax.grad(lambda m: head.loss(m, z, x, jax.random.fold_in(key, 1)).mean())(module)
        updates, moments = tx.update(slopes, moments)
        return (optax.apply_updates(module, updates), moments), None

    module = head.init(jax.random.key(0), 1)
    keys = jax.random.split(jax.random.key(0), steps)
    module = jax.jit(lambda m: jax.lax.scan(step, (m, tx.init(m)), keys)[0][0])(module)
    drawn, expected = sampled(head, module), np.sort(np.asarray(from_the_law(jax.random.key(9), COUNT)))
    every = np.concatenate([drawn, expected])
    share = lambda x: np.searchsorted(x, every, side="right") / len(x)
    gap = np.abs(share(drawn) - share(expected)).max()
    assert gap < 1.95 * math.sqrt(2 / COUNT), "a chance below one in a thousand (Kolmogorov and Smirnov)"
    narrows(lambda t: sampled(head, module, t))


def test_diffusion_loss_is_lowest_at_the_law():
    head = DiffusionHead(dim=1, repeat=8)
    which = np.random.default_rng(0).uniform(size=512) < WEIGHTS[0]
    x = np.where(which, *CENTRES)[:, None, None] + SPREAD * np.random.default_rng(1).normal(size=(512, 1, 1))

    class Wrong(Exact):
        def __call__(self, x, t, embedded):
            return super().__call__(x, t, embedded) + jnp.asarray([self.shift, 0.0])

    right = Wrong(head)

    @jax.jit
    def loss(shift):
        right.shift = shift
        return head.loss(right, jnp.zeros((512, 1, 1)), jnp.asarray(x, jnp.float32), jax.random.key(0)).mean()

    assert loss(0.0) < loss(0.3) and loss(0.0) < loss(-0.3)


def test_mixture_is_a_density_and_draws_from_it():
    head = MixtureHead(dim=1, components=2)
    raw = math.log(math.expm1(SPREAD - head.smallest))
    module = lambda z: jnp.broadcast_to(
        jnp.asarray([math.log(0.3), -1.5 + 1, raw, math.log(0.7), 0.5 - 1, raw], jnp.float32), (*z.shape[:-1], 6)
    )
    x = jnp.linspace(-4, 4, 4001)[:, None]
    density = jnp.exp(-head.loss(module, jnp.zeros((1, 4001, 1)), x[None], jax.random.key(0)))
    np.testing.assert_allclose(np.trapezoid(np.asarray(density)[0], dx=0.002), 1, rtol=1e-3)
    assert distance(sampled(head, module)) < 1.95 / math.sqrt(COUNT)
    law = MixtureParams(jnp.zeros(1), jnp.zeros((1, 3)), jnp.zeros((1, 3)))
    np.testing.assert_allclose(law.log_density(jnp.zeros(3)), -1.5 * math.log(2 * math.pi), rtol=1e-6)


def law_of(weights, mean, std):
    """Of one row: weights (a,), means and standard deviations (a, k)."""
    arrays = (np.log(weights), np.reshape(mean, (len(weights), -1)), np.log(np.reshape(std, (len(weights), -1))))
    return MixtureParams(*(jnp.asarray(x, jnp.float32)[None, None] for x in arrays))


def turned(law):
    return MixtureParams(law.logits[..., ::-1], law.mean[..., ::-1, :], law.log_std[..., ::-1, :])


guide = jax.jit(guided)
AXIS = np.linspace(-20, 20, 20001)


def difference(law, null, scale):
    """Total variation between the guided law of one dimension and p^s p'^(1 - s), which is normalised on AXIS."""
    density = jax.jit(lambda law: law.log_density(jnp.asarray(AXIS, jnp.float32)[None, :, None])[0])
    at = lambda law: np.asarray(density(law), np.float64)
    true = scale * at(law) + (1 - scale) * at(null)
    share = lambda log_p: np.exp(log_p - log_p.max()) / np.exp(log_p - log_p.max()).sum()
    return 0.5 * np.abs(share(true) - share(at(guide(law, null, jnp.full(1, scale))))).sum()


@pytest.mark.parametrize("null", [([0.0, 0.0, 0.0], [1.0, 0.5, 0.6]), ([0.8, -0.4, 0.3], [0.29, 0.47, 0.39])])
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5, 3.0, 7.5])
def test_guidance_of_one_component_is_the_quotient_of_gaussians(scale, null):
    count, head = 4 * COUNT, MixtureHead(dim=3, components=1)
    (mean, std), (null_mean, null_std) = np.asarray([[1.0, -0.5, 0.2], [0.3, 0.5, 0.4]]), np.asarray(null)
    precision = scale * std**-2.0 - (scale - 1) * null_std**-2.0
    want = (scale * std**-2.0 * mean - (scale - 1) * null_std**-2.0 * null_mean) / precision
    got = guide(law_of([1.0], mean, std), law_of([1.0], null_mean, null_std), jnp.full(1, scale))
    np.testing.assert_allclose(got.mean[0, 0, 0], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.exp(got.log_std[0, 0, 0]), precision**-0.5, rtol=1e-4)

    raw = lambda mean, std: jnp.asarray(np.concatenate([[0.0], mean, np.log(np.expm1(std - head.smallest))]))
    z, other = (jnp.broadcast_to(raw(*x), (count, 1, 7)) for x in ((mean, std), (null_mean, null_std)))
    scales, options = jnp.full(count, scale), ARSampler().arrays()
    sample = jax.jit(lambda z, other, draws: head.sample(lambda z: z, z, other, draws, scales, options)[0])
    drawn = np.asarray(sample(z, other, draws(count, 1)))[:, 0]
    np.testing.assert_allclose(drawn.std(0), precision**-0.5, rtol=0.03)
    assert (abs(drawn.mean(0) - want) < 4 * precision**-0.5 / count**0.5).all()


def test_guidance_is_exact_where_components_correspond_in_whatever_order():
    law = law_of([0.7, 0.3], [-1.0, 1.0], [0.2, 0.15])
    null = law_of([0.4, 0.6], [-0.9, 1.1], [0.25, 0.3])
    for scale in (1.5, 3.0):
        for p, q in ((law, null), (law, turned(null)), (turned(law), null)):
            assert difference(p, q, scale) < 0.01


def test_guidance_does_not_depend_on_the_order_of_components():
    rng = np.random.default_rng(0)
    random = lambda a: law_of(rng.dirichlet(np.ones(a)), rng.normal(size=(a, 4)), rng.uniform(0.3, 0.9, (a, 4)))
    law, null = random(5), random(7)
    plain = guide(law, null, jnp.full(1, 2.0))
    for a, b in zip(plain, guide(law, turned(null), jnp.full(1, 2.0)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    for a, b in zip(plain, turned(guide(turned(law), null, jnp.full(1, 2.0))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_guidance_away_from_the_same_law_changes_nothing():
    """Though its components overlap, and come in another order."""
    law = law_of([0.7, 0.2, 0.1], [-0.2, 0.3, 0.9], [0.3, 0.4, 0.3])
    for scale in (1.0, 1.5, 4.0):
        for a, b in zip(law, guide(law, turned(law), jnp.full(1, scale)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_guidance_of_overlapping_mixtures_is_near_its_law():
    rng, found = np.random.default_rng(0), []
    for _ in range(20):
        law = law_of(rng.dirichlet([2] * 3), rng.normal(size=3), rng.uniform(0.2, 0.4, 3))
        null = law_of(rng.dirichlet([2] * 3), rng.normal(size=3), rng.uniform(0.5, 0.8, 3))
        found.append(difference(law, null, rng.choice([1.5, 3.0])))
    assert np.mean(found) < 0.05


def test_a_null_too_narrow_to_divide_by_moves_the_mean_alone():
    law, null = law_of([1.0], [1.0, 2.0], [0.5, 0.5]), law_of([1.0], [0.0, 2.0], [0.2, 1.0])
    got = guide(law, null, jnp.full(1, 3.0))
    np.testing.assert_allclose(got.mean[0, 0, 0], [3.0, 2.0], rtol=1e-5)
    np.testing.assert_allclose(np.exp(got.log_std[0, 0, 0]), [0.5, (3 * 4 - 2 * 1) ** -0.5], rtol=1e-5)
    assert all(np.isfinite(x).all() for x in got)


def test_softmax_scores_are_log_probabilities_of_the_guided_law():
    head = SoftmaxHead(3)
    logits, null = jnp.asarray([0.0, 1.0, -1.0]), jnp.asarray([0.5, 0.0, 0.0])
    z = jnp.broadcast_to(logits, (COUNT, 1, 3))
    x, score = head.sample(
        lambda z: z, z, jnp.broadcast_to(null, z.shape), draws(COUNT, 1), jnp.full(COUNT, 2.0), ARSampler().arrays()
    )
    law = np.asarray(jax.nn.softmax(2 * logits - null))
    np.testing.assert_allclose(np.bincount(np.asarray(x).reshape(-1), minlength=3) / COUNT, law, atol=0.04)
    np.testing.assert_allclose(score, np.log(law)[np.asarray(x)], rtol=1e-4, atol=1e-5)


def test_guidance_of_one_and_no_guidance_are_the_same():
    head = DiffusionHead(dim=2, width=8, depth=1, respacing="3")
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: head.init(key, 4), jax.random.key(0))
    module = jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), shapes)
    z, null = jnp.asarray(rng.normal(size=(2, 2, 3, 4)), jnp.float32)
    options = dataclasses.replace(ARSampler(), temperature=0.9).arrays()
    draw = lambda null, scale: head.sample(module, z, null, draws(2, 3), jnp.full(2, scale), options)[0]
    alone, one, two = jax.jit(lambda: (draw(None, 1.0), draw(null, 1.0), draw(null, 2.0)))()
    np.testing.assert_allclose(alone, one, rtol=1e-4, atol=1e-5)
    assert not np.allclose(alone, two)


def test_draws_of_a_position_are_its_own():
    keys = jax.random.split(jax.random.key(0), 3)
    some = ImageKeys(keys).at(4, jnp.asarray([[0, 5], [2, 5], [1, 0]]))
    other = ImageKeys(keys[1:2]).at(4, jnp.asarray([[7, 5, 2]]))
    np.testing.assert_array_equal(some.normal(1, 4)[1], other.normal(1, 4)[0, [2, 1]])
    assert not np.allclose(some.normal(1, 4)[1], ImageKeys(keys).at(5, jnp.asarray([[0, 5]] * 3)).normal(1, 4)[1])


def test_logits_are_held_in_parts_where_there_are_many(monkeypatch):
    monkeypatch.setattr(losses, "MOST_LOGITS", 3 * 50 * 3)  # of seven tokens two at a time, and one that is left
    keys = jax.random.split(jax.random.key(0), 3)
    z, x = jax.random.normal(keys[0], (3, 7, 4)), jax.random.randint(keys[1], (3, 7), 0, 50)
    w = jax.random.normal(keys[2], (4, 50))
    loss = lambda chunk: lambda z, w: SoftmaxHead(50, 0.1, chunk).loss(lambda z: z @ w, z, x, keys[0]).sum()
    both = lambda chunk: jax.value_and_grad(loss(chunk), (0, 1))
    whole, *parts = jax.jit(lambda z, w: [both(chunk)(z, w) for chunk in (-1, 0, 3)])(z, w)
    for part in parts:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), part, whole)
    held = [("f32[3,7,50]" in str(jax.make_jaxpr(both(chunk))(z, w))) for chunk in (-1, 0, 3)]
    assert held == [True, False, False]
