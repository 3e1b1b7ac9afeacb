"""Cuts and draws against brute force: sorted lists in numpy, and the law of many draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.sampling import tokens as module
from t2i_jax.sampling.guidance import guide
from t2i_jax.sampling.options import ARSampler

truncate, draw, choose, uniforms = map(
    jax.jit, (module.filter_logits, module.draw, module.sample_token, module.uniforms)
)
guidance_at = jax.jit(lambda options, i, length: options.guidance_at(i, length), static_argnums=2)


def brute_force(row, temperature, k, p):
    """What is kept of one row of logits, by the definitions."""
    x = (row - row.max()) / np.float32(max(temperature, 1e-5))
    kept = x >= np.sort(x)[::-1][min(k, len(x)) - 1] if k else np.ones(len(x), bool)
    weights = np.where(kept, np.exp(x.astype(np.float64)), 0)
    if p < 1:
        above = np.array([weights[x > value].sum() for value in x])
        kept &= above <= p * weights.sum()
    return np.where(kept, weights, 0)


@pytest.mark.parametrize("platform", ["cpu", "default"])
@pytest.mark.parametrize("v, ties", [(1, False), (7, True), (300, False), (300, True)])
def test_truncation_is_that_of_sorting(v, ties, platform, monkeypatch, traces):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda **branches: branches[platform]())
    cut = jax.jit(lambda *x: module.filter_logits(*x))
    logits = np.asarray(jax.random.normal(jax.random.key(v), (6, v)) * 3)
    logits = np.round(logits) if ties else logits
    cases = [(1, 0, 1), (1, 5, 1), (1, 0, 0.83), (0.7, 50, 0.61), (2, 1, 0.5), (1, 999, 0.0), (0, 3, 1)]
    for temperature, k, p in cases:
        got = cut(logits, float(temperature), k, float(p))
        want = np.stack([brute_force(row, temperature, k, p) for row in logits])
        np.testing.assert_array_equal(np.asarray(got) > 0, want.astype(np.float32) > 0)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-30)
    assert traces["<lambda>"] == 1


def test_truncation_at_the_extremes_of_floats():
    logits = np.array([[-np.inf, 0.0, -0.0, 1e-40, -80.0], [-3e38, 3e38, 3e38, 0.0, -np.inf]], np.float32)
    np.testing.assert_array_equal(truncate(logits, 1, 3, 1) > 0, [[0, 1, 1, 1, 0], [0, 1, 1, 0, 0]])
    np.testing.assert_array_equal(truncate(logits, 1, 1, 1) > 0, [[0, 1, 1, 1, 0], [0, 1, 1, 0, 0]])
    assert np.isfinite(truncate(logits, 1, 0, 1)).all()


def test_options_may_differ_from_image_to_image():
    logits = jax.random.normal(jax.random.key(0), (3, 20))
    k, p = np.array([0, 4, 9]), np.array([0.5, 1.0, 0.7], np.float32)
    got = truncate(logits, jnp.ones(3), k, p)
    rows = [truncate(logits[i : i + 1], 1, int(k[i]), float(p[i])) for i in range(3)]
    np.testing.assert_allclose(got, jnp.concatenate(rows), rtol=1e-6)


@pytest.mark.parametrize("v", [2, 13, 130])
def test_draws_follow_the_weights(v):
    weights = jnp.where(jnp.arange(v) % 3 == 1, 0.0, jax.random.uniform(jax.random.key(1), (v,)) ** 4)
    n = 20_000
    grid = (jnp.arange(n) + 0.5) / n  # an even grid in place of chance: counts are exact to one per token
    counts = np.bincount(draw(jnp.broadcast_to(weights, (n, v)), grid), minlength=v)
    np.testing.assert_allclose(counts, n * np.asarray(weights / weights.sum()), atol=1.01)


def test_what_weighs_nothing_is_never_drawn():
    ends = jnp.array([0.0, 1 - 2**-24, 2**-24, 0.5])
    for weights in ([0, 0, 1, 0], [1e-20, 0, 0, 1e-30], [0, 1, 1e-8, 0], [1] * 5 + [0] * 59, [0] * 63 + [1]):
        w = jnp.broadcast_to(jnp.array(weights, jnp.float32), (4, len(weights)))
        assert (jnp.take_along_axis(w, draw(w, ends)[:, None], 1) > 0).all()


def test_greedy_and_cold_take_the_largest(traces):
    logits = jax.random.normal(jax.random.key(2), (5, 40))
    u = jax.random.uniform(jax.random.key(3), (5,))
    for options in (ARSampler(greedy=True), ARSampler(temperature=0), ARSampler(top_k=1), ARSampler(top_p=0.0)):
        np.testing.assert_array_equal(choose(logits, options.arrays(), u), logits.argmax(-1))
    assert traces["sample_token"] <= 1  # none if another test has done it


def test_guidance_is_the_formula_within_its_interval():
    l, null = jax.random.normal(jax.random.key(0), (2, 3, 8))
    np.testing.assert_allclose(guide(l, null, 2.5), 2.5 * (l - null) + null, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(guide(l, null, 1.0), l)
    scales = lambda **options: np.array(
        [guidance_at(ARSampler(guidance=5, **options).arrays(), i, 16) for i in range(16)]
    )
    np.testing.assert_array_equal(scales(), 5)
    np.testing.assert_array_equal(scales(guidance_start=3 / 16, guidance_stop=7 / 16), [1] * 3 + [5] * 4 + [1] * 9)
    np.testing.assert_allclose(scales(guidance_power=1.0), 1 + 4 * np.arange(1, 17) / 16)
    cosine = scales(guidance_power=2.0, guidance_cosine=True)
    assert (np.diff(cosine) > 0).all() and np.isclose(cosine[-1], 5)


def test_uniforms_belong_to_the_image_and_the_position():
    keys = jax.random.split(jax.random.key(0), 4)
    u = uniforms(keys, jnp.arange(6))
    np.testing.assert_array_equal(u[2:5, 1:3], uniforms(keys[1:3], jnp.arange(2, 5)))
    assert len(np.unique(u)) == 24
