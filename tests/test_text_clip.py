"""CLIP against the original, on random weights in folders and files as they are published."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from t2i_jax.convert import folders
from t2i_jax.core.config import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.params import named
from t2i_jax.core.sharding import MeshConfig, shardings
from t2i_jax.interop import clip as published
from t2i_jax.interop.names import to_theirs
from t2i_jax.networks.clip import CLIPTowers
from t2i_jax.text import clip
from t2i_jax.text.clip import ClipEmbedding, ClipText
from tests.fixtures.clip_files import TEXT, letters

IMAGE = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
IMAGE |= {"image_size": 24, "patch_size": 8, "projection_dim": 20}
GELU = {"hidden_act": "gelu", "layer_norm_eps": 1e-3}
CONFIGS = {
    "quick gelu": (TEXT, IMAGE),
    "gelu": (TEXT | GELU | {"num_hidden_layers": 1}, IMAGE | GELU | {"image_size": 16, "patch_size": 4}),
    "largest id": (TEXT | {"eos_token_id": 2}, IMAGE | {"num_attention_heads": 2}),
}


def folder_of(path, text=TEXT, image=IMAGE):
    """A random CLIP in a folder, and the program that wrote it."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=20)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.3) + (1 if "norm" in name and p.ndim == 1 else 0))
    model.save_pretrained(path)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    folder_of(path, TEXT | {"vocab_size": 516, "eos_token_id": 515, "bos_token_id": 514})
    letters(path)
    return path


def openai(config, rng):
    """Random tensors under OpenAI's names."""
    model = jax.eval_shape(config.init, jax.random.key(0))
    model = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32) * 0.2, model)
    table = published.openai_table(config.text.head_size, config.image.head_size)
    return model, to_theirs(model, table)


def ids_of(rng):
    ids = rng.integers(3, 58, (4, 12)).astype(np.int32)
    for row, at in zip(ids, (11, 5, 3, 7), strict=True):
        row[at], row[at + 1 :] = 59, 0
    ids[1, 8] = 59  # a second end counts for nothing
    return ids


@pytest.mark.parametrize("name", CONFIGS)
def test_both_towers_are_those_of_the_original(tmp_path, name):
    torch = pytest.importorskip("torch")
    original = folder_of(tmp_path, *CONFIGS[name])
    config, model = clip.load(tmp_path)
    rng = np.random.default_rng(0)
    ids = ids_of(rng)
    images = rng.normal(size=(3, config.size, config.size, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = original(
            input_ids=torch.tensor(ids).long(), pixel_values=torch.tensor(images).permute(0, 3, 1, 2), return_dict=True
        )
    expected = {
        "tokens": theirs.text_model_output.last_hidden_state,
        "patches": theirs.vision_model_output.last_hidden_state,
        "text": theirs.text_embeds,
        "image": theirs.image_embeds,
        "logits": theirs.logits_per_image,
    }

    @jax.jit
    def ours(model, ids, images):
        found = {"tokens": model.text(ids), "patches": model.image(images), "logits": model.logits(images, ids)}
        return found | {"text": clip.unit(model.text.embed(ids)), "image": clip.unit(model.image.embed(images))}

    found = ours(model, ids, images)
    for k, value in expected.items():
        np.testing.assert_allclose(found[k], value.numpy(), atol=3e-5, rtol=2e-4, err_msg=k)


def test_names_of_openai_hold_the_same(tmp_path, folder):
    torch = pytest.importorskip("torch")
    tiny = dataclasses.replace(clip.of_huggingface(clip.huggingface.config(folder)), end=None)
    rng = np.random.default_rng(0)
    tiny = dataclasses.replace(tiny, image=with_fields(tiny.image, heads=3))
    model, tensors = openai(tiny, rng)
    tensors |= {"input_resolution": np.array(24), "context_length": np.array(12), "vocab_size": np.array(516)}
    save_file(tensors, tmp_path / "clip.safetensors")
    torch.save({k: torch.tensor(v) for k, v in tensors.items()}, tmp_path / "clip.pt")
    halves = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in tensors.items()}
    archive(torch, halves, tmp_path / "jit.pt")  # as OpenAI's are
    for file in ("clip.safetensors", "clip.pt", "jit.pt"):
        config, loaded = clip.load(tmp_path / file, head=8)
        assert config == tiny
        for name, value in named(loaded).items():
            assert value.dtype == np.float32
            exact = 1e-3 if file == "jit.pt" else 0
            np.testing.assert_allclose(value[...], named(model)[name][...], rtol=exact, atol=exact, err_msg=name)


def test_files_do_not_tell_their_activation_but_folders_do(tmp_path):
    """The same weights with plain GELU: in Hugging Face's folder, in open_clip's, and in a file, where it is said."""
    folder_of(tmp_path / "hf", TEXT | GELU | {"layer_norm_eps": 1e-5}, IMAGE | GELU | {"layer_norm_eps": 1e-5})
    config, model = clip.load(tmp_path / "hf")
    assert config.text.activation == config.image.activation == "gelu"
    tensors = to_theirs(model, published.openai_table(config.text.head_size, config.image.head_size))
    (tmp_path / "oc").mkdir()
    save_file(tensors, tmp_path / "oc" / "open_clip_model.safetensors")
    image, text = {"image_size": 24, "head_width": 8, "width": 24, "layers": 3}, {"width": 32, "heads": 4}
    about = {"model_cfg": {"embed_dim": 20, "vision_cfg": image, "text_cfg": text}, "preprocess_cfg": {}}
    config_file = tmp_path / "oc" / "open_clip_config.json"
    config_file.write_text(json.dumps(about))
    file = tmp_path / "oc" / "open_clip_model.safetensors"
    config = dataclasses.replace(config, end=None)
    assert clip.load(tmp_path / "oc")[0] == config == clip.load(file, 8, "gelu")[0]
    assert clip.load(file, 8)[0].text.activation == "quick_gelu"
    about["model_cfg"]["quick_gelu"] = True
    config_file.write_text(json.dumps(about))
    assert clip.load(tmp_path / "oc")[0].image.activation == "quick_gelu"
    about["model_cfg"]["vision_cfg"]["timm_model_name"] = "convnext"
    config_file.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="timm_model_name='convnext' makes another network"):
        clip.load(tmp_path / "oc")
    for faulty, fault in (({}, "no objects vision_cfg"), ({"vision_cfg": image, "text_cfg": {"heads": 0}}, "positive")):
        config_file.write_text(json.dumps({"model_cfg": faulty}))
        with pytest.raises(ValueError, match=f"open_clip_config.json cannot be read: .*{fault}"):
            clip.load(tmp_path / "oc")
    with pytest.raises(ValueError, match="has the activation gelu; it cannot be read with 'quick_gelu'"):
        ClipText(str(tmp_path / "hf"), activation="quick_gelu").load()
    with pytest.raises(ValueError, match="activation 'tanh' is not one of quick_gelu, gelu"):
        clip.load(file, 8, "tanh")
    assert folders.text_side(f"clip:{tmp_path / 'hf'},activation=gelu") == ClipEmbedding(
        str(tmp_path / "hf"), activation="gelu"
    )
    assert folders.text_side(f"clip-tokens:{file},pad=9").pad == 9
    with pytest.raises(ConfigError, match="ClipEmbedding has no field activaton; it has vocabulary, activation"):
        folders.text_side(f"clip:{file},activaton=gelu")


