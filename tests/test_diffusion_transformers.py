"""PixArt and Stable Diffusion 3: our Transformer against those of diffusers on random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.convert import convert
from t2i_jax.core.keys import image_keys
from t2i_jax.interop import pixart, stable_diffusion_3
from t2i_jax.nn.positions import SinCosPositions
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.storage.artifacts import bundle_files, resolve_files
from t2i_jax.text.clip import ClipText
from t2i_jax.text.t5 import T5
from t2i_jax.text.triple import Triple

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("diffusers")

PIXART = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "cross_attention_dim": 16}
PIXART |= {"sample_size": 8, "caption_channels": 12, "interpolation_scale": 2}
THIRD = {"sample_size": 4, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8}
THIRD |= {"num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16}
THIRD |= {"pooled_projection_dim": 10, "pos_embed_max_size": 5}


def random_weights(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (".norm_" in name))
    return module.eval(), {k: v.numpy() for k, v in module.state_dict().items()}


def said(model, x, t, batch):
    """What our network says of x, channels first, with nothing dropped."""

    @jax.jit
    def run(model, x):
        return model(jnp.moveaxis(x, 1, -1), jnp.asarray(t), model.read(batch, jnp.zeros(len(x), bool)))

    return np.moveaxis(np.asarray(run(model, x)), -1, 1)


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_pixart():
    module, tensors = random_weights(theirs.PixArtTransformer2DModel(**PIXART))
    rng = np.random.default_rng(0)
    tensors["null_features"] = rng.normal(size=(5, 12)).astype(np.float32)
    config, model = convert("pixart", tensors, **pixart.settings(module.config))
    assert config.network.learn_variance and config.network.positions == SinCosPositions(2)
    x, text = rng.normal(size=(2, 4, 8, 8)).astype(np.float32), rng.normal(size=(2, 5, 12)).astype(np.float32)
    t, mask = np.asarray([3, 801]), np.asarray([[1, 1, 1, 0, 0], [1] * 5], bool)
    with torch.no_grad():
        given = {"encoder_attention_mask": torch.tensor(mask), "added_cond_kwargs": {}}
        wanted = module(torch.tensor(x), torch.tensor(text), torch.tensor(t), **given).sample.numpy()
    close(said(model, x, t, {"features": text, "text_mask": mask}), wanted)


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_stable_diffusion_3(qk_norm):
    module, tensors = random_weights(theirs.SD3Transformer2DModel(**THIRD, qk_norm=qk_norm))
    rng = np.random.default_rng(0)
    tensors["null_features"] = rng.normal(size=(6, 12)).astype(np.float32)
    hints = stable_diffusion_3.settings(module.config) | {"length": 5}
    config, model = convert("stable-diffusion-3", tensors, **hints)
    x, text = rng.normal(size=(2, 4, 4, 4)).astype(np.float32), rng.normal(size=(2, 5, 12)).astype(np.float32)
    pooled, t = rng.normal(size=(2, 10)).astype(np.float32), np.asarray([3.0, 801.0], np.float32)
    with torch.no_grad():
        wanted = module(torch.tensor(x), torch.tensor(text), torch.tensor(pooled), torch.tensor(t)).sample.numpy()
    features = np.concatenate([np.pad(pooled, ((0, 0), (0, 2)))[:, None], text], 1)
    close(said(model, x, t, {"features": features}), wanted)
    if qk_norm is None:
        options = dataclasses.replace(DiffusionSampler(), steps=3, guidance=3.0)
        drawn = config.sample(model, {"features": features}, image_keys([0, 1]), options)
        assert drawn.shape == (2, 4, 4, 4) and np.isfinite(drawn).all()


def test_three_encoders_are_one_text(tmp_path):
    transformers = pytest.importorskip("transformers")
    clip = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 6}
    clip |= {"vocab_size": 516, "bos_token_id": 514, "eos_token_id": 515}
    sizes = [transformers.CLIPTextConfig(**clip, hidden_size=d, projection_dim=d) for d in (4, 8)]
    clips = [random_weights(transformers.CLIPTextModelWithProjection(config))[0] for config in sizes]
    last = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    t5 = random_weights(transformers.T5EncoderModel(transformers.T5Config(**last, feed_forward_proj="gated-gelu")))[0]
    for name, part in {"first": clips[0], "second": clips[1], "t5": t5}.items():
        part.save_pretrained(tmp_path / name)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    merges = str(tmp_path / "merges.txt")
    text = Triple(
        *(ClipText(str(tmp_path / name), vocabulary=merges) for name in ("first", "second")),
        T5(str(tmp_path / "t5"), 5),
    )
    away = tmp_path / "released"
    away.mkdir()
    moved = bundle_files(text, away, whole=True)
    assert (
        moved.first.folder == "first_text" and moved.t5.folder == "t5_text" and (away / moved.first.vocabulary).exists()
    )
    for name in ("first", "second", "t5"):
        (tmp_path / name).rename(tmp_path / f"old {name}")
    text = resolve_files(moved, away)
    ids = np.concatenate([text.first(["cat"])[0], text.second(["cat"])[0], [[7, 8, 1, 0, 0]]], 1)
    found = jax.jit(text.features)(text.load(), ids, np.ones(ids.shape, bool))
    assert found.shape == (1, *text.feature_shape)
    with torch.no_grad():
        said = [clip(torch.tensor(ids[:, :6]), output_hidden_states=True) for clip in clips]
        pooled = torch.cat([s.text_embeds for s in said], -1).numpy()
        tokens = torch.cat([s.hidden_states[-2] for s in said], -1).numpy()
        close(found[:, 7:], t5(torch.tensor(ids[:, 12:])).last_hidden_state.numpy())
    close(found[:, 0, :12], pooled)
    close(found[:, 1:7, :12], tokens)
    np.testing.assert_array_equal(found[:, :7, 12:], 0)


def test_what_cannot_be_read_is_told():
    with pytest.raises(ValueError, match="this is no Transformer of PixArt"):
        convert("pixart", {})
    with pytest.raises(ValueError, match="norm_type"):
        pixart.settings({"norm_type": "layer_norm"})
    _, tensors = random_weights(theirs.PixArtTransformer2DModel(**PIXART, use_additional_conditions=True))
    with pytest.raises(ValueError, match="resolution_embedder"):
        convert("pixart", tensors)
    _, tensors = random_weights(theirs.SD3Transformer2DModel(**THIRD, dual_attention_layers=(0,)))
    with pytest.raises(ValueError, match="attn2"):
        convert("stable-diffusion-3", tensors)
