"""T5's encoder against the original, on random weights in folders as Hugging Face writes them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from t2i_jax.core.params import named
from t2i_jax.core.sharding import MeshConfig, shardings
from t2i_jax.text.t5 import T5, T5Encoder, T5Shape, buckets
from tests.fixtures.t5_files import SIZES, folder_of, vocabulary

CONFIGS = {
    "v1.1": SIZES | {"feed_forward_proj": "gated-gelu"},
    "v1.0": SIZES | {"feed_forward_proj": "relu", "num_layers": 1},
    "wide heads": SIZES | {"feed_forward_proj": "gated-gelu", "d_kv": 16},
    "few buckets": SIZES
    | {"feed_forward_proj": "gated-silu", "num_heads": 2, "relative_attention_num_buckets": 8}
    | {"relative_attention_max_distance": 20, "layer_norm_epsilon": 1e-4},
}
CAPTIONS = ["a red apple on the table", "a cat", "", "two dogs and a very long tail of words that goes on " * 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    folder_of(path, CONFIGS["v1.1"])
    vocabulary(path)
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_those_of_the_original(tmp_path, name):
    torch = pytest.importorskip("torch")
    original = folder_of(tmp_path, CONFIGS[name])
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 300, (3, 60)).astype(np.int32)
    mask = np.arange(60) < np.array([[60], [7], [1]])
    with torch.no_grad():
        expected = original(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())
    text = T5(str(tmp_path))
    found = np.asarray(jax.jit(text.features)(text.load(), ids, mask))
    assert found.dtype == np.float32 and text.feature_shape[1] == 24
    np.testing.assert_allclose(found[mask], expected.last_hidden_state.numpy()[mask], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("count, distance", [(32, 128), (8, 20), (64, 256)])
def test_buckets_are_those_of_the_original(count, distance):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    attention = transformers.models.t5.modeling_t5.T5Attention
    offset = torch.arange(600)[None] - torch.arange(600)[:, None]
    expected = attention._relative_position_bucket(offset, True, count, distance).numpy()
    np.testing.assert_array_equal(buckets(600, count, distance), expected)


def test_the_encoder_of_flan_t5_xl_has_its_size():
    sizes = {"d_model": 2048, "num_layers": 24, "num_heads": 32, "d_kv": 64, "d_ff": 5120, "vocab_size": 32128}
    shape = T5Shape.read(sizes | {"feed_forward_proj": "gated-gelu"})
    abstract = jax.eval_shape(lambda key: T5Encoder(shape, key), jax.random.key(0))
    assert sum(a.size for a in jax.tree.leaves(abstract)) == 1_223_527_424


def test_weights_lie_in_one_file_or_several(tmp_path, folder):
    torch = pytest.importorskip("torch")
    whole = T5(str(folder)).load()
    tensors = load_file(folder / "model.safetensors")
    for kind in ("sharded", "pickled", "with a decoder"):
        path = tmp_path / kind
        path.mkdir()
        shutil.copy(folder / "config.json", path)
        if kind == "sharded":
            names = sorted(tensors)
            parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
            for file, part in parts.items():
                save_file({n: tensors[n] for n in part}, path / file)
            index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
        elif kind == "pickled":
            torch.save({k: torch.tensor(v) for k, v in tensors.items()}, path / "pytorch_model.bin")
        else:  # of a full T5 only the encoder is taken; the words may have two names
            more = {"decoder.block.0.layer.0.layer_norm.weight": np.ones(3, np.float32)}
            more |= {"encoder.embed_tokens.weight": tensors["shared.weight"], "lm_head.weight": np.ones((2, 2))}
            save_file(tensors | more, path / "model.safetensors")
        for name, value in named(T5(str(path)).load()).items():
            np.testing.assert_array_equal(value[...], named(whole)[name][...])


def test_what_is_wrong_with_a_folder_is_told(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        T5(str(tmp_path)).load()
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights in it; one of model.safetensors"):
        T5(str(tmp_path)).load()
    tensors = load_file(folder / "model.safetensors")
    gone = "encoder.block.1.layer.0.SelfAttention.k.weight"
    save_file({k: v for k, v in tensors.items() if k != gone} | {"more": np.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{gone}: missing\n  more: unused"):
        T5(str(tmp_path)).load()
    with pytest.raises(FileNotFoundError, match=r"no spiece\.model"):
        T5(str(tmp_path))(["a"])
    with pytest.raises(ValueError, match="feed_forward_proj 'tanh' is not one of relu"):
        T5Shape.read(SIZES | {"feed_forward_proj": "tanh"})
    with pytest.raises(ValueError, match="no d_ff"):
        T5Shape.read({k: v for k, v in SIZES.items() if k != "d_ff"})
    with pytest.raises(ValueError, match=r"T5\.dtype 'float16'"):
        T5("x", dtype="float16")


def test_captions_end_and_are_padded(folder):
    text = T5(str(folder), length=12)
    ids, mask = text(CAPTIONS)
    assert ids.shape == (4, 12) and ids.dtype == np.int32
    lengths = mask.sum(1)
    assert lengths[2] == 0 and lengths[3] == 12
    for row, n in zip(ids, lengths, strict=True):
        assert not row[n:].any() and (n == 0 or (row[n - 1] == 1 and (row[: n - 1] > 1).all()))
    assert T5(str(folder)).length == 120
    np.testing.assert_array_equal(T5(str(folder), 12, clean=True)(["A <b>CAT</b>"])[0], text(["a cat"])[0])


def test_padding_does_not_change_features(folder):
    short, long = (T5(str(folder), n) for n in (14, 30))
    model = short.load()
    rows = []
    for text in (short, long):
        ids, mask = text(["a cat on the table"])
        rows.append(np.asarray(jax.jit(text.features)(model, ids, mask))[mask])
    np.testing.assert_allclose(*rows, atol=1e-5)


def test_bfloat16_is_near(folder):
    exact, half = T5(str(folder), 16), T5(str(folder), 16, "bfloat16")
    ids, mask = exact(CAPTIONS[:2])
    model = half.load()
    assert {v.dtype for v in named(model).values()} == {jnp.dtype("bfloat16")}
    a, b = (jax.jit(t.features)(m, ids, mask) for t, m in ((exact, exact.load()), (half, model)))
    assert b.dtype == jnp.bfloat16
    assert np.linalg.norm((a - b)[mask]) < 0.1 * np.linalg.norm(a[mask])


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(2, 2, 2)], ids=str)
def test_every_mesh_gives_the_same_features(folder, mesh):
    text = T5(str(folder), 16)
    ids, mask = text(CAPTIONS * 2)
    model = text.load()
    expected = np.asarray(jax.jit(text.features)(model, ids, mask))
    mesh = mesh.build()
    with jax.set_mesh(mesh):
        placed = jax.device_put(model, shardings(model, mesh))
        if mesh.shape["tensor"] > 1:
            assert placed.blocks.attention.qkv.w[...].sharding.spec == jax.P(None, "fsdp", "tensor")
        found = np.asarray(jax.jit(text.features)(placed, ids, mask))
    np.testing.assert_allclose(found[mask], expected[mask], rtol=1e-5, atol=1e-5)
