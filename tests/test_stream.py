"""Text and image tokens in one stream: what sees what, what the loss is, and that sampling is the forward pass."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.core.family import with_fields
from t2i_jax.models.stream import Stream, StreamText
from t2i_jax.networks.understanding import Understanding, sees, weights
from t2i_jax.presets import PRESETS, preset
from t2i_jax.sampling.guidance import guide
from t2i_jax.sampling.options import ARSampler
from t2i_jax.sampling.tokens import filter_logits, uniforms

S, L, B = 4, 6, 3
PLAIN = with_fields(Stream(), vocabulary=13, grid=(2, 3), condition=StreamText(11, S), width=16, depth=2, heads=2)
DALLE = with_fields(
    PLAIN,
    condition=StreamText(11, S, start=True, unique_padding=True),
    head_dim=12,
    activation="geglu_exact",
    qkv_bias=False,
    layer_scale=True,
    token_shift=True,
    attention=("row", "column", "full", "window"),
    positions="axial",
    depth=4,
    output_bias=True,
)
COGVIEW = with_fields(PLAIN, sandwich_norm=True, pb_relax=True, embedding_gradient=0.1, image_weight=L / S)
TURNED = with_fields(
    DALLE, positions="rotary", rope_values=True, tied=True, depth=2, attention=("full",), sandwich_norm=True
)
COGLM = with_fields(
    PLAIN,
    condition=StreamText(11, S, bidirectional=True, end=10),
    sandwich_norm=True,
    tied=True,
    one_softmax=True,
    places=(S + 3, L + 2),
    condition_dropout=0.0,
)
ALL = {"plain": PLAIN, "dalle": DALLE, "cogview": COGVIEW, "turned": TURNED}


def logits_of(config, model, batch, dropped=None):
    """Logits of the text tokens and of the codes, each given all preceding tokens."""
    dropped = jnp.zeros(B, bool) if dropped is None else dropped
    text, real = config.condition(batch, dropped), config.condition.real(batch, dropped)
    w, x = model(text, batch["codes"], real=real, text_weight=batch.get("text_weight"))
    return model.text_logits(w), model.image_logits(x)


forward = jax.jit(logits_of, static_argnums=0)
loss = jax.jit(Stream.loss, static_argnums=0)
every = pytest.mark.parametrize("config", ALL.values(), ids=ALL)


def batch_for(key=0):
    keys = jax.random.split(jax.random.key(key))
    return {
        "codes": jax.random.randint(keys[0], (B, 2, 3), 0, 13),
        "text": jax.random.randint(keys[1], (B, S), 1, 11),
        "text_mask": jnp.arange(S) < jnp.array([2, 4, 3])[:, None],
    }


@cache
def model_for(config):
    """Weights large enough that every path matters."""
    large = lambda path, x: x + 1.0 if "scale" in jax.tree_util.keystr(path) else x * 5 if x.ndim > 1 else x
    return jax.tree_util.tree_map_with_path(large, jax.jit(config.init)(jax.random.key(0)))


def condition_of(batch):
    return {name: batch[name] for name in ("text", "text_mask")}


def moved(a, b):
    """Which places of two (b, t, v) differ."""
    return np.asarray(jnp.abs(a - b).max((0, 2)) > 1e-6)


@every
def test_logits_depend_on_what_stands_before_alone(config):
    model, batch = model_for(config), batch_for() | {"text_mask": jnp.ones((B, S), bool)}
    text, image = forward(config, model, batch)
    first = 0 if config.condition.start else 1  # the text token that the first logits are of
    assert text.shape == (B, S - first, config.condition.num_embeddings) and image.shape == (B, L, 13)
    for i in range(L):
        codes = batch["codes"].reshape(B, L).at[:, i].add(1).reshape(B, 2, 3) % 13
        other_text, other = forward(config, model, batch | {"codes": codes})
        assert not moved(text, other_text).any()
        changed = moved(image, other)
        assert not changed[: i + 1].any()
        if config.attention == ("full",):
            assert changed[i + 1 :].all()
    for i in range(S):
        ids = batch["text"].at[:, i].set(batch["text"][:, i] % 10 + 1)
        other_text, other = forward(config, model, batch | {"text": ids})
        np.testing.assert_array_equal(moved(text, other_text), np.arange(first, S) > i)
        assert moved(image, other).all()


@every
def test_gradients_flow_to_the_past_alone(config):
    config = dataclasses.replace(config, tied=False)  # the table is about to get other rows
    model, batch = model_for(config), batch_for()
    codes = jnp.arange(B * L).reshape(B, 2, 3)  # every code has a row of its own

    def logit(scale, i):
        hooked = jax.tree.map(lambda x: x, model)
        table = model.image_tokens.w[...][batch["codes"].reshape(-1)]
        hooked.image_tokens.w = model.image_tokens.w.replace(table * scale.reshape(-1, 1))
        return logits_of(config, hooked, batch | {"codes": codes})[1][:, i].sum()

    slopes = jax.jit(jax.vmap(jax.grad(logit), (None, 0)))(jnp.ones((B, L)), jnp.arange(L))
    reached = np.abs(slopes).max(1) > 0
    past = np.arange(L)[None] < np.arange(L)[:, None]  # (logit, code)
    assert not (reached & ~past).any()
    if config.attention == ("full",):
        np.testing.assert_array_equal(reached, past)


def test_one_softmax_tells_codes_and_text_apart_in_training_alone():
    """The loss is that of one vocabulary, codes first; what is drawn and scored are codes among codes."""
    config, batch = with_fields(COGVIEW, one_softmax=True, tied=True, loss_chunk=3), batch_for()
    model = model_for(config)
    text = config.condition(batch, jnp.zeros(B, bool))

    @jax.jit
    def expected(model):
        w, x = model(text, batch["codes"])
        table = jnp.concatenate([model.image_tokens.w[...], model.text_tokens.w[...]])
        logp = jax.nn.log_softmax(model.norm(jnp.concatenate([w, x], 1)) @ table.T)
        tokens = jnp.concatenate([13 + text[:, 1:], batch["codes"].reshape(B, L)], 1)
        nll = -jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0]
        s = w.shape[1]
        return (nll[:, :s].mean() + config.image_weight * nll[:, s:].mean()) / (1 + config.image_weight)

    sure = with_fields(config, condition_dropout=0.0)
    np.testing.assert_allclose(loss(sure, model, batch, jax.random.key(0)).loss, expected(model), rtol=1e-5)
    plain = dataclasses.replace(config, one_softmax=False)
    scores = [jax.jit(Stream.log_likelihood, static_argnums=0)(c, model, batch) for c in (config, plain)]
    np.testing.assert_array_equal(*scores)


@pytest.mark.parametrize("kind", ["row", "column", "window"])
def test_sparse_layers_see_text_and_their_part_of_the_image(kind):
    config = dataclasses.replace(PLAIN, grid=(7, 7), attention=(kind,))
    place = jnp.arange(S + 49)
    mask = np.asarray(jax.jit(config.init)(jax.random.key(0)).visible(place, place))[0, 0]
    assert (mask == np.tril(mask)).all() and mask[S:, :S].all()
    row, column = np.divmod(np.arange(49), 7)
    down, right = row[:, None] - row, column[:, None] - column
    near = {
        "row": down == 0,
        "column": right == 0,
        "window": (down >= 0) & (down < 5) & (right >= 0) & (right < 5),
    }[kind]
    np.testing.assert_array_equal(mask[S:, S:], near & np.tril(np.ones((49, 49), bool)))


def test_each_place_has_its_own_padding_and_what_it_hides_is_not_read():
    model, batch, none = model_for(DALLE), batch_for(), jnp.zeros(B, bool)
    ids = DALLE.condition(batch, none)
    np.testing.assert_array_equal(ids[0], [*batch["text"][0, :2], 11 + 2, 11 + 3])
    np.testing.assert_array_equal(DALLE.condition(batch, ~none), np.tile(11 + np.arange(S), (B, 1)))
    published = {"text": jnp.where(batch["text_mask"], batch["text"], 0)}  # id 0 says what is padding
    np.testing.assert_array_equal(DALLE.condition(published, none), ids)
    hidden = batch | {"text": jnp.where(batch["text_mask"], batch["text"], 7)}
    for a, b in zip(forward(DALLE, model, hidden), forward(DALLE, model, batch), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="'text' has 3 slots"):
        DALLE.condition({"text": ids[:, :3] % 11}, none)


@every
def test_loss_weighs_text_and_image(config):
    model, batch = model_for(config), batch_for()
    text, image = forward(config, model, batch)
    config = with_fields(config, condition_dropout=0.0)
    nll = lambda logits, ids: -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], 2)[..., 0]
    ids = config.condition(batch, jnp.zeros(B, bool))
    of_text, of_image = nll(text, ids[:, S - text.shape[1] :]), nll(image, batch["codes"].reshape(B, L))
    value, metrics, _ = loss(config, model, batch, jax.random.key(0))
    w = config.image_weight
    np.testing.assert_allclose(value, (of_text.mean() + w * of_image.mean()) / (1 + w), rtol=1e-5)
    np.testing.assert_allclose(metrics["bits_per_token"], of_image.mean() / np.log(2), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(config.log_likelihood)(model, batch), -of_image.sum(1), rtol=1e-5)
    some = loss(config, model, batch | {"weight": jnp.array([1, 0, 1])}, jax.random.key(0)).loss
    np.testing.assert_allclose(some, (of_text[::2].mean() + w * of_image[::2].mean()) / (1 + w), rtol=1e-5)


def test_relaxed_precision_and_smaller_embedding_gradients_leave_the_loss():
    batch, key = batch_for(), jax.random.key(0)

    def run(**fields):
        config = with_fields(COGVIEW, **fields)
        return jax.jit(jax.value_and_grad(lambda m: config.loss(m, batch, key).loss))(model_for(config))

    plain, slopes = run(pb_relax=False, embedding_gradient=1.0)
    relaxed, relaxed_slopes = run(embedding_gradient=1.0)
    np.testing.assert_allclose(relaxed, plain, rtol=1e-4)
    # The epsilon of a norm weighs less once its input is enlarged: equal but for that.
    a, b = relaxed_slopes.image_tokens.w[...], slopes.image_tokens.w[...]
    assert np.linalg.norm(a - b) < 1e-2 * np.linalg.norm(b)
    small, small_slopes = run(pb_relax=False)
    np.testing.assert_allclose(small, plain, rtol=1e-6)
    np.testing.assert_allclose(small_slopes.image_tokens.w[...], 0.1 * slopes.image_tokens.w[...], rtol=1e-4, atol=1e-7)


# -- text in both directions


def test_bidirectional_text_is_read_whole_and_its_padding_is_not():
    model, batch = model_for(COGLM), batch_for()
    image = forward(COGLM, model, batch)[1]
    for i in range(S):
        ids = batch["text"].at[:, i].set(batch["text"][:, i] % 9 + 1)
        differ = np.abs(forward(COGLM, model, batch | {"text": ids})[1] - image).max((1, 2)) > 1e-6
        np.testing.assert_array_equal(differ, batch["text_mask"][:, i])
    codes = batch["codes"].at[:, 1, 0].add(1) % 13
    np.testing.assert_array_equal(moved(forward(COGLM, model, batch | {"codes": codes})[1], image), np.arange(L) > 3)
    weighted = forward(COGLM, model, batch | {"text_weight": jnp.array([0.0, 1.0, 0.0])})[1]
    assert (np.abs(weighted - image).max((1, 2)) > 1e-6).tolist() == [False, True, False]


def test_the_other_task_predicts_captions_and_patches_from_the_image():
    task, grid, s = Understanding(9, patch=2, area=0.5), (5, 6), 3
    patches = jax.jit(task.draw, static_argnums=(1, 2))(jax.random.key(0), 40, grid)
    inside, predicts = (np.asarray(x).reshape(40, *grid) for x in patches)
    assert not inside[:, -1].any() and not inside[:, :, -1].any() and inside.any(0)[:-1, :-1].all()
    assert (inside.sum((1, 2)) <= 4 * int(0.5 * 30 / 4)).all() and len(np.unique(inside, axis=0)) > 30
    right = np.roll(inside, -1, 2)
    assert (predicts <= (inside & right)).all() and predicts.any((1, 2)).all()
    mask, flat = np.asarray(sees(patches.inside, s))[0, 0], inside[0].ravel()
    for q, k in np.ndindex(mask.shape):
        if q < s:
            wanted = k >= s or k <= q
        else:
            wanted = k >= s and (not flat[k - s] or (flat[q - s] and k <= q))
        assert mask[q, k] == wanted, (q, k)
    real = jnp.array([[True, True, False]] * 2)
    some = jax.tree.map(lambda x: x[:2], patches)
    of_caption = np.asarray(weights(jnp.array([True, True]), real, some))
    np.testing.assert_array_equal(of_caption, np.concatenate([real, np.zeros((2, 1)), predicts[:2].reshape(2, -1)], 1))
    of_image = np.asarray(weights(jnp.array([False, False]), real, some))
    np.testing.assert_array_equal(of_image[0], (np.arange(4 + 30) >= 3) & (np.arange(4 + 30) < 33))


def test_without_the_other_task_the_loss_is_that_of_the_image():
    batch, key = batch_for(), jax.random.key(2)
    of = lambda share: dataclasses.replace(COGLM, understanding=Understanding(9, share, patch=1, area=0.5))
    model = model_for(COGLM)
    np.testing.assert_allclose(loss(of(0.0), model, batch, key).loss, loss(COGLM, model, batch, key).loss, rtol=1e-5)
    both, other = (float(loss(of(share), model, batch, key).loss) for share in (0.5, 1.0))
    assert np.isfinite([both, other]).all() and both != other


# -- sampling


@pytest.mark.parametrize("config", [*ALL.values(), COGLM], ids=[*ALL, "coglm"])
def test_decoding_gives_the_logits_of_the_forward(config):
    model, batch, dropped = model_for(config), batch_for(), jnp.array([False, True, False])
    batch |= {"text_weight": jnp.array([1.4, 0.5, 0.0])} if config is COGLM else {}

    @jax.jit
    def decoded():
        first, state = model.prefill(batch, dropped)

        def step(state, i):
            logits, state = model.decode(state, batch["codes"].reshape(B, L)[:, i], i)
            return state, logits

        _, rest = jax.lax.scan(step, state.grow(L), jnp.arange(L - 1))
        return jnp.concatenate([first[:, None], jnp.moveaxis(rest, 0, 1)], 1)

    np.testing.assert_allclose(decoded(), forward(config, model, batch, dropped)[1], atol=1e-5)


@partial(jax.jit, static_argnums=0)
def uncached(config, model, condition, keys, options):
    """Each token from a whole forward pass, both branches apart: the definition."""

    def token(i, codes):
        batch = condition | {"codes": codes.reshape(B, 2, 3)}
        logits, null = (logits_of(config, model, batch, jnp.full(B, dropped))[1][:, i] for dropped in (False, True))
        logits = guide(logits, null, options.guidance)
        weights = filter_logits(logits, options.temperature, options.top_k, options.top_p)
        cdf = jnp.cumsum(weights / weights.sum(-1, keepdims=True), -1)
        drawn = jnp.argmax(cdf > uniforms(keys, i[None])[0][:, None], -1)
        return codes.at[:, i].set(jnp.where(options.greedy, logits.argmax(-1), drawn))

    return jax.lax.fori_loop(0, L, token, jnp.zeros((B, L), jnp.int32)).reshape(B, 2, 3)


@pytest.mark.parametrize("config", [COGVIEW, DALLE], ids=["cogview", "dalle"])
def test_cached_sampling_is_the_uncached_forward(config):
    model, condition, keys = model_for(config), condition_of(batch_for()), jax.random.split(jax.random.key(5), B)
    for options in (
        ARSampler(guidance=2.5, greedy=True),
        ARSampler(guidance=3.0, temperature=0.8, top_k=6),
        ARSampler(guidance=1.0, top_p=0.7),
    ):
        got = config.sample(model, condition, keys, options, segments=2)
        np.testing.assert_array_equal(got, uncached(config, model, condition, keys, options.arrays()))


def test_guidance_is_off_at_one_and_its_other_branch_reads_no_text(traces):
    model, condition, keys = model_for(PLAIN), condition_of(batch_for()), jax.random.split(jax.random.key(5), B)
    draw = lambda condition=condition, guided=None, **options: PLAIN.sample(
        model, condition, keys, ARSampler(**options), segments=1, guided=guided
    )
    plain = draw(guidance=1.0)
    null = draw(guidance=0.0)
    draw(guidance=4.0, temperature=0.5, top_k=3, top_p=0.9, greedy=True)
    assert traces["_sample"] == 1
    np.testing.assert_array_equal(draw(guidance=1.0, guided=False), plain)
    other = condition | {"text": condition["text"] % 10 + 1}
    np.testing.assert_array_equal(draw(other, guidance=0.0), null)
    assert (np.asarray(draw(other, guidance=1.0)) != plain).any()


def test_a_picture_depends_on_its_own_key_and_text_only():
    model, condition, keys = model_for(DALLE), condition_of(batch_for()), jax.random.split(jax.random.key(5), B)
    options = ARSampler(guidance=2.0, top_k=9)
    three = DALLE.sample(model, condition, keys, options, segments=1)
    some = jnp.array([2, 0])
    two = DALLE.sample(model, jax.tree.map(lambda x: x[some], condition), keys[some], options, segments=1)
    np.testing.assert_array_equal(two, three[some])


def test_sizes_are_what_their_papers_say():
    count = lambda config: sum(x.size for x in jax.tree.leaves(jax.eval_shape(config.init, jax.random.key(0)))) / 1e9
    text = StreamText(16384, 64)
    assert round(count(preset("mindalle", vocabulary=16384, grid=(16, 16), condition=text)), 3) == 1.291
    assert 3.8 < count(preset("cogview", vocabulary=8192, grid=(32, 32), condition=StreamText(50000, 64))) < 4.2
    assert 12 < count(preset("dalle", vocabulary=8192, grid=(32, 32), condition=StreamText(16384, 256))) < 12.6
    with pytest.raises(ValueError, match="preset 'parti': one of " + ", ".join(PRESETS)):
        preset("parti")


def test_what_cannot_be_says_why():
    with pytest.raises(ValueError, match="some of full, row, column, window"):
        dataclasses.replace(PLAIN, attention=("axial_row",))
    with pytest.raises(ValueError, match="width 18, no multiple of 4"):
        with_fields(PLAIN, token_shift=True, width=18)
    task = Understanding(9)
    for wrong, says in (
        (dict(attention=("row",)), "full attention"),
        (dict(places=(S, 0)), f"{S} positions for {S + 1} tokens"),
        (dict(clusters=14), "13 codes"),
        (dict(understanding=task), "less than the rows"),
        (dict(understanding=task, one_softmax=False), "one_softmax"),
    ):
        with pytest.raises(ValueError, match=says):
            dataclasses.replace(COGLM, **wrong)
