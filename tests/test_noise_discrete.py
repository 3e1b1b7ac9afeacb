"""The chain over codes is what explicit K x K matrix products say, and its reverse is Bayes' rule."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.noise.discrete import LOWEST, Chain, clipped, draw, importance, masked_share, one_hot

K, T = 5, 7
CHAINS = {
    "published": Chain(K, T),
    "mask and replace": Chain(K, T, alpha_bar=(0.9, 0.01), gamma_bar=(0.02, 0.9)),
    "cosine": Chain(K, T, shape="cosine", alpha_bar=(0.9, 0.02), gamma_bar=(0.05, 0.8)),
    "mask": Chain(K, T, "mask", gamma_bar=(0.1, 0.98)),
    "replace": Chain(K, T, "replace", alpha_bar=(0.95, 0.02)),
    "any": Chain(K, T, alpha_bar=(0.9, 0.7, 0.6, 0.3, 0.2, 0.1, 0.01), gamma_bar=(0.0, 0.1, 0.1, 0.3, 0.5, 0.6, 0.9)),
}
chains = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


def step_matrix(chain, t):
    """[to, from] of step t: eq. 7."""
    s = chain.schedule
    q = np.full((K + 1, K + 1), s.b[t])
    q[:K, :K] += s.a[t] * np.eye(K)
    q[K, :] = s.c[t]
    q[:, K] = np.eye(K + 1)[K]
    return q


def products(chain):
    """q(x_t | x_s) for s, t from -1 on, [s + 1][t + 1]."""
    steps = [step_matrix(chain, t) for t in range(T)]
    table = {}
    for s in range(-1, T):
        table[s, s] = np.eye(K + 1)
        for t in range(s + 1, T):
            table[s, t] = steps[t] @ table[s, t - 1]
    return table


def close(log_p, p, rtol=2e-5):
    """Equal probabilities; what is under the floor of the logs is none."""
    np.testing.assert_allclose(np.exp(np.asarray(log_p, np.float64)), p, rtol=rtol, atol=1e-12)


def states(codes=K + 1):
    return jnp.arange(codes)[:, None]


@chains
def test_columns_add_up_and_steps_make_the_cumulative_schedule(chain):
    table, s = products(chain), chain.schedule
    for q in table.values():
        np.testing.assert_allclose(q.sum(0), 1, rtol=1e-12)
    for t in range(T):
        np.testing.assert_allclose(table[-1, t][0, 0], s.alpha_bar[t] + s.beta_bar[t], rtol=1e-9)
        np.testing.assert_allclose(table[-1, t][1, 0], s.beta_bar[t], rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(table[-1, t][K, 0], s.gamma_bar[t], rtol=1e-9)
    assert (s.alpha_bar[-1], s.beta_bar[-1], s.gamma_bar[-1]) == (1, 0, 0)


@chains
def test_forward_is_the_matrix_product(chain):
    table, x = products(chain), one_hot(states(), K + 1)
    start, step = jax.jit(chain.q_start), jax.jit(chain.q_step)
    for t in range(T):
        at = jnp.full(K + 1, t)
        close(start(x, at)[:K, 0].T, table[-1, t][:, :K])
        close(step(x, at)[:, 0].T, table[t - 1, t])
        p = np.random.default_rng(t).dirichlet(np.ones(K + 1))
        log_p = jnp.log(jnp.asarray(p, jnp.float32))[None, None]
        close(step(log_p, jnp.array([t]))[0, 0], table[t - 1, t] @ p)
    close(start(x, jnp.full(K + 1, -1))[:, 0].T, np.eye(K + 1))


@chains
def test_posterior_is_bayes_for_every_pair_of_times_and_states(chain):
    table, posterior = products(chain), jax.jit(chain.posterior)
    pairs = [(s, t) for t in range(T) for s in range(-1, t)]
    rows = [(s, t, i, k) for s, t in pairs for i in range(K + 1) for k in range(K)]
    s, t, i, k = (jnp.array(c) for c in zip(*rows, strict=True))
    got = np.exp(np.asarray(posterior(one_hot(k, K + 1)[:, None], i[:, None], t, s), np.float64))[:, 0]
    for row, (s, t, i, k) in enumerate(rows):
        evidence = table[-1, t][i, k]
        if evidence < 1e-25:  # cannot happen
            continue
        want = table[s, t][i] * table[-1, s][:, k] / evidence
        np.testing.assert_allclose(got[row], want, rtol=2e-4, atol=1e-6)
        assert abs(got[row].sum() - 1) < 1e-4


@chains
def test_posterior_of_a_distribution_is_the_mixture(chain):
    table = products(chain)
    p = np.random.default_rng(0).dirichlet(np.ones(K))
    log_x0 = jnp.append(jnp.log(jnp.asarray(p, jnp.float32)), LOWEST)
    rows = [(t, i) for t in range(T) for i in range(K + 1) if table[-1, t][i, :K].min() > 1e-25]
    t, i = (jnp.array(c) for c in zip(*rows, strict=True))
    got = jax.jit(chain.posterior)(jnp.broadcast_to(log_x0, (len(t), 1, K + 1)), i[:, None], t)[:, 0]
    want = [table[t - 1, t][i] * (table[-1, t - 1][:, :K] @ (p / table[-1, t][i, :K])) for t, i in rows]
    np.testing.assert_allclose(np.exp(np.asarray(got, np.float64)), want, rtol=3e-4, atol=1e-6)


def test_a_seen_token_of_the_absorbing_chain_stays():
    chain = CHAINS["mask"]
    log_x0 = jnp.log(jnp.full((1, 1, K + 1), 1 / K))
    p = jnp.exp(jax.jit(chain.posterior)(jnp.tile(log_x0, (T, 1, 1)), jnp.full((T, 1), 2), jnp.arange(T)))[:, 0]
    np.testing.assert_allclose(p, np.tile(np.eye(K + 1)[2], (T, 1)), atol=1e-6)


@chains
def test_draws_follow_their_law(chain):
    t = jnp.repeat(jnp.array([0, 3, T - 1]), 2)
    x0 = jnp.full((6, 20000), 1)

    @jax.jit
    def draws():
        log_q = chain.q_start(one_hot(x0[:, :1], K + 1), t)
        uniform = jax.random.uniform(jax.random.key(1), (6, 20000, K + 1))
        return log_q, chain.q_sample(x0, t, jax.random.key(0)), draw(log_q, uniform)

    log_q, got, slow = draws()
    for drawn in (got, slow):
        shares = np.stack([np.bincount(row, minlength=K + 1) / 20000 for row in np.asarray(drawn)])
        np.testing.assert_allclose(shares, np.exp(log_q[:, 0]), atol=0.015)


@chains
def test_the_chain_starts_where_the_last_step_ends(chain):
    s = chain.schedule
    x = np.asarray(chain.start(jax.random.key(0), (20000,)))
    want = np.append(np.full(K, s.beta_bar[-2]), s.gamma_bar[-2])
    np.testing.assert_allclose(np.bincount(x, minlength=K + 1) / 20000, want / want.sum(), atol=0.015)


def test_the_published_schedule_of_many_codes_is_precise_in_fp32():
    chain = Chain(2887, 100)
    s, t = chain.schedule, jnp.arange(100)
    rates = jax.jit(chain.between)(t - 1, t)
    for log, exact in zip(rates, (s.a, s.b, s.c, 1 - s.c), strict=True):
        np.testing.assert_allclose(np.exp(np.asarray(log, np.float64)).ravel(), exact, rtol=1e-4)
    two = jax.jit(chain.between)(t[2:] - 2, t[2:])
    np.testing.assert_allclose(np.exp(two.a).ravel(), s.a[2:] * s.a[1:-1], rtol=1e-5)
    np.testing.assert_allclose(np.exp(two.rest).ravel(), (1 - s.c[2:]) * (1 - s.c[1:-1]), rtol=1e-5)


@chains
def test_the_bound_is_nothing_for_a_perfect_model_and_finite_for_a_wrong_one(chain):
    x0 = jnp.tile(jnp.arange(K)[None], (T, 1))
    t = jnp.arange(T)
    x_t = chain.q_sample(x0, t, jax.random.key(0))
    bound = jax.jit(jax.value_and_grad(lambda p: chain.variational(clipped(p), x0, x_t, t)[0].sum()))
    for guess, perfect in ((x0, True), ((x0 + 1) % K, False)):
        log_x0 = jnp.concatenate([one_hot(guess, K), jnp.full((*x0.shape, 1), LOWEST)], -1)
        loss, slope = bound(log_x0)
        assert np.isfinite(loss) and np.isfinite(slope).all()
        assert (abs(loss) < 1e-3) == perfect


def test_impossible_schedules_are_refused():
    for fields, word in (
        ({"alpha_bar": (0.5, 0.9)}, "alpha_bar"),
        ({"gamma_bar": (0.5, 0.1)}, "gamma_bar"),
        ({"alpha_bar": (0.9, 0.5), "gamma_bar": (0.3, 0.4)}, "more than 1"),
        ({"alpha_bar": (0.9, 0.5, 0.1, 0.05)}, "4 values"),
        ({"kind": "roll"}, "roll"),
    ):
        with pytest.raises(ValueError, match=word):
            Chain(K, 3, **fields)


def test_importance_follows_the_loss_and_copies_the_first():
    p = importance(jnp.array([100.0, 4.0, 1.0, 0.0]))
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(p[0], p[1])
    np.testing.assert_allclose(p[1] / p[2], 2, rtol=1e-3)


# -- the absorbing chain in continuous time, on all masks of three tokens with any predictor

TOKENS, VOCABULARY = 3, 4
COST = np.random.default_rng(0).uniform(0.1, 3, (2**TOKENS, TOKENS))  # -log p(x_i | what mask m leaves visible)
MASKS = np.array(list(itertools.product([0, 1], repeat=TOKENS)))


def continuous_bound(shape, points=4000):
    tau = (np.arange(points) + 0.5) / points
    m, weight = (np.asarray(x, np.float64)[:, None] for x in masked_share(shape, jnp.asarray(tau)))
    chance = np.prod(np.where(MASKS[None], m[..., None], 1 - m[..., None]), -1)
    return float(np.mean(np.sum(weight * chance * (COST * MASKS).sum(-1), 1)))


def test_the_continuous_bound_does_not_depend_on_the_schedule():
    np.testing.assert_allclose(continuous_bound("cosine"), continuous_bound("linear"), rtol=1e-4)


def test_the_continuous_bound_is_masked_generation_and_every_order():
    bound = continuous_bound("linear")
    counts = [[(COST[i] * MASKS[i]).sum() / n for i in range(8) if MASKS[i].sum() == n] for n in (1, 2, 3)]
    masked_generation = TOKENS * np.mean([np.mean(c) for c in counts])
    np.testing.assert_allclose(bound, masked_generation, rtol=1e-5)
    orders = []
    for order in itertools.permutations(range(TOKENS)):
        left = np.ones(TOKENS, int)
        for i in order:
            orders.append(COST[int("".join(map(str, left)), 2), i])
            left[i] = 0
    np.testing.assert_allclose(bound, sum(orders) / math.factorial(TOKENS), rtol=1e-5)


def test_the_bound_of_many_steps_is_the_continuous_one():
    """L_t of the chain for a model that costs a masked token -log p: summed over t, the integral."""
    rng, steps = np.random.default_rng(1), 400
    p = rng.dirichlet(np.ones(VOCABULARY))
    chain = Chain(VOCABULARY, steps, "mask", gamma_bar=tuple((np.arange(steps) + 1) / (steps + 1)))
    log_x0 = jnp.full((steps, 1, VOCABULARY + 1), LOWEST).at[..., :VOCABULARY].set(jnp.log(jnp.asarray(p)))
    x0, t = jnp.full((steps, 1), 2), jnp.arange(steps)
    bound = jax.jit(lambda x_t: chain.variational(log_x0, x0, x_t, t)[0][:, 0])
    masked, seen = bound(jnp.full((steps, 1), VOCABULARY)), bound(x0)
    m = chain.schedule.gamma_bar[:-1]
    # One token, masked with probability m: E[L_t] summed is -log p(x) whatever the schedule, and so is the integral.
    np.testing.assert_allclose(np.sum(m * masked + (1 - m) * seen), -np.log(p[2]), rtol=5e-3)
