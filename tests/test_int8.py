"""Weights in whole numbers: how far products are off, and that scoring and drawing go on as with their floats."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from t2i_jax.core.config import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.sharding import MeshConfig, shardings
from t2i_jax.heads import SoftmaxHead
from t2i_jax.models.masked import Masked
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.nn.decode import DecodeLinear, int8_weights
from t2i_jax.nn.layers import Int8, Linear, matmul, param
from t2i_jax.pipeline import Pipeline
from t2i_jax.storage.artifacts import Artifact, save_artifact
from tests.fixtures.autoregressive import GPT, TINY, batch_for, logits_of, model_for

KEY = jax.random.key(0)


def plain(w):
    """The floats that an `Int8` stands for."""
    return param(w.q[...] * w.scale[...][..., None, :], *w.q.get_metadata()["axes"])


def test_products_are_off_by_half_a_scale_at_most():
    w = param(jax.random.normal(KEY, (3, 64, 16)).at[:, :, 5].set(0) * jnp.arange(1, 17), "embed", "mlp")
    x = jax.random.normal(jax.random.key(1), (3, 8, 64))
    found, exact = jax.vmap(matmul)(x, Int8(w)), np.asarray(x, np.float64) @ np.asarray(w[...], np.float64)
    scale = np.abs(w[...]).max(1) / 127
    bound = np.abs(x).sum(-1, keepdims=True) * scale[:, None] / 2
    assert (np.abs(found - exact) <= bound + 1e-4).all()
    assert (found[..., 5] == 0).all()
    assert np.abs(found - exact).max() > 0.05 * bound.max(), "nothing was rounded"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_form_for_decoding_gives_the_same_product(dtype):
    linear = int8_weights(Linear(32, 24, KEY, std=1.0))
    x = jax.random.normal(KEY, (4, 1, 32)).astype(dtype)
    few = DecodeLinear(linear.w, linear.b, dtype)(x)
    assert few.dtype == linear(x).dtype == dtype
    np.testing.assert_allclose(
        few.astype(jnp.float32), linear(x).astype(jnp.float32), rtol=1e-2 if few.itemsize == 2 else 1e-5
    )


@pytest.mark.parametrize("config", [TINY, pytest.param(GPT, marks=pytest.mark.slow)], ids=["classes", "given"])
def test_a_model_scores_and_draws_as_with_the_floats_of_its_whole_numbers(config):
    model, batch = model_for(config), batch_for(config)
    small = jax.jit(int8_weights)(model)
    whole = jax.tree.map(lambda m: plain(m) if isinstance(m, Int8) else m, small, is_leaf=lambda m: isinstance(m, Int8))
    assert jax.tree.structure(whole) == jax.tree.structure(model)
    forward, scale = jax.jit(logits_of), np.std(forward_of(model, batch))
    found, exact = forward(small, batch), forward_of(whole, batch)
    np.testing.assert_allclose(found, exact, atol=1e-4 * scale)
    off = np.abs(found - forward_of(model, batch))
    assert 1e-4 * scale < off.mean() < 0.05 * scale

    condition = {name: batch[name] for name in config.condition_spec() if name in batch}
    keys, options = jax.random.split(KEY, 3), dataclasses.replace(config.options(), guidance=2.0, greedy=True)
    drawn = [config.sample(m, condition, keys, options, segments=1) for m in (small, whole)]
    np.testing.assert_array_equal(*drawn)


def forward_of(model, batch):
    return np.asarray(jax.jit(logits_of)(model, batch))


def test_matrices_shrink_and_keep_their_places_on_a_mesh():
    model = jax.eval_shape(TINY.init, KEY)
    small = jax.eval_shape(int8_weights, model)
    assert small.blocks.mlp.into.w.q.dtype == small.output.q.dtype == jnp.int8
    assert small.tokens.w.dtype == jnp.float32 and isinstance(small.tokens.w, nnx.Param)
    mesh = MeshConfig(1, 2, 4).build()
    spec = lambda w: jax.tree.leaves(shardings(w, mesh))[0].spec
    assert spec(small.blocks.mlp.into.w.q) == spec(model.blocks.mlp.into.w) == P(None, "fsdp", "tensor")
    assert spec(small.blocks.mlp.into.w.scale) == P(None, "tensor")


def test_only_models_that_draw_token_by_token_are_loaded_in_whole_numbers(tmp_path):
    for config in (
        TINY,
        with_fields(
            Masked(), grid=(2, 3), head=SoftmaxHead(13), width=16, depth=1, heads=2, condition=ClassEmbedder(5)
        ),
    ):
        folder = tmp_path / type(config).__name__
        save_artifact(Artifact(config, config.init(KEY)), folder, "")
        if config is not TINY:
            with pytest.raises(ConfigError, match="Masked: a Masked has no int8 weights"):
                Pipeline.load(folder, int8=True)
        else:
            pipeline = Pipeline.load(folder, MeshConfig(1), int8=True)
            assert pipeline.model.output.q.dtype == jnp.int8
            assert pipeline.about == {"model": f"{folder}, step 0", "weights": "int8"}
