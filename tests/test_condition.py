"""Conditions: what is dropped, what is empty, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.networks.condition import CaptionEncoder, ClassEmbedder, TextFeatures
from t2i_jax.nn.layers import ModelState

KEY = jax.random.key(0)
S, WIDTH = 6, 16
MASK = jnp.arange(S) < jnp.array([[S], [3], [0], [1]])
DROP = jnp.array([True, False, False, False])
BATCH = {
    "label": jnp.array([0, 1, 2, 3]),
    "text": jax.random.randint(KEY, (4, S), 0, 50),
    "text_mask": MASK,
    "features": jax.random.normal(KEY, (4, S, 5)),
}
CONFIGS = {
    "classes": ClassEmbedder(4),
    "captions": CaptionEncoder(50, S, 8, 2, 2),
    "features": TextFeatures(5, S),
    "llamagen": TextFeatures(5, S, trained_null=False, left=True, null_keeps_mask=True),
}
NO = jnp.zeros(4, bool)


def made(config):
    """The module of a config, with its call compiled."""
    module = jax.jit(lambda key: config.init(key, WIDTH))(KEY)
    return lambda batch, drop: jax.jit(lambda m, b, d: m(b, d))(module, batch, drop)


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_and_dtypes(name):
    config = CONFIGS[name]
    module = jax.eval_shape(lambda key: config.init(key, WIDTH), KEY)
    for dtype in (jnp.float32, jnp.bfloat16):
        tokens, mask = jax.eval_shape(lambda m, b, d, dtype=dtype: m(b, d, dtype), module, BATCH, DROP)
        assert tokens.shape == (4, config.length, WIDTH) and tokens.dtype == dtype
        assert mask.shape == (4, config.length) and mask.dtype == bool
    needed = {k: BATCH[k] for k, field in config.batch_spec().items() if not field.optional}
    jax.eval_shape(lambda m, b, d: m(b, d), module, needed, DROP)


@pytest.mark.parametrize("name", ["captions", "features", "llamagen"])
def test_an_empty_caption_is_the_dropped_one(name):
    tokens, mask = made(CONFIGS[name])(BATCH, DROP)
    np.testing.assert_array_equal(tokens[0], tokens[2])
    np.testing.assert_array_equal(mask[0], mask[2])
    assert mask[2].all()


@pytest.mark.parametrize("name", CONFIGS)
def test_dropping_hides_the_condition_and_only_its_own(name):
    module = made(CONFIGS[name])
    kept, dropped = module(BATCH, NO)[0], module(BATCH, DROP)[0]
    np.testing.assert_allclose(kept[1:], dropped[1:], atol=1e-6)
    other = BATCH | {"label": BATCH["label"][::-1], "features": -BATCH["features"], "text": 49 - BATCH["text"]}
    np.testing.assert_array_equal(module(other, DROP)[0][0], dropped[0])
    assert not np.allclose(module(other, NO)[0][0], kept[0])


@pytest.mark.parametrize("name", ["captions", "features", "llamagen"])
def test_what_stands_in_padding_does_not_matter(name):
    module = made(CONFIGS[name])
    other = BATCH | {
        "text": jnp.where(MASK, BATCH["text"], 7),
        "features": jnp.where(MASK[..., None], BATCH["features"], 1e3),
    }
    for a, b in zip(module(BATCH, NO), module(other, NO), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_order_of_words_matters():
    module = made(CONFIGS["captions"])
    words, mask = jnp.array([[1, 2, 3, 0, 0, 0], [3, 2, 1, 0, 0, 0]]), jnp.arange(S)[None] < jnp.array([[3], [3]])
    tokens, _ = module({"text": words, "text_mask": mask}, NO[:2])
    assert not np.allclose(tokens[0], tokens[1], atol=1e-4)


def test_without_classes_a_model_is_unconditional():
    config = ClassEmbedder(0)
    assert config.batch_spec() == {}
    tokens, _ = config.init(KEY, WIDTH)({}, DROP)
    assert (tokens == tokens[0]).all()


def test_left_layout_moves_text_to_the_end():
    right, left = (made(TextFeatures(5, S, left=side))(BATCH, NO) for side in (False, True))
    np.testing.assert_array_equal(left[1], right[1][:, ::-1])
    np.testing.assert_allclose(left[0][1, -3:], right[0][1, :3], atol=1e-6)
    assert not left[0][1, :-3].any()


def test_null_features_stand_before_the_projection_and_may_be_frozen():
    trained, frozen = (TextFeatures(5, S, trained_null=b).init(KEY, WIDTH) for b in (True, False))
    assert not isinstance(trained.null, ModelState) and isinstance(frozen.null, ModelState)
    given = frozen({"features": jnp.broadcast_to(frozen.null[...], (4, S, 5))}, NO)[0]
    np.testing.assert_allclose(frozen(BATCH, ~NO)[0], given, atol=1e-6)


def test_llamagen_masks_the_null_condition_to_the_length_of_the_caption():
    module = made(TextFeatures(5, S, null_keeps_mask=True))
    np.testing.assert_array_equal(module(BATCH, ~NO)[1], MASK | ~MASK.any(1)[:, None])


@pytest.mark.parametrize("name", ["captions", "features"])
def test_gradients_are_finite_with_empty_rows(name):
    loss = lambda module: (module(BATCH, DROP)[0] ** 2).sum()
    gradients = jax.jit(lambda key: jax.grad(loss)(CONFIGS[name].init(key, WIDTH)))(KEY)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("classes", {"label": None}, "no 'label', which the model takes; it comes from a data source"),
        ("captions", {"text_mask": None}, "no 'text_mask', which the model takes; it comes from the tokenizer"),
        ("features", {"features": None}, "no 'features', which the model takes; it comes from a frozen text encoder"),
        ("classes", {"label": jnp.array([0, 9, 1, 1])}, "'label' holds ids 0 .. 9; the model has 0 .. 3"),
        ("captions", {"text": jnp.full((4, S), -1)}, "'text' holds ids -1 .. -1; the model has 0 .. 49"),
        (
            "captions",
            {"text": BATCH["text"][:, :4]},
            "'text' has 4 slots a row; the condition of the model has length 6",
        ),
        ("features", {"features": jnp.ones((4, 9, 5))}, "'features' has 9 slots"),
    ],
)
def test_wrong_batches_are_refused_by_name(name, change, message):
    batch = {k: v for k, v in (BATCH | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda key: CONFIGS[name].init(key, WIDTH))(KEY)(batch, NO)
