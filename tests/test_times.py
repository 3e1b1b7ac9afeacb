"""Times of training are stratified over a batch, and those of held-out losses are a fixed grid of the same law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from t2i_jax.core.params import abstract
from t2i_jax.noise.schedule import midpoints, spread, spread_of_each
from t2i_jax.sampling.orders import MaskRate
from tests.fixtures.families import FAMILIES, batch_for


@pytest.mark.parametrize("n", [1, 7, 64, 4096])
def test_one_in_each_interval(n):
    for u in (jax.jit(lambda k: spread(k, n, True))(jax.random.key(3)), spread(jax.random.key(3), n, False)):
        np.testing.assert_array_equal(np.sort(np.floor(np.asarray(u) * n)), np.arange(n))
    np.testing.assert_array_equal(spread(jax.random.key(0), n, False), midpoints(n))


@pytest.mark.parametrize("train", [True, False])
def test_each_token_has_a_time_in_each_interval(train):
    u = np.asarray(spread_of_each(jax.random.key(0), 4, 3000, train))
    np.testing.assert_array_equal(np.floor(4 * u), np.arange(4)[:, None] * np.ones(3000))
    assert stats.kstest(u.reshape(-1), "uniform").statistic < (0.02 if train else 0.001)


@pytest.mark.parametrize("kind", ["normal", "cosine", "uniform"])
def test_held_out_rates_follow_the_law_of_training(kind):
    rate, length = MaskRate(kind), 1000
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda k: rate.draw(k, 1, length)))(keys)).reshape(-1)
    grid = np.asarray(rate.draw(jax.random.key(1), 4000, length, train=False))
    assert stats.ks_2samp(drawn, grid).statistic < 0.03
    assert grid.min() >= length - rate.visible(length) and grid.max() <= length


@pytest.mark.parametrize("name", ["dit", "flow", "edm", "classifier", "noised-clip"])
@pytest.mark.parametrize("train", [True, False])
def test_losses_draw_a_time_from_each_interval(name, train, monkeypatch):
    """What a loss asks its process for: of 32 rows one share in each of 32 intervals, the same ones when held out."""
    config, seen = FAMILIES[name], []
    kind = type(config.process)
    quantile = kind.quantile

    def spy(self, u):
        jax.debug.callback(lambda u: seen.append(np.asarray(u)), u)
        return quantile(self, u)

    monkeypatch.setattr(kind, "quantile", spy)
    batch = {k: np.resize(v, (32, *v.shape[1:])) for k, v in batch_for(config).items()}
    model = config.init(jax.random.key(0))
    loss = jax.jit(lambda m, b, key: config.loss(m, b, key, train).loss)
    for key in (1, 2):
        loss(model, batch, jax.random.key(key)).block_until_ready()
    jax.effects_barrier()
    for u in seen:
        np.testing.assert_array_equal(np.sort(np.floor(u * 32)), np.arange(32))
    assert len(seen) == 2 and np.array_equal(*seen) != train


def test_importance_leaves_held_out_times_even():
    config = FAMILIES["vq-diffusion"]
    model = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), abstract(config))
    history = jnp.arange(1.0, 11)
    model.history, model.count = model.history.replace(history), model.count.replace(jnp.full(10, 11.0))
    t, p = config.sample_times(model, 40, jax.random.key(0), train=False)
    np.testing.assert_array_equal(np.bincount(t, minlength=10), 4)
    np.testing.assert_allclose(p, 0.1)
    t, p = config.sample_times(model, 5000, jax.random.key(0), train=True)
    share = np.sqrt(np.arange(1.0, 11)) + 1e-4
    share[0] = share[1]
    np.testing.assert_allclose(np.bincount(t, minlength=10) / 5000, share / share.sum(), atol=4e-4)
