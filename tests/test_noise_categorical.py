"""Draws of one class of many follow their law, rare events and long tails included.

A draw is a function of its two uniform numbers, so its probabilities are measured exactly: the threshold of a number
at which the outcome changes is found by bisection on the lattice of fp32.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.noise.categorical import draw, inverse_cdf, uniform
from t2i_jax.noise.discrete import LOWEST, Chain

SHAPES = {  # logits of p(x_0) over codes 0..K-1
    "flat": lambda codes: np.zeros(codes),
    "peaked": lambda codes: np.where(np.arange(codes) == codes // 3, np.log(codes * 99.0), 0.0),
    "normal": lambda codes: np.random.default_rng(0).normal(scale=3, size=codes),
    "power law": lambda codes: -1.1 * np.log1p(np.arange(codes)),
}


def first(holds, shape):
    """The smallest u in [0, 1) from which `holds` (monotone, (...) -> bool (...)) is true, and 1 where it never is."""

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        yes = holds(middle)
        return jnp.where(yes, low, middle), jnp.where(yes, middle, high)

    return jax.lax.fori_loop(0, 40, halve, (jnp.zeros(shape), jnp.ones(shape)))[1]


def log_law(codes):
    """log p(x_0) of each shape (4, 1, K + 1) in fp32, and the probabilities (4, K) in float64."""
    logits = np.stack([shape(codes) for shape in SHAPES.values()])
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True)
    return jnp.asarray(np.pad(np.log(p), ((0, 0), (0, 1)), constant_values=LOWEST)[:, None], jnp.float32), p


@jax.jit
def leaving(log_p):
    """The probability (...) that draws from log_p (..., v) are not the most probable class, if it is above 1/2."""
    second = jnp.full(log_p.shape[:-1], 0.5)
    stays = lambda u: draw(log_p, jnp.stack([u, second], -1)) == jnp.argmax(log_p, -1)
    return first(stays, log_p.shape[:-1])


CHAINS = {
    "linear": {"kind": "mask", "gamma_bar": (1e-6, 1 - 1e-6)},
    "cosine": {"kind": "mask", "gamma_bar": (1e-6, 1 - 1e-6), "shape": "cosine"},
    "mask and replace": {},
}


@pytest.mark.parametrize("codes", [16, 1024, 16384, 65536])
@pytest.mark.parametrize("kind", CHAINS)
def test_masked_tokens_are_unmasked_at_the_rate_of_the_chain(codes, kind):
    """(m_t - m_s) / m_t, whatever the codes; at the noisy end of the cosine it is about 1e-6."""
    log_x0, _ = log_law(codes)
    x_t, rows = jnp.full((len(SHAPES), 1), codes), jnp.ones(len(SHAPES), int)
    posterior = jax.jit(lambda chain, t: chain.posterior(log_x0, x_t, t * rows), static_argnums=0)
    for steps in (100, 256, 1000):
        chain = Chain(codes, steps, **CHAINS[kind])
        masked = chain.schedule.gamma_bar
        times = (steps - 1, steps - 2, steps // 2)
        for t in times:
            true = (masked[t] - masked[t - 1]) / masked[t]
            np.testing.assert_allclose(leaving(posterior(chain, t)), true, rtol=2e-3, err_msg=f"{steps} steps, t = {t}")


@pytest.mark.parametrize("kind", ["replace", "mask and replace"])
@pytest.mark.parametrize("codes", [16, 16384])
def test_seen_tokens_jump_at_the_rate_of_the_chain(codes, kind):
    """By Bayes' rule in float64, for a code that is seen: most of the mass may lie on codes of 1e-7 each."""
    log_x0, p = log_law(codes)
    steps, seen = 1000, 7
    chain = Chain(codes, steps, kind)
    s, here = chain.schedule, np.arange(codes) == seen
    back = jax.jit(lambda t: chain.posterior(log_x0, jnp.full((len(SHAPES), 1), seen), jnp.full(len(SHAPES), t)))
    for t in (900, 500, 100):
        far, near = (
            s.alpha_bar[t] * here + s.beta_bar[t],
            s.a[t] * here + s.b[t],
        )  # q(seen | x_0 = k), q(seen | x_s = k)
        quotient = p / far
        law = near * (s.alpha_bar[t - 1] * quotient + s.beta_bar[t - 1] * quotient.sum(-1, keepdims=True))
        jump = 1 - law[:, seen] / law.sum(-1)
        likely = jump < 0.5  # else the most probable state may be another one
        assert likely.any()
        np.testing.assert_allclose(leaving(back(t))[likely, 0], jump[likely], rtol=5e-3, err_msg=f"t = {t}")


