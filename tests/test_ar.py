"""The next-token model: what sees what, what the loss is, how large it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.core.family import with_fields
from t2i_jax.networks.condition import (
    CrossAttnFeatures,
)
from t2i_jax.nn.layers import replace
from t2i_jax.presets import OF_AR, preset
from tests.fixtures.autoregressive import ALL, FEATURES, GPT, TEXT, TINY, batch_for, logits_of, model_for
from tests.fixtures.families import with_aux


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_logits_depend_on_earlier_codes_and_on_the_condition_only(config):
    model, batch = model_for(config), batch_for(config)
    forward = jax.jit(logits_of)
    logits = forward(model, batch)
    assert logits.shape == (3, 6, 13) and logits.dtype == jnp.float32
    for i in range(6):
        changed = batch["codes"].reshape(3, 6).at[:, i].add(1).reshape(3, 2, 3) % 13
        moved = jnp.abs(forward(model, batch | {"codes": changed}) - logits).max((0, 2)) > 1e-6
        np.testing.assert_array_equal(moved, np.arange(6) > i)
    other = batch | {
        "label": (batch["label"] + 1) % 5,
        "text": (batch["text"] + 1) % 11,
        "features": -batch["features"],
        "prefix": (batch["prefix"] + 1) % 13,
    }
    assert (jnp.abs(forward(model, other) - logits).max(2) > 1e-6).all()
    assert (jnp.abs(forward(model, batch, jnp.ones(3, bool)) - logits).max(2) > 1e-6).all()


def test_gradients_flow_from_each_logit_to_the_past_alone():
    model, batch = model_for(TINY), batch_for(TINY)

    def logit(scale, i):
        """The sum of logits i, as a function of a factor on each embedded code."""
        hooked = jax.tree.map(lambda x: x, model)
        table = model.tokens.w[...][batch["codes"].reshape(-1)]
        hooked.tokens.w = model.tokens.w.replace(table * scale.reshape(-1, 1))  # every code has a row of its own
        codes = jnp.arange(18).reshape(3, 2, 3)
        return logits_of(hooked, batch | {"codes": codes})[:, i].sum()

    slopes = jax.jit(jax.vmap(jax.grad(logit), (None, 0)))(jnp.ones((3, 6)), jnp.arange(6))
    past = np.arange(6)[None, :] < np.arange(6)[:, None]  # (logit, code)
    np.testing.assert_array_equal(np.abs(slopes).max(1) > 0, past)


@pytest.mark.parametrize("config", [TEXT, FEATURES], ids=["captions", "features"])
def test_padding_of_the_condition_is_not_read(config):
    model, batch = model_for(config), batch_for(config)
    hidden = ~batch["text_mask"]
    other = batch | {
        "text": jnp.where(hidden, 7, batch["text"]),
        "features": jnp.where(hidden[..., None], 9.0, batch["features"]),
    }
    forward = jax.jit(logits_of)
    np.testing.assert_allclose(forward(model, other), forward(model, batch), atol=1e-5)


def test_loss_is_the_cross_entropy_of_the_forward():
    model, batch = model_for(TINY), batch_for(TINY)
    config = with_fields(TINY, condition_dropout=0.0)
    logits = jax.jit(logits_of)(model, batch)
    logp = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(logp, batch["codes"].reshape(3, 6, 1), 2)[..., 0]
    loss, metrics, _ = jax.jit(config.loss)(model, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, nll.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["bits_per_token"], nll.mean() / np.log(2), rtol=1e-5)
    correct = (logits.argmax(-1) == batch["codes"].reshape(3, 6)).mean()
    np.testing.assert_allclose(metrics["accuracy"], correct, atol=1e-6)
    np.testing.assert_allclose(jax.jit(config.log_likelihood)(model, batch), -nll.sum(1), rtol=1e-5)

    weighted = jax.jit(config.loss)(model, batch | {"weight": jnp.array([1, 0, 1])}, jax.random.key(0)).loss
    np.testing.assert_allclose(weighted, nll[::2].mean(), rtol=1e-5)
    smooth = dataclasses.replace(config, label_smoothing=0.2, z_loss=0.1)
    smoothed = jax.jit(smooth.loss)(model, batch, jax.random.key(0)).loss
    log_z = jax.nn.logsumexp(logits, -1)
    want = (0.8 * nll - 0.2 * logp.mean(-1) + 0.1 * log_z**2).mean()
    np.testing.assert_allclose(smoothed, want, rtol=1e-5)


def test_chunks_remat_and_dtype_leave_loss_and_gradients_as_they_are():
    model, batch, key = model_for(TINY), batch_for(TINY), jax.random.key(1)

    def grad(**fields):
        config = with_fields(TINY, **fields)
        like = jax.tree.unflatten(jax.tree.structure(model_for(config)), jax.tree.leaves(model))
        found, slopes = jax.jit(jax.value_and_grad(with_aux(config.loss), has_aux=True))(like, batch, key)
        return found, jax.tree.leaves(slopes)

    (want, _), slopes = grad()
    for fields in (dict(loss_chunk=2, remat="full"), dict(loss_chunk=4, remat="dots")):
        (loss, _), got = grad(**fields)
        np.testing.assert_allclose(loss, want, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, slopes)
    (loss, _), got = grad(dtype="bfloat16")
    np.testing.assert_allclose(loss, want, rtol=0.05)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got))


def test_dropout_follows_the_key_and_scores_do_not_drop():
    config = with_fields(TINY, dropout=0.3, token_dropout=0.3, condition_dropout=1.0)
    model, batch = model_for(config), batch_for(config)
    loss = jax.jit(lambda key, batch=batch: config.loss(model, batch, key).loss)
    a, b = jax.random.split(jax.random.key(0))
    assert loss(a) == loss(a) != loss(b)
    assert loss(a) == loss(a, batch | {"label": batch["label"] * 0})  # the condition is always dropped here
    scores = [jax.jit(c.log_likelihood)(model, batch) for c in (config, TINY)]
    np.testing.assert_array_equal(*scores)


PUBLISHED = {  # class-conditional, 1000 classes, 16384 codes
    "llamagen-b": 110.888,
    "llamagen-l": 342.911,
    "llamagen-xl": 774.700,
    "llamagen-xxl": 1410.973,
    "llamagen-xxxl": 3893.028,
    "llamagen-1b": 1199.616,
    "llamagen-3b": 3096.659,
    "llamagen-7b": 6614.589,
}


@pytest.mark.parametrize("size", [size for size in OF_AR if not size.startswith(("imagegpt", "rarm"))])
def test_sizes_are_what_their_names_say(size):
    shapes = jax.eval_shape(preset(size, vocabulary=16384, grid=(16, 16)).init, jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(shapes)) / 1e6
    if size in PUBLISHED:
        assert round(count, 3) == PUBLISHED[size]
    else:  # own sizes leave out the tables of codes and classes
        width = OF_AR[size].transformer.width
        nominal = float(size[:-1]) * (1000 if size.endswith("B") else 1)
        assert abs(count - (2 * 16384 + 1001) * width / 1e6 - nominal) < 0.2 * nominal


def test_vectors_before_the_image_are_read_as_the_tokens_whose_vectors_they_are():
    given = with_fields(GPT, condition_dropout=0.0)
    config = with_fields(given, condition=CrossAttnFeatures(16, 4, trained_null=False))
    model, batch = model_for(given), batch_for(given)
    vectors = {"features": model.tokens(batch["prefix"]), "codes": batch["codes"]}
    other = replace(model, config=config, condition=config.conditioning.what.init(jax.random.key(0), 16))

    @jax.jit
    def logits(model, batch):
        return logits_of(model, batch), model.logits(model.prefix(batch, jnp.zeros(3, bool))[0])

    for a, b in zip(logits(model, batch), logits(other, vectors), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    keys = jax.random.split(jax.random.key(2), 3)
    np.testing.assert_array_equal(config.sample(other, vectors, keys), given.sample(model, batch, keys))


def test_vectors_of_another_width_and_without_a_null_are_refused():
    with pytest.raises(ValueError, match="width=16"):
        with_fields(TINY, condition=CrossAttnFeatures(8, 4))
    with pytest.raises(ValueError, match="trained_null"):
        with_fields(TINY, condition=CrossAttnFeatures(16, 4, trained_null=False))


def test_an_unknown_size_names_the_known_ones():
    with pytest.raises(ValueError, match="llamagen-xl"):
        preset("xl")
