"""Stable Diffusion: our UNet against that of diffusers, and a whole folder that becomes a model that samples."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.cli import main
from t2i_jax.convert import convert, diffusers, restore
from t2i_jax.core.keys import image_keys
from t2i_jax.interop import stable_diffusion as published
from t2i_jax.networks.condition import Context
from t2i_jax.pipeline import Pipeline
from t2i_jax.storage.artifacts import load_artifact

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("diffusers")

TINY = {
    "sample_size": 4,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
KINDS = {
    "1": {"attention_head_dim": 4},
    "2": {"attention_head_dim": (2, 4), "use_linear_projection": True, "transformer_layers_per_block": 2},
}


def random_unet(**fields):
    torch.manual_seed(0)
    unet = theirs.UNet2DConditionModel(**(TINY | fields)).eval()
    with torch.no_grad():
        for name, p in unet.named_parameters():
            p.copy_(torch.randn_like(p) * (0.1 if p.ndim > 1 else 0.2) + ("norm" in name and name.endswith("weight")))
    return unet


def arrays(module):
    return {k: v.numpy() for k, v in module.state_dict().items()}


@pytest.mark.parametrize("version", KINDS)
def test_the_unet_is_that_of_diffusers(version):
    unet = random_unet(**KINDS[version])
    tensors, hints = arrays(unet), published.settings(unet.config)
    config, model = convert("stable-diffusion", tensors, length=5, **hints)
    back = restore("stable-diffusion", config, model)
    assert back.keys() == tensors.keys() and all(np.array_equal(back[k], tensors[k]) for k in tensors)

    rng = np.random.default_rng(0)
    x, text = rng.normal(size=(2, 4, 4, 4)).astype(np.float32), rng.normal(size=(2, 5, 24)).astype(np.float32)
    t = np.asarray([3, 801])
    with torch.no_grad():
        wanted = unet(torch.tensor(x), torch.tensor(t), torch.tensor(text)).sample.numpy()
    context = Context(jnp.zeros((2, 64)), jnp.asarray(text), jnp.ones((2, 5), bool))
    found = jax.jit(lambda m, x: m(x, jnp.asarray(t), context))(model, x.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(found.transpose(0, 3, 1, 2), wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as diffusers lays it out, with the programs that wrote it."""
    transformers = pytest.importorskip("transformers")
    path, unet = tmp_path_factory.mktemp("sd"), random_unet()
    vae = theirs.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.2,
    ).eval()
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=516,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=6,
            bos_token_id=514,
            eos_token_id=515,
        )
    ).eval()
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    spacing = {"timestep_spacing": "linspace", "steps_offset": 1}
    scheduler = theirs.EulerDiscreteScheduler(**betas, **spacing, prediction_type="v_prediction")
    for name, part in {"unet": unet, "vae": vae, "text_encoder": text}.items():
        part.save_pretrained(path / name)
    scheduler.save_pretrained(path / "scheduler")
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    (path / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    (path / "tokenizer" / "vocab.json").write_text(json.dumps({"!": 0}))
    return path, theirs.StableDiffusionPipeline(vae, text, None, unet, scheduler, None, None, None, False)


def test_a_folder_becomes_a_model_that_draws_the_same_images(folder, tmp_path):
    path, pipeline = folder
    main(["convert", "stable-diffusion", str(path), "--out", str(tmp_path / "model"), "--solver", "euler"])
    ours = Pipeline.load(tmp_path / "model")
    assert ours.family.predicts == "v" and ours.codec.config.scale == 0.2 and ours.text.pad == 0
    assert load_artifact(tmp_path / "model").image_size == 8
    options = jax.tree.map(lambda x: x, ours.options)
    options = type(options)(**(vars(options) | {"steps": 4, "guidance": 4.0}))
    images = ours.sample(["cat", "a cat"], [3, 4], options)

    ids, _ = ours.text(["cat", "a cat", ""])
    with torch.no_grad():
        features = pipeline.text_encoder(torch.tensor(ids)).last_hidden_state
    normal = lambda key: jax.random.normal(
        jax.random.fold_in(jax.random.fold_in(key, 0), 0), ours.family.sample_spec().shape
    )
    noise = np.asarray(jax.vmap(normal)(image_keys([3, 4]))).transpose(0, 3, 1, 2)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.set_timesteps(4)
    spread = float(pipeline.scheduler.sigmas[0])  # theirs is noise alone times this, ours has all the power of x
    wanted = pipeline(
        prompt_embeds=features[:2],
        negative_prompt_embeds=features[2:].repeat(2, 1, 1),
        latents=torch.tensor(noise * (1 + spread**2) ** 0.5 / spread),
        num_inference_steps=4,
        guidance_scale=4.0,
        height=8,
        width=8,
        output_type="np",
    ).images
    assert np.abs(images / 255 - wanted).max() < 1.5 / 255


def test_what_is_not_known_is_told(folder):
    config = {"block_out_channels": [16, 32], **{k: TINY[k] for k in ("down_block_types", "up_block_types")}}
    for field, value in (("class_embed_type", "timestep"), ("up_block_types", ["UpBlock2D"] * 2), ("act_fn", "gelu")):
        with pytest.raises(ValueError, match=field.removeprefix("up_")):
            published.settings(config | {field: value})
    with pytest.raises(ValueError, match="attention_head_dim"):
        published.settings(config | {"attention_head_dim": [4, 4, 2]})
    with pytest.raises(ValueError, match="betas of scaled_linear"):
        published.schedule({"beta_schedule": "scaled_linear", "beta_start": 0.5})
    wide = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}
    assert published.schedule(wide)["ends"] == (0.0001, 0.02)
    assert "ends" not in published.schedule(wide | {"beta_schedule": "linear"})
    with pytest.raises(ValueError, match="scheduler_config"):
        published.schedule({"prediction_type": "noise"})
    with pytest.raises(FileNotFoundError, match="vocab.json"):
        (folder[0] / "tokenizer" / "vocab.json").rename(folder[0] / "tokenizer" / "other.json")
        diffusers.clip_of(folder[0])


RELEASED = {
    "1.5": (859_520_964, {"sample_size": 64, "cross_attention_dim": 768}),
    "2.1": (
        865_910_724,
        {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("version", RELEASED)
def test_released_sizes_are_taken_whole(version):
    count, fields = RELEASED[version]
    with torch.device("meta"):
        unet = theirs.UNet2DConditionModel(**fields)
    tensors = {k: jax.ShapeDtypeStruct(v.shape, np.float32) for k, v in unet.state_dict().items()}
    config, model = convert("stable-diffusion", tensors, **published.settings(unet.config))
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(model)) == count
    default, _ = convert("stable-diffusion", tensors)
    assert default == config