@pytest.mark.parametrize("codes", [16, 1024, 16384, 65536])
def test_the_code_that_a_mask_becomes_follows_p_x0(codes):
    """Edges between codes on the axis of the second number are those of the cumulative distribution."""
    chain = Chain(codes, 1000, "mask", gamma_bar=(1e-6, 1 - 1e-6))
    log_x0, p = log_law(codes)
    chosen = np.unique(np.concatenate([np.linspace(1, codes - 1, 12), [codes // 3, codes // 3 + 1]]).astype(int))
    back = chain.posterior(log_x0, jnp.full((len(p), 1), codes), jnp.full(len(p), 600))

    @jax.jit
    def edges(row):
        rows = jnp.broadcast_to(row, (len(chosen), codes + 1))
        return first(lambda u: draw(rows, jnp.stack([0 * u, u], -1)) >= jnp.asarray(chosen), (len(chosen),))

    for row, law in zip(back[:, 0], p, strict=True):
        np.testing.assert_allclose(edges(row), np.cumsum(law)[chosen - 1], atol=1e-6)


def test_a_class_below_the_steps_of_fp32_is_drawn():
    """One of 1e-8 against one near 1, and 10,000 of 1e-9."""
    for count, each in ((1, 1e-8), (10_000, 1e-9)):
        log_p = jnp.asarray(np.log(np.append(np.full(count, each), 1 - count * each)), jnp.float32)[None]
        np.testing.assert_allclose(leaving(log_p), count * each, rtol=0.02)


def test_real_draws_follow_a_law_with_rare_classes():
    """Chi-square over classes from 2e-5 to 0.9, of 400,000 draws."""
    count, p = 400_000, np.append(np.geomspace(2e-5, 1e-2, 11), 0.0)
    p[-1] = 1 - p.sum()
    log_p = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (count, len(p)))
    drawn = jax.jit(draw)(log_p, uniform(jax.random.key(0), (count, 2)))
    shares = np.bincount(drawn, minlength=len(p))
    assert np.sum((shares - count * p) ** 2 / (count * p)) < 31.3, "a chance of one in a thousand with 11 degrees"


def test_uniform_numbers_are_even_and_fine_near_zero():
    u = np.asarray(uniform(jax.random.key(1), (1 << 22,)))
    assert u.dtype == np.float32 and u.min() >= 0 and u.max() < 1
    for edge in (0.9, 0.5, 1e-2, 1e-4, 1e-5):
        share, deviation = np.mean(u < edge), np.sqrt(edge * (1 - edge) / len(u))
        assert abs(share - edge) < 4 * deviation
    small = u[u < 2**-14] * 2.0**23
    assert np.mean(small == np.round(small)) < 0.05  # `jax.random.uniform` has nothing but multiples of 2^-23


def test_one_class_and_impossible_classes():
    ends = jnp.asarray([[0.0, 0.0], [0.0, 1 - 2**-24], [1 - 2**-24, 0.0], [1 - 2**-24] * 2])
    for log_p, allowed in (([0.0, -jnp.inf], {0}), ([-jnp.inf, -3.0, -jnp.inf, -3.0], {1, 3}), ([-90.0, 0.0], {0, 1})):
        drawn = draw(jnp.broadcast_to(jnp.asarray(log_p), (4, len(log_p))), ends)
        assert set(drawn.tolist()) <= allowed
    assert inverse_cdf(jnp.ones((4, 1)), ends[:, 0]).tolist() == [0] * 4