def archive(torch, tensors, path):
    """The tensors as a TorchScript archive, in modules within modules."""

    class Tree(torch.nn.Module):
        def __init__(self, leaves):
            super().__init__()
            for name in dict.fromkeys(k.split(".")[0] for k in leaves):
                below = {k.split(".", 1)[1]: v for k, v in leaves.items() if k.startswith(f"{name}.")}
                if below:
                    self.add_module(name, Tree(below))
                else:
                    self.register_buffer(name, torch.tensor(leaves[name]))

        def forward(self, x):
            return x

    torch.jit.trace(Tree(tensors).eval(), torch.zeros(1)).save(str(path))


def test_fused_projections_are_those_of_the_original():
    """in_proj of OpenAI's attention and the three projections of Hugging Face's are the same numbers."""
    plain = CLIPTowers()
    text = with_fields(plain.text, width=16, depth=1, heads=2)
    image = with_fields(plain.image, width=24, depth=2, heads=3)
    config = CLIPTowers(text, image, dim=8, vocabulary=30, length=6, size=8, patch=4)
    model, theirs = openai(config, np.random.default_rng(0))
    other = to_theirs(model, published.huggingface_table(8, 8))
    for part in ("weight", "bias"):
        joined = [other[f"vision_model.encoder.layers.1.self_attn.{p}_proj.{part}"] for p in "qkv"]
        np.testing.assert_array_equal(
            np.concatenate(joined), theirs[f"visual.transformer.resblocks.1.attn.in_proj_{part}"]
        )
    np.testing.assert_array_equal(other["text_projection.weight"].T, theirs["text_projection"])


def test_released_sizes_are_told_by_shapes():
    tower = lambda d, n, depth=12: with_fields(CLIPTowers().text, width=d, depth=depth, heads=n, mlp=4 * d)
    large = CLIPTowers(tower(768, 12), tower(1024, 16, 24), 768, patch=14)
    small = CLIPTowers(tower(512, 8), tower(768, 12))
    for config, count in ((small, 151_277_313), (dataclasses.replace(small, patch=16), 149_620_737),
                          (large, 427_616_513)):  # fmt: skip
        abstract = jax.eval_shape(config.init, jax.random.key(0))
        assert sum(a.size for a in jax.tree.leaves(abstract)) == count
        shapes = jax.eval_shape(lambda m, c=config: theirs(m, c), abstract)
        assert clip.of_openai(shapes) == config


