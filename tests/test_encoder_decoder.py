"""An image decoder that looks at an encoded caption by cross-attention: the same family, another place for the text."""

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.core.family import with_fields
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import CaptionEncoder, TextFeatures
from t2i_jax.nn.positions import LearnedPositions
from t2i_jax.sampling.options import ARSampler
from tests.fixtures.autoregressive import logits_of

CONFIG = with_fields(
    AR(),
    vocabulary=13,
    grid=(2, 3),
    width=16,
    depth=2,
    heads=2,
    condition=CaptionEncoder(11, length=4, width=8, depth=1, heads=2),
    via="cross_attention",
    dropout=0.0,
    token_dropout=0.0,
)
FEATURES = with_fields(
    CONFIG, condition=TextFeatures(6, length=4), positions=LearnedPositions(), norm="layer", bias=True
)
forward = jax.jit(logits_of)


def model_for(config):
    return jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, jax.jit(config.init)(jax.random.key(0)))


def batch_for():
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "codes": jax.random.randint(keys[0], (3, 2, 3), 0, 13),
        "text": jax.random.randint(keys[1], (3, 4), 0, 11),
        "text_mask": jnp.arange(4) < jnp.array([2, 4, 3])[:, None],
        "features": jax.random.normal(keys[2], (3, 4, 6)),
    }


def test_codes_see_codes_before_them_and_the_whole_caption():
    model, batch = model_for(CONFIG), batch_for()
    logits = forward(model, batch)
    for i in range(6):
        codes = batch["codes"].reshape(3, 6).at[:, i].add(1).reshape(3, 2, 3) % 13
        moved = jnp.abs(forward(model, batch | {"codes": codes}) - logits).max((0, 2)) > 1e-6
        np.testing.assert_array_equal(moved, np.arange(6) > i)
    for i in range(2):  # of the first caption the rest is padding
        other = batch | {"text": batch["text"].at[:, i].add(1) % 11}
        assert (jnp.abs(forward(model, other) - logits).max(2) > 1e-6).all()


def test_padded_features_are_not_looked_at():
    model, batch = model_for(FEATURES), batch_for()
    other = batch | {"features": jnp.where(batch["text_mask"][..., None], batch["features"], 9.0)}
    np.testing.assert_allclose(forward(model, other), forward(model, batch), atol=1e-5)


def test_decoding_gives_the_logits_of_the_forward_and_guides():
    model, batch, dropped = model_for(FEATURES), batch_for(), jnp.array([False, True, False])

    @jax.jit
    def decoded():
        first, state = model.prefill(batch, dropped)

        def step(state, i):
            logits, state = model.decode(state, batch["codes"].reshape(3, 6)[:, i], i)
            return state, logits

        _, rest = jax.lax.scan(step, state.grow(6), jnp.arange(5))
        return jnp.concatenate([first[:, None], jnp.moveaxis(rest, 0, 1)], 1)

    np.testing.assert_allclose(decoded(), forward(model, batch, dropped), atol=1e-5)
    keys = jax.random.split(jax.random.key(2), 3)
    greedy = FEATURES.sample(model, batch, keys, ARSampler(guidance=3.0, greedy=True), segments=1)
    logits, null = (forward(model, batch | {"codes": greedy}, jnp.full(3, d)) for d in (False, True))
    np.testing.assert_array_equal(jnp.argmax(null + 3 * (logits - null), -1), greedy.reshape(3, 6))


def test_gradients_reach_the_encoder():
    config = with_fields(CONFIG, remat="dots", condition_dropout=0.0)
    model = model_for(config)
    slopes = jax.jit(jax.grad(lambda m: config.loss(m, batch_for(), jax.random.key(0)).loss))(model)
    for part in (slopes.condition.table, slopes.blocks.cross.kv, slopes.blocks.cross.q):
        assert jnp.abs(part.w[...]).max() > 0
    assert jnp.abs(slopes.start[...]).max() > 0
