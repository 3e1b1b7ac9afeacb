"""The upscaler of Stable Diffusion as diffusers keeps it: our UNet against its class, its pipeline with fixed noise,
and a folder that becomes the last stage of a cascade."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from t2i_jax.cli import main
from t2i_jax.convert import convert, restore
from t2i_jax.core.keys import image_keys
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.interop import stable_diffusion as published
from t2i_jax.models.diffusion import join_inputs
from t2i_jax.networks.condition import Conditioning, CrossAttnFeatures
from t2i_jax.noise.processes import Discrete
from t2i_jax.pipeline import Pipeline
from t2i_jax.presets import preset
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.storage.artifacts import Artifact, load_artifact, save_artifact
from tests.fixtures.families import FAMILIES

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("diffusers")

WORDS, WIDTH = 6, 24
TINY = {
    "sample_size": 8,
    "in_channels": 7,
    "out_channels": 4,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "only_cross_attention": (True, True, False),
    "num_class_embeds": 1000,
    "use_linear_projection": True,
}
AS_WIDE = TINY | {"cross_attention_dim": 32}
"""Where shapes do not say what the first attention reads."""
WIDE = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}


def random_unet(out=1.0, **fields):
    """A UNet of theirs with random weights, those of its last layer times `out`."""
    torch.manual_seed(0)
    unet = theirs.UNet2DConditionModel(**(TINY | fields)).eval()
    with torch.no_grad():
        for name, p in unet.named_parameters():
            p.copy_(torch.randn_like(p) * (0.1 if p.ndim > 1 else 0.2) + ("norm" in name and name.endswith("weight")))
            p.mul_(out if name.startswith("conv_out") else 1)
    return unet


def ours_of(unet):
    """Our config and model of a UNet."""
    tensors = {k: v.numpy() for k, v in unet.state_dict().items()}
    return convert("stable-diffusion-upscaler", tensors, length=WORDS, **published.settings(unet.config)), tensors


def swapped(x):
    return jnp.asarray(np.asarray(x).transpose(0, 2, 3, 1))


def close(found, wanted, limit):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(np.asarray(found), wanted, atol=limit * np.abs(wanted).max())


def given(seed, width=WIDTH):
    """Features of captions and of empty ones, latents, and small images."""
    rng = np.random.default_rng(seed)
    text = rng.normal(size=(2, 2, WORDS, width)).astype(np.float32)
    x = rng.normal(size=(2, 4, 8, 8)).astype(np.float32)
    return text, x, rng.uniform(-1, 1, size=(2, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("fields", [TINY, AS_WIDE], ids=["tiny", "as wide as the context"])
def test_the_unet_is_that_of_diffusers(fields):
    unet = random_unet(**fields)
    (config, model), tensors = ours_of(unet)
    assert config.network.only_context == (2,) and config.network.noise_levels == 1000
    back = restore("stable-diffusion-upscaler", config, model)
    assert back.keys() == tensors.keys() and all(np.array_equal(back[k], tensors[k]) for k in tensors)

    text, x, small = given(1, fields["cross_attention_dim"])
    t, levels = np.asarray([3, 801]), np.asarray([0, 349])
    with torch.no_grad():
        inputs = torch.cat([torch.tensor(x), torch.tensor(small)], 1)
        wanted = unet(inputs, torch.tensor(t), torch.tensor(text[1]), class_labels=torch.tensor(levels)).sample
    batch = {
        "features": jnp.asarray(text[1]),
        "low_res": swapped(small),
        "low_res_noise": jnp.asarray(levels, jnp.float32) / 1000,
    }

    def ours(model, x):
        read = join_inputs(x, batch, config.network.extra_inputs)
        return model(read, jnp.asarray(t), model.read(batch, jnp.zeros(2, bool)))

    close(jax.jit(ours)(model, swapped(x)).transpose(0, 3, 1, 2), wanted, 1e-4)


def test_levels_of_noise_are_whole_steps():
    """Of a share that stands for a step, the step itself is embedded and its noise is added."""
    (config, _), _ = ours_of(random_unet())
    steps = np.arange(351)
    small = jnp.zeros((351, 1, 1, 3))
    found = config.noised_low_res(small, jnp.asarray(steps / 1000, jnp.float32), jnp.ones_like(small))
    np.testing.assert_array_equal(np.rint(1000 * np.asarray(found["low_res_noise"])), steps)
    np.testing.assert_allclose(found["low_res"][:, 0, 0, 0], config.low_res_process.tables.sigma[:351], rtol=1e-5)


def test_training_draws_levels_below_the_greatest():
    """Of the table, the loss reads rows below it alone, those just below it too."""
    (config, model), _ = ours_of(random_unet())
    rng = np.random.default_rng(0)
    batch = {
        "codes": rng.normal(size=(64, 8, 8, 4)),
        "low_res": rng.uniform(-1, 1, (64, 8, 8, 3)),
        "features": rng.normal(size=(64, WORDS, WIDTH)),
        "null_features": np.zeros((64, WORDS, WIDTH)),
    }
    batch = {k: jnp.asarray(v, jnp.float32) for k, v in batch.items()}

    @jax.jit
    def loss(model, low, high):
        level = jnp.arange(1000)[:, None]
        model = jax.tree.map(lambda x: x, model)
        model.noise.w[...] += jnp.where((level >= low) & (level < high), 100.0, 0.0)
        return config.loss(model, batch, jax.random.key(0)).loss

    plain = loss(model, 0, 0)
    assert loss(model, 350, 1000) == plain
    assert loss(model, 300, 350) != plain and loss(model, 0, 50) != plain


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder as their pipeline saves it, and that pipeline."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("upscaler")
    torch.manual_seed(1)
    vae = theirs.AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.08333,
    ).eval()
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=516,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=WORDS,
            bos_token_id=514,
            eos_token_id=515,
        )
    ).eval()
    scheduler = theirs.DDIMScheduler(
        **WIDE, prediction_type="v_prediction", steps_offset=1, set_alpha_to_one=False, clip_sample=False
    )
    low_res = theirs.DDPMScheduler(**WIDE)
    # With larger outputs, steps amplify the rounding of those before.
    unet = random_unet(out=0.2)
    pipe = theirs.StableDiffusionUpscalePipeline(vae, text, None, unet, low_res, scheduler, None, None, None, 300)
    pipe.save_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    (path / "tokenizer").mkdir(exist_ok=True)
    (path / "tokenizer" / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    (path / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    (path / "tokenizer" / "vocab.json").write_text(json.dumps({"!": 0}))
    return path, pipe


@pytest.fixture(scope="module")
def folder(released, tmp_path_factory):
    """The same as a model of ours."""
    out = tmp_path_factory.mktemp("ours") / "X4"
    main(["convert", "stable-diffusion-upscaler", str(released[0]), "--out", str(out)])
    return out


def test_settings_of_a_folder_are_read(folder):
    artifact = load_artifact(folder)
    config, wide = artifact.config, Discrete("scaled_linear", ends=(1e-4, 0.02))
    assert (config.process, config.low_res_process, config.predicts) == (wide, wide, "v")
    assert config.noise_aug == 0.3 and artifact.image_size == 32
    options = config.sampling
    assert (options.guidance, options.noise_aug, options.spacing, config.solver) == (9.0, 0.02, "leading", "ddim")


def test_a_trajectory_is_that_of_their_pipeline(released, folder, monkeypatch):
    """Latents with their noise, and the images that they become."""
    _, pipe = released
    ours, steps, level = Pipeline.load(folder, MeshConfig(1)), 10, 20
    prompts, seeds = ["cat", "a cat"], [3, 4]
    _, _, small = given(2)
    options = dataclasses.replace(ours.options, steps=steps, guidance=4.0, noise_aug=level / 1000)
    keys = image_keys(seeds)
    ids, mask = ours.text([*prompts, ""])
    text = np.asarray(jax.jit(ours.text.features)(ours.encoder, ids, mask))
    normal = lambda n, shape: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, n), shape))
    start = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (8, 8, 4)))
    noise = {
        "small": np.asarray(normal(3, (8, 8, 3))(keys)).transpose(0, 3, 1, 2),
        "latents": np.asarray(start(jax.vmap(jax.random.fold_in, (0, None))(keys, 0))).transpose(0, 3, 1, 2),
    }
    drawn = [noise["small"], noise["latents"]]

    def draw(shape, **_):
        assert drawn[0].shape == tuple(shape), (drawn[0].shape, shape)
        return torch.tensor(drawn.pop(0))

    monkeypatch.setattr(theirs.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale, "randn_tensor", draw)
    found = pipe(
        image=torch.tensor(small),
        prompt_embeds=torch.tensor(text[:2]),
        negative_prompt_embeds=torch.tensor(text[2:]).repeat(2, 1, 1),
        num_inference_steps=steps,
        guidance_scale=4.0,
        noise_level=level,
        output_type="latent",
    )
    wanted = found.images
    condition = {"features": jnp.asarray(text[:2]), "low_res": swapped(small)}
    latents = ours.family.sample(ours.model, condition, keys, options, guided=True)
    close(latents.transpose(0, 3, 1, 2), wanted, 1e-3)
    with torch.no_grad():
        images = pipe.vae.decode(wanted / 0.08333).sample.numpy().transpose(0, 2, 3, 1)
    decoded = ours.codec.config.decode(ours.codec.model, latents)
    close(decoded, images, 1e-3)


@pytest.mark.slow
def test_it_is_the_last_stage_of_a_cascade(folder, tmp_path):
    """It enlarges images of any size."""
    base = dataclasses.replace(FAMILIES["dit"], sampling=DiffusionSampler(2))
    save_artifact(Artifact(base, jax.jit(base.init)(jax.random.key(0))), tmp_path / "I", "")
    network = dataclasses.replace(FAMILIES["upsampler"].network, size=(16, 16))
    second = dataclasses.replace(FAMILIES["upsampler"], network=network, sampling=DiffusionSampler(2, guidance=1.0))
    save_artifact(Artifact(second, jax.jit(second.init)(jax.random.key(0))), tmp_path / "II", "")
    out = tmp_path / "made"
    stages = ["--upsample", str(tmp_path / "II"), "--upsample", str(folder)]
    main(["sample", str(tmp_path / "I"), "1", *stages, "--steps=2", f"--out={out}"])
    assert Image.open(out / "00000.png").size == (64, 64)


def test_what_is_not_known_is_told(tmp_path, capsys):
    unet = random_unet()
    unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(SystemExit):
        main(["convert", "stable-diffusion", str(tmp_path / "unet"), "--out", str(tmp_path / "out")])
    assert "read as stable-diffusion-upscaler" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match="not at the lowest resolution"):
        published.settings(dict(unet.config) | {"only_cross_attention": True})
    tensors = {k: v.numpy() for k, v in unet.state_dict().items()}
    with pytest.raises(ValueError, match="further input channels"):
        published.describe({k: v for k, v in tensors.items() if not k.startswith("class_embedding")})


RELEASED = {
    "sample_size": 128,
    "in_channels": 7,
    "out_channels": 4,
    "block_out_channels": (256, 512, 512, 1024),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
    "only_cross_attention": (True, True, True, False),
    "attention_head_dim": 8,
    "cross_attention_dim": 1024,
    "num_class_embeds": 1000,
    "use_linear_projection": True,
}


@pytest.mark.slow
def test_released_sizes_are_taken_whole():
    with torch.device("meta"):
        unet = theirs.UNet2DConditionModel(**RELEASED)
    tensors = {k: jax.ShapeDtypeStruct(v.shape, np.float32) for k, v in unet.state_dict().items()}
    config, model = convert("stable-diffusion-upscaler", tensors, **published.settings(unet.config))
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(model)) == sum(np.prod(x.shape) for x in tensors.values())
    default, _ = convert("stable-diffusion-upscaler", tensors)
    assert default == config and config.network.only_context == (2, 4)
    conditioning = Conditioning(CrossAttnFeatures(1024, 77, trained_null=False))
    assert config == preset("sd-upscaler", conditioning=conditioning)
