"""Sampling with the cache is the forward pass taken one token at a time, whatever the batch, mesh and options."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.core.family import with_fields
from t2i_jax.core.sharding import MeshConfig, batch_sharding, shardings
from t2i_jax.sampling.guidance import guide
from t2i_jax.sampling.options import ARSampler
from t2i_jax.sampling.progress import listening
from t2i_jax.sampling.tokens import filter_logits, uniforms
from tests.fixtures.autoregressive import ALL, FEATURES, TINY, batch_for, logits_of, model_for

INPUTS = ("label", "text", "text_mask", "features", "prefix")


def condition_for(config, b=3):
    batch = batch_for(config, b)
    return {name: batch[name] for name in INPUTS}


def keys_for(b=3, seed=5):
    return jax.random.split(jax.random.key(seed), b)


@partial(jax.jit, static_argnums=0)
def uncached(config, model, condition, keys, options):
    """Each token from a whole forward pass, both branches apart: the definition."""
    b, length = len(keys), config.length

    def token(i, codes):
        batch = condition | {"codes": codes.reshape(b, *config.grid)}
        logits, null = (logits_of(model, batch, jnp.full(b, dropped))[:, i] for dropped in (False, True))
        logits = guide(logits, null, options.guidance_at(i, length))
        weights = filter_logits(logits, options.temperature, options.top_k, options.top_p)
        cdf = jnp.cumsum(weights / weights.sum(-1, keepdims=True), -1)
        drawn = jnp.argmax(cdf > uniforms(keys, i[None])[0][:, None], -1)
        return codes.at[:, i].set(jnp.where(options.greedy, logits.argmax(-1), drawn))

    codes = jax.lax.fori_loop(0, length, token, jnp.zeros((b, length), jnp.int32))
    return codes.reshape(b, *config.grid)


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_cached_sampling_is_the_uncached_forward(config):
    model, condition, keys = model_for(config), condition_for(config), keys_for()
    for options in (
        ARSampler(guidance=2.5, greedy=True),
        ARSampler(guidance=3.0, guidance_start=0.3, guidance_stop=0.8, guidance_power=1.0, temperature=0.8, top_k=6),
        ARSampler(guidance=1.5, top_p=0.7),
    ):
        got = config.sample(model, condition, keys, options, segments=2)
        np.testing.assert_array_equal(got, uncached(config, model, condition, keys, options.arrays()))


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_decoding_gives_the_logits_of_the_forward(config):
    model, batch, dropped = model_for(config), batch_for(config), jnp.array([False, True, False])

    @jax.jit
    def decoded():
        codes = batch["codes"].reshape(3, -1)
        logits, state = model.prefill(batch, dropped)
        steps = [logits]
        for i in range(config.length - 1):
            logits, state = model.decode(state.grow(i // 2 * 2 + 2), codes[:, i], i)
            steps.append(logits)
        return jnp.stack(steps, 1)

    np.testing.assert_allclose(decoded(), jax.jit(logits_of)(model, batch, dropped), atol=1e-5)


def test_the_same_seed_gives_the_same_picture_in_any_batch():
    model, condition, keys = model_for(TINY), condition_for(TINY, 5), keys_for(5)
    options = ARSampler(guidance=2.0, top_k=9)
    all_five = TINY.sample(model, condition, keys, options, segments=1)
    assert len({row.tobytes() for row in np.asarray(all_five)}) == 5
    some = jnp.array([3, 1])
    two = TINY.sample(model, jax.tree.map(lambda x: x[some], condition), keys[some], options, segments=1)
    np.testing.assert_array_equal(two, all_five[some])


def test_one_compilation_for_all_settings(traces):
    model, condition = model_for(TINY), condition_for(TINY)
    for n in range(10):
        options = ARSampler(
            guidance=n,
            guidance_start=n / 40,
            guidance_stop=1 - n / 20,
            guidance_power=n / 3,
            guidance_cosine=n % 2 == 0,
            temperature=0.5 + n / 10 if n % 2 else 1,
            top_k=n,
            top_p=1 - n / 20,
            greedy=n % 3 == 0,
        )
        TINY.sample(model, condition, keys_for(seed=n), options, **first(n % 4, n % 4, n % 4), segments=1)
    assert traces["_sample"] == 1


def test_options_and_kept_tokens_may_differ_from_image_to_image():
    model, condition, keys = model_for(TINY), condition_for(TINY), keys_for()
    known = batch_for(TINY, key=9)["codes"]
    options = ARSampler(guidance=jnp.array([1.0, 4.0, 2.0]), greedy=jnp.array([True, False, False]))
    got = TINY.sample(model, condition, keys, options, known=known, keep=first(0, 4, 6)["keep"], segments=1)
    for i in range(3):
        row = lambda x: jax.tree.map(lambda a: a[i : i + 1] if jnp.ndim(a) else a, x)  # noqa: B023
        keep = first([0, 4, 6][i])["keep"]
        alone = TINY.sample(
            model, row(condition), keys[i : i + 1], row(options), known=row(known), keep=keep, segments=1
        )
        np.testing.assert_array_equal(alone[0], got[i])
    np.testing.assert_array_equal(got[1].ravel()[:4], known[1].ravel()[:4])
    np.testing.assert_array_equal(got[2], known[2])


def test_without_guidance_half_the_rows_give_the_same_codes():
    model, condition, keys = model_for(TINY), condition_for(TINY), keys_for()
    both = TINY.sample(model, condition, keys, ARSampler(guidance=1), segments=1)
    np.testing.assert_array_equal(TINY.sample(model, condition, keys, guided=False, segments=1), both)


def test_progress_shows_growing_codes():
    model, condition, keys = model_for(TINY), condition_for(TINY), keys_for()
    seen = []
    with listening(lambda count, total, codes: seen.append((count, codes))) as progress:
        final = TINY.sample(model, condition, keys, segments=3, guided=False, progress=progress)
    seen.sort(key=lambda x: x[0])
    assert [count for count, _ in seen] == [2, 3, 4, 5, 6]
    for count, codes in seen:
        np.testing.assert_array_equal(codes.reshape(3, 6)[:, :count], final.reshape(3, 6)[:, :count])
        assert (codes.reshape(3, 6)[:, count:] == -1).all()  # not drawn yet


def first(*counts):
    """Codes 0, and a mask that keeps so many of the first tokens of each image."""
    shape = (len(counts), *TINY.grid)
    keep = (np.arange(TINY.length) < np.asarray(counts)[:, None]).reshape(shape)
    return {"known": jnp.zeros(shape, jnp.int32), "keep": jnp.asarray(keep)}


@pytest.mark.parametrize(
    "sizes",
    [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 1, 4), pytest.param((1, 4, 2), marks=pytest.mark.slow)],
)
def test_sampling_on_a_mesh_is_that_on_one_device(sizes):
    config = with_fields(FEATURES, kv_heads=4, vocabulary=16, tied=sizes[1] == 1)
    model, condition, keys = model_for(config), condition_for(config, 8), keys_for(8)
    options = ARSampler(guidance=2.0, top_k=9, top_p=0.9)
    want = config.sample(model, condition, keys, options, segments=2)
    mesh = MeshConfig(*sizes).build()
    with jax.set_mesh(mesh):
        split = jax.device_put(condition, batch_sharding(mesh))
        placed = jax.device_put(model, shardings(model, mesh))
        got = config.sample(placed, split, jax.device_put(keys, batch_sharding(mesh)), options, segments=2)
    np.testing.assert_array_equal(got, want)
