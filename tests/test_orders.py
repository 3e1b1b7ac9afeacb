"""Orders and schedules: permutations, the counts of published samplers, what training hides."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.sampling.options import SHAPES, MaskedSampler
from t2i_jax.sampling.orders import (
    Confidence,
    MaskRate,
    Permutation,
    Raster,
    Sets,
    by_confidence,
    hidden_by,
    orders_of,
    remaining,
    with_known_last,
)


@pytest.mark.parametrize("order", [Raster(), Permutation(), Sets(), Confidence()])
def test_orders_are_permutations_of_their_own_key(order):
    keys = jax.random.split(jax.random.key(0), 4)
    orders = np.asarray(orders_of(order, keys, 12))
    np.testing.assert_array_equal(np.sort(orders, 1), np.tile(np.arange(12), (4, 1)))
    np.testing.assert_array_equal(orders[2], orders_of(order, keys[2:3], 12)[0])
    if isinstance(order, Raster):
        np.testing.assert_array_equal(orders[:, ::-1], np.tile(np.arange(12), (4, 1)))


def test_the_published_schedule():
    counts = remaining(256, MaskedSampler())
    assert counts[:13].tolist() == list(range(255, 242, -1)), "one token in each of the first steps"
    assert counts[-9:].tolist() == [49, 43, 37, 31, 25, 18, 12, 6, 0]
    assert remaining(256, MaskedSampler(iterations=256)).tolist() == list(range(255, -1, -1))
    assert remaining(6, MaskedSampler(iterations=40)).tolist() == [5, 4, 3, 2, 1, 0], "no more steps than tokens"
    assert remaining(16, MaskedSampler(iterations=1)).tolist() == [0]
    assert remaining(100, MaskedSampler(iterations=4, shape=1)).tolist() == [75, 50, 25, 0]


@pytest.mark.parametrize("total", [64, 256, 576, 1000])
def test_counts_are_those_of_float64(total):
    def published(steps):
        now, found = total, []
        for i in range(steps - 1):
            now = max(1, min(now - 1, math.floor(total * np.cos(math.pi / 2.0 * (i + 1) / steps))))
            found.append(now)
        return [*found, 0]

    @jax.jit
    def ours(options):
        step = lambda now, i: (options.remaining(i, jnp.asarray(total), now),) * 2
        return jax.lax.scan(step, jnp.asarray(total), jnp.arange(64))[1]

    for steps in (3, 12, 39, 51, 63, 64):  # of some, two thirds of the way is a hair short of a half in float64
        assert ours(MaskedSampler(iterations=steps).arrays())[:steps].tolist() == published(steps)


def test_the_schedule_of_the_released_maskgit():
    """Shares in fp32, and a token that stays hidden until the last step."""
    original = lambda total, steps, **more: remaining(total, MaskedSampler(iterations=steps, original=True, **more))
    assert original(256, 8).tolist() == [251, 236, 212, 181, 142, 97, 49, 0]
    assert original(256, 12)[7] == 127, "a share of a half, a hair short in fp32"
    assert original(3, 6).tolist() == [2, 1, 1, 1, 1, 0]
    np.testing.assert_array_equal(original(100, 12, start=2), [92, 86, 79, 70, 60, 49, 38, 25, 13, 0])
    with pytest.raises(ValueError, match="start 12: 0 to 11"):
        MaskedSampler(iterations=12, start=12).arrays()


def test_shapes_of_schedules():
    counts = lambda shape, **more: remaining(256, MaskedSampler(iterations=4, shape=SHAPES.index(shape), **more))
    assert counts("power", power=1.0).tolist() == counts("linear").tolist() == [192, 128, 64, 0]
    assert counts("log").tolist() == [64, 32, 13, 0]  # -log2(i / 4) of the 8 bits
    assert counts("exp").tolist() == [252, 240, 192, 0]  # all but 256^(i / 4)


def test_hidden_positions_are_read_from_the_front_and_known_ones_stand_last():
    orders = jnp.asarray([[2, 0, 1, 3], [1, 3, 2, 0]])
    np.testing.assert_array_equal(hidden_by(orders, jnp.asarray([2, 0])), [[1, 0, 1, 0], [0, 0, 0, 0]])
    known = jnp.asarray([[1, 0, 0, 0], [0, 0, 1, 1]], bool)
    np.testing.assert_array_equal(with_known_last(orders, known), [[2, 1, 3, 0], [1, 0, 3, 2]])


def test_the_surest_hidden_position_comes_first():
    orders = jnp.asarray([[2, 0, 1, 3]])
    sorted_ = by_confidence(orders, jnp.asarray([3]), jnp.asarray([[0.5, 0.9, 0.1, 0.0]]))
    np.testing.assert_array_equal(sorted_, [[2, 0, 1, 3]])
    sorted_ = by_confidence(orders, jnp.asarray([3]), jnp.asarray([[0.9, 0.5, 0.7, 0.0]]))
    np.testing.assert_array_equal(sorted_, [[1, 2, 0, 3]])


@pytest.mark.parametrize("kind", ["normal", "cosine", "uniform"])
def test_what_training_hides(kind):
    rate = MaskRate(kind)
    counts = np.asarray(jax.jit(jax.vmap(lambda key: rate.draw(key, 4, 64)))(jax.random.split(jax.random.key(0), 500)))
    assert counts.min() >= 64 - rate.visible(64) and counts.max() <= 64
    assert (counts == counts[:, :1]).all() == (kind == "normal"), "MAR has one rate for a batch, others one an image"
    expected = {"cosine": 2 / math.pi, "uniform": 0.5}
    if kind in expected:
        assert abs(counts.mean() / 64 - expected[kind]) < 0.02
    else:
        assert counts.min() >= math.ceil(0.7 * 64) and 0.85 < counts.mean() / 64 < 0.9


def test_options_become_arrays_once_and_name_what_is_wrong():
    options = MaskedSampler(guidance=2, iterations=8).arrays()
    assert options.arrays() is options and options.guidance.dtype == jnp.float32
    for wrong in (0, 5000):
        with pytest.raises(ValueError, match=f"iterations {wrong}"):
            MaskedSampler(iterations=wrong).arrays()
