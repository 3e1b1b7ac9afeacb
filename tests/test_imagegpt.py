"""Image GPT: clusters of colours as a codec, its folders, and what they lack."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from t2i_jax.codecs.clusters import ColorClusters
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.convert import convert, read, restore
from t2i_jax.convert.folders import to_file, to_folder
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.image_files import to_uint8
from t2i_jax.pipeline import Pipeline
from t2i_jax.presets import preset
from tests.fixtures.families import FAMILIES, fresh
from tests.fixtures.published_files import random

SMALL = FAMILIES["imagegpt"]
COLORS = np.random.default_rng(0).uniform(-1, 1, (16, 3)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """A folder of transformers with random weights."""
    path = tmp_path / "imagegpt"
    path.mkdir()
    tensors = random("imagegpt", SMALL)
    tensors |= {"transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), bool), "transformer.h.0.attn.masked_bias": COLORS[0]}
    save_file(tensors, path / "model.safetensors")
    settings = {"n_head": 2, "layer_norm_epsilon": 1e-5, "activation_function": "quick_gelu"}
    (path / "config.json").write_text(json.dumps(settings))
    (path / "preprocessor_config.json").write_text(json.dumps({"clusters": COLORS.tolist()}))
    return path


def test_a_folder_gives_model_and_colours(folder, tmp_path):
    artifact = to_folder("imagegpt", folder, tmp_path / "model", {})
    found = artifact.config
    assert (found.vocabulary, found.grid, found.conditioning) == (16, (2, 2), SMALL.conditioning)
    assert (found.transformer.width, found.transformer.heads, found.positions.count) == (16, 2, 4)
    pipe = Pipeline.load(tmp_path / "model")
    images = pipe("any", seeds=[0, 1])
    assert images.shape == (2, 2, 2, 3)
    assert set(map(tuple, images.reshape(-1, 3))) <= set(map(tuple, np.asarray(to_uint8(COLORS))))
    to_file("imagegpt", tmp_path / "model", tmp_path / "back.safetensors")
    again, wanted = read(tmp_path / "back.safetensors", "imagegpt"), random("imagegpt", SMALL)
    assert again.keys() == wanted.keys() and all((again[name] == wanted[name]).all() for name in wanted)
    assert convert("imagegpt", again, heads=2)[0] == artifact.config
    # The table of OpenAI's file alone.
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match="neither a preprocessor_config"):
        to_folder("imagegpt-clusters", folder, tmp_path / "colors", {})
    np.save(folder / "kmeans_centers.npy", COLORS[0])
    with pytest.raises(ConfigError, match=r"clusters of shape \(3,\)"):
        to_folder("imagegpt-clusters", folder, tmp_path / "colors", {})
    np.save(folder / "kmeans_centers.npy", COLORS)
    colors = to_folder("imagegpt-clusters", folder, tmp_path / "colors", {})
    np.testing.assert_array_equal(restore("imagegpt-clusters", colors.config, colors.model)["clusters"], COLORS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {"transformer.wpe.weight": t["transformer.wpe.weight"][:3]}, "no square image"),
        (lambda t: {"lm_head.weight": t["lm_head.weight"][:-1]}, "one more, the start"),
    ],
)
def test_other_shapes_are_named(change, said):
    tensors = random("imagegpt", SMALL)
    with pytest.raises(ValueError, match=said):
        convert("imagegpt", tensors | change(tensors))


def test_other_settings_are_named(folder, tmp_path):
    (folder / "config.json").write_text(json.dumps({"n_head": 2, "activation_function": "gelu"}))
    with pytest.raises(ConfigError, match="activation_function is 'gelu'"):
        to_folder("imagegpt", folder, tmp_path / "model", {})


@pytest.mark.parametrize(
    ("name", "shape", "count"), [("s", (512, 24, 8), 76e6), ("m", (1024, 36, 8), 455e6), ("l", (1536, 48, 16), 1.36e9)]
)
def test_released_sizes(name, shape, count):
    config = preset(f"imagegpt-{name}")
    assert (config.transformer.width, config.transformer.depth, config.transformer.heads) == shape
    model = jax.eval_shape(config.init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(model)) == pytest.approx(count, rel=0.02)


def test_clusters_are_k_means_of_the_pixels():
    """Batches of a few colours with a little noise: each gets a cluster near its mean."""
    rng = np.random.default_rng(0)
    centers = np.asarray([[-0.9, -0.9, -0.9], [0.8, 0, 0], [0, 0.7, -0.5], [0.3, 0.9, 0.9]], np.float32)
    config = ColorClusters(QuantizerConfig(8, 3, normalize=False, decay=0.8, revive=0.05))
    model = fresh(config)
    step = jax.jit(lambda model, image, key: config.loss(model, {"image": image}, key))
    first = None
    for n in range(60):
        image = centers[rng.integers(0, 4, (2, 8, 8))] + 0.02 * rng.normal(size=(2, 8, 8, 3))
        image = jnp.asarray(image, jnp.float32)
        output = step(model, image, jax.random.key(n))
        first, model = output.loss if first is None else first, output.state
    assert output.loss < 1e-3 < first
    codes = config.encode(model, jnp.asarray(centers).reshape(1, 2, 2, 3))
    np.testing.assert_allclose(config.decode(model, codes).reshape(4, 3), centers, atol=0.05)
    assert config.loss(model, {"image": image}, jax.random.key(0), train=False).state is model


def test_bytes_of_clusters_come_back():
    config, model = convert("imagegpt-clusters", {"clusters": COLORS})
    exact = np.rint(127.5 * (COLORS + 1)).astype(np.uint8).reshape(1, 4, 4, 3)
    codes = config.encode(model, jnp.asarray(exact, jnp.float32) / 127.5 - 1)
    np.testing.assert_array_equal(codes.reshape(-1), np.arange(16))
    np.testing.assert_array_equal(to_uint8(config.decode(model, codes)), exact)
    with pytest.raises(ConfigError, match="dim=3"):
        ColorClusters(QuantizerConfig(8, 4, normalize=False))
    for name in ("commitment", "codebook", "entropy", "temperature"):
        with pytest.raises(ConfigError, match=f"quantizer.{name} 3.0: clusters of colours have no such loss"):
            ColorClusters(QuantizerConfig(8, 3, normalize=False, **{name: 3.0}))


@pytest.mark.parametrize(("name", "millions"), [("imagegpt-s", 76), ("imagegpt-m", 455), ("imagegpt-l", 1362)])
def test_sizes_are_the_published_ones(name, millions):
    model = jax.eval_shape(preset(name).init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(model)) / 1e6 == pytest.approx(millions, rel=0.01)