def theirs(model, config):
    """Abstract tensors under OpenAI's names."""
    lines = published.openai_table(config.text.head_size, config.image.head_size)
    found = {}
    for ours, variable in named(model).items():
        for n, part in enumerate(variable[...] if lines[ours].stacked else [variable[...]]):
            found |= dict(zip(lines[ours].layer(n), lines[ours].theirs(part), strict=True))
    return found


def test_what_is_wrong_is_told(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no such file, and no folder"):
        clip.load(tmp_path / "none.pt")
    save_file({"visual.attnpool.q_proj.weight": np.ones((2, 2), np.float32)}, tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match="image tower is a ResNet; only ViT"):
        clip.load(tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match="config.json has no vision_config"):
        clip.of_huggingface({"text_config": {}})
    with pytest.raises(ValueError, match=r"text_config\.hidden_act: activation 'tanh' is not one of quick_gelu"):
        clip.of_huggingface({"text_config": {"hidden_act": "tanh"}, "vision_config": {}})
    bad = tmp_path / "bad"
    bad.mkdir()
    shutil.copy(folder / "config.json", bad)
    tensors = load_file(folder / "model.safetensors")
    tensors["more"] = tensors.pop("visual_projection.weight")
    save_file(tensors, bad / "model.safetensors")
    with pytest.raises(ValueError, match=r"more: unused\n  visual_projection.weight: missing"):
        clip.load(bad)
    ClipText(str(bad)).load()  # the tower of pictures is not asked for
    (bad / "merges.txt").write_text("#\n" + "a b\n" * 300)
    with pytest.raises(ValueError, match="the vocabulary gives id 813, the model has 516"):
        ClipText(str(bad))(["a"])


def test_features_of_captions(folder):
    text, long = ClipText(str(folder)), ClipText(str(folder), normalise=True)
    ids, mask = text(["a cat", "", "a very long caption of many words"])
    assert ids.shape == (3, 12) == mask.shape and text.feature_shape == (12, 32)
    assert mask.all(1).tolist() == [True, False, True] and not mask[1].any()
    assert ids[0, 0] == 514 and ids[0, 2:4].tolist() == [513, 515] and not ids[0, 4:].any() and ids[2, -1] == 515
    assert (ClipText(str(folder), pad=515)(["a"])[0][0, 2:] == 515).all()
    model = text.load()
    x, y = (np.asarray(jax.jit(t.features)(model, ids, mask)) for t in (text, long))
    assert x.shape == (3, 12, 32)
    np.testing.assert_allclose(y, x / np.linalg.norm(x, axis=-1, keepdims=True), atol=1e-6)


def test_embeddings_of_captions_and_pictures_have_length_one(folder):
    text = ClipEmbedding(str(folder))
    ids, mask = text(["a cat", ""])
    assert ids.shape == (2, 12) and mask.tolist() == [[True], [False]] and text.feature_shape == (1, 20)
    model = text.load()
    images = jax.random.uniform(jax.random.key(0), (3, 32, 48, 3), minval=-1)
    a = jax.jit(text.features)(model, ids, mask)
    b = jax.jit(text.image_features)(model, images)
    assert a.shape == (2, 1, 20) and b.shape == (3, 1, 20)
    for x in (a, b):
        np.testing.assert_allclose(jnp.linalg.norm(x, axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 24), (31, 57), (300, 224), (500, 333)], ids=str)
def test_pictures_are_prepared_as_by_the_original(shape):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8))
    picture = rough.resize(shape[::-1], Image.Resampling.BICUBIC)
    size = 24 if shape[0] < 100 else 224
    processor = kind(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    expected = np.asarray(processor(picture, return_tensors="np")["pixel_values"]).transpose(0, 2, 3, 1)
    found = clip.preprocess([picture], size)
    step = 1 / 255 / clip.STD.min()
    assert np.abs(found - expected).max() <= 1.01 * step


def test_the_device_sees_what_pillow_makes():
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (20, 20, 3)).astype(np.uint8))
    as_seen = jax.jit(clip.as_seen, static_argnums=1)
    for side in (16, 50):
        image = np.asarray(rough.resize((side, side), Image.Resampling.BICUBIC))
        found = as_seen(image[None] / np.float32(127.5) - 1, 32)
        assert np.abs(found - clip.preprocess([image], 32)).max() <= 1.05 / 255 / clip.STD.min()
    wide = rng.uniform(-1, 1, (1, 32, 40, 3)).astype(np.float32)
    np.testing.assert_allclose(as_seen(wide, 32), as_seen(wide[:, :, 4:36], 32), atol=1e-6)


def test_every_mesh_gives_the_same_embeddings(folder):
    text = ClipEmbedding(str(folder))
    ids, mask = text(["a cat", "two", "three", "four"] * 2)
    images = jax.random.uniform(jax.random.key(0), (8, 24, 24, 3), minval=-1)
    both = jax.jit(lambda m, ids, images: (text.features(m, ids, mask), text.image_features(m, images)))
    model = text.load()
    expected = both(model, ids, images)
    mesh = MeshConfig(2, 2, 2).build()
    with jax.set_mesh(mesh):
        found = both(jax.device_put(model, shardings(model, mesh)), ids, images)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
