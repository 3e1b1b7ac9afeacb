"""LlamaGen's weights under their published names compute what the published program computed."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.interop import llamagen
from t2i_jax.interop.names import to_ours, to_theirs
from t2i_jax.models.ar import AR
from t2i_jax.nn.draw import Sampling, guide, truncate

HERE, SHARED = Path(__file__).parent / "oracles", Path(__file__).parents[3] / "shared" / "oracles"
RELEASED = sorted((SHARED / "_release_shapes").glob("llamagen_GPT-*.json"))


def assert_close(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())


@pytest.fixture(params=["llamagen_c2i", "llamagen_t2i"])
def oracle(request):
    """meta's configuration, our configuration and model, the condition, inputs and outputs."""
    folder = HERE / request.param
    meta = json.loads((folder / "meta.json").read_text())["config"]
    inputs, outputs = np.load(folder / "inputs.npz"), np.load(folder / "outputs.npz")
    config, model = llamagen.load(
        AR, folder / "weights.safetensors", (meta["grid"], meta["grid"]), meta["dim"] // meta["n_head"]
    )
    if "labels" in inputs:
        condition = {"label": jnp.asarray(inputs["labels"])}
    else:
        features, mask = inputs["t5_embeddings_right_padded"], inputs["t5_mask_right_padded"]
        condition = {"features": jnp.asarray(features), "text_mask": jnp.asarray(mask) == 1}
    return meta, config, model, condition, inputs, outputs


def test_training_logits_loss_and_gradients(oracle):
    meta, config, model, condition, inputs, outputs = oracle
    batch = condition | {"codes": jnp.asarray(inputs["ids"]).reshape(-1, *config.grid)}
    dropped = jnp.asarray(inputs["cond_drop_uniform"] < meta["class_dropout_prob"])
    logits = jax.jit(config.forward)(model, batch, dropped)
    assert_close(logits, outputs["train_logits"])

    # The loss draws which rows to drop: two losses, one that drops none and one all, each weighted to its own rows.
    weight = inputs["valid"] if "valid" in inputs else np.ones(3)
    plain = dataclasses.replace(config, dropout=0.0, token_dropout=0.0)
    like = jax.tree.structure(jax.eval_shape(plain.init, jax.random.key(0)))
    model = jax.tree.unflatten(like, jax.tree.leaves(model))  # blocks know their rate of dropout

    @jax.jit
    @jax.grad
    def gradient(model):
        parts = []
        for rate, rows in ((0.0, ~dropped), (1.0, dropped)):
            share = weight * rows
            one = dataclasses.replace(plain, condition_dropout=rate)
            parts.append(one.loss(model, batch | {"weight": share}, jax.random.key(0))[0] * share.sum())
        return sum(parts) / weight.sum()

    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(inputs["ids"])[..., None], 2)[..., 0]
    assert_close((nll.mean(1) * weight).sum() / weight.sum(), outputs["train_loss"])
    slopes = to_theirs(gradient(model), llamagen.table(config))
    for name in outputs.files:
        if name.startswith("grad."):
            assert_close(slopes[name.removeprefix("grad.")], outputs[name])


def test_greedy_tokens_with_and_without_guidance(oracle):
    meta, config, model, condition, _, outputs = oracle
    keys = jax.random.split(jax.random.key(0), 3)
    scale, stop = meta["cfg_scale"], (meta["cfg_interval"] + 2) / config.length
    for name, options in {
        "nocfg": Sampling(guidance=1.0, greedy=True),
        "cfg": Sampling(guidance=scale, greedy=True),
        "cfg_interval": Sampling(guidance=scale, guidance_stop=stop, greedy=True),
    }.items():
        codes = config.sample(model, condition, keys, options, segments=2)
        np.testing.assert_array_equal(codes.reshape(3, -1), outputs[f"greedy_tokens_{name}"])


def test_decoding_logits(oracle):
    meta, config, model, condition, _, outputs = oracle

    @jax.jit
    def decoded(codes, dropped):
        first, state = config.prefill(model, condition, jnp.full(3, dropped))

        def step(state, i):
            logits, state = config.decode(state, jnp.asarray(codes)[:, i], i)
            return state, logits

        _, rest = jax.lax.scan(step, state.grow(config.length), jnp.arange(config.length - 1))
        return jnp.concatenate([first[:, None], jnp.moveaxis(rest, 0, 1)], 1)

    assert_close(decoded(outputs["greedy_tokens_nocfg"], False), outputs["greedy_logits_nocfg"])
    branches = [decoded(outputs["greedy_tokens_cfg"], dropped) for dropped in (False, True)]
    for logits, name in zip(branches, ("cond", "uncond"), strict=True):
        assert_close(logits, outputs[f"greedy_logits_cfg_{name}"])
    assert_close(guide(*branches, meta["cfg_scale"]), outputs["greedy_logits_cfg_combined"])
    assert_close(branches[0][:, 0], outputs["prefill_logits"][:, -1])
    assert_close(branches[1][:, 0], outputs["prefill_logits_uncond"][:, -1])


def test_filters_and_rotary_table(oracle):
    _, config, _, _, inputs, outputs = oracle
    for name in outputs.files:
        if name.startswith("filtered_probs"):
            k, p, t = (float(part[1:]) for part in name.split("_")[2:])
            weights = truncate(jnp.asarray(inputs["filter_logits"]), t, int(k), p)
            assert_close(weights / weights.sum(-1, keepdims=True), outputs[name])
    table = jnp.stack(config._rotary(config.condition.length), -1)
    assert_close(table, outputs["freqs_cis"])


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_released_sizes_have_a_place_for_every_tensor(path):
    shapes = json.loads(path.read_text())["tensors"]
    tensors = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    config = AR(**llamagen.describe(tensors, (16, 16)))
    model = jax.eval_shape(config.init, jax.random.key(0))
    jax.eval_shape(lambda tensors: to_ours(model, tensors, llamagen.table(config)), tensors)
    tensors["layers.0.extra"] = tensors.pop("norm.weight")
    with pytest.raises(ValueError, match=r"layers.0.extra: unused\n *norm.weight: missing"):
        jax.eval_shape(lambda tensors: to_ours(model, tensors, llamagen.table(config)), tensors)
