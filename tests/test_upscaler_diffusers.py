"""The upscaler of Stable Diffusion as diffusers keeps it: our UNet against its class, its pipeline with fixed noise, and
a folder that becomes the last stage of a cascade."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from t2i_jax.cli import main
from t2i_jax.convert import convert, restore
from t2i_jax.core.errors import ConfigError
from t2i_jax.interop import stable_diffusion as published
from t2i_jax.models.diffusion import join_inputs
from t2i_jax.noise.processes import Discrete
from t2i_jax.pipeline import Pipeline
from t2i_jax.sampling import guidance, solvers
from t2i_jax.storage.artifacts import load_artifact

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
LEVEL = 20


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


def test_training_draws_levels_below_the_greatest(monkeypatch):
    (config, model), _ = ours_of(random_unet())
    drawn = []
    monkeypatch.setattr(
        type(config), "noised_low_res", lambda self, small, level, noise: drawn.append(level) or original(self, small, level, noise)
    )
    batch = {"codes": jnp.zeros((64, 8, 8, 4)), "low_res": jnp.zeros((64, 8, 8, 3)), "features": jnp.zeros((64, WORDS, WIDTH))}
    config.loss(model, batch, jax.random.key(0))
    steps = np.floor(1000 * np.asarray(drawn[0]))
    assert steps.max() < 350 and steps.max() > 300 and steps.min() < 50


def pipeline_of(monkeypatch, unet, vae=None, text=None, tokenizer=None):
    """Their pipeline, and the noise that it draws: a list that it empties."""
    scheduler = theirs.DDIMScheduler(
        **WIDE, prediction_type="v_prediction", steps_offset=1, set_alpha_to_one=False, clip_sample=False
    )
    low_res = theirs.DDPMScheduler(**WIDE)
    pipe = theirs.StableDiffusionUpscalePipeline(vae, text, tokenizer, unet, low_res, scheduler, None, None, None)
    pipe.set_progress_bar_config(disable=True)
    drawn = []

    def draw(shape, **_):
        noise = drawn.pop(0)
        assert noise.shape == tuple(shape), (noise.shape, shape)
        return torch.tensor(noise)

    module = theirs.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale
    monkeypatch.setattr(module, "randn_tensor", draw)
    return pipe, drawn
