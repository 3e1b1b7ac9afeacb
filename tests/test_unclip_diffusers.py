"""unCLIP as diffusers keeps it: our networks against its classes, and a folder that becomes a model that samples."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from t2i_jax.cli import main
from t2i_jax.convert import convert
from t2i_jax.core.config import ConfigError
from t2i_jax.core.keys import image_keys
from t2i_jax.edits import Vary
from t2i_jax.interop import karlo_diffusers as published
from t2i_jax.interop import stable_diffusion
from t2i_jax.models.diffusion import join_inputs
from t2i_jax.models.unclip import IMAGE_NOISE
from t2i_jax.noise import gaussian
from t2i_jax.noise.schedule import Schedule
from t2i_jax.pipeline import Pipeline
from t2i_jax.sampling import guidance
from t2i_jax.storage.artifacts import load_artifact
from t2i_jax.text.clip import preprocess

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("diffusers")

PRIOR = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "embedding_dim": 32,
    "num_layers": 1,
    "num_embeddings": 7,
}
CONTEXT, TIME = 20, 128
DECODER = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": CONTEXT,
    "attention_head_dim": 4,
    "resnet_time_scale_shift": "scale_shift",
    "class_embed_type": "identity",
}
UPSAMPLER = {
    "sample_size": 16,
    "in_channels": 6,
    "out_channels": 3,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    "layers_per_block": 1,
    "add_attention": False,
}


def random(module, seed=0):
    """A module of theirs with random weights."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            scale = ("norm" in name and name.endswith("weight")) or name == "clip_std"
            p.copy_(torch.randn_like(p) * (0.1 if p.ndim > 1 else 0.2) + float(scale))
    return module.eval()


def prior_of():
    return random(theirs.PriorTransformer(**PRIOR))


def decoder_of():
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    sizes = {"clip_embeddings_dim": 32, "time_embed_dim": TIME, "cross_attention_dim": CONTEXT}
    return random(theirs.UNet2DConditionModel(**DECODER)), random(UnCLIPTextProjModel(**sizes))


def arrays(module):
    return {k: v.numpy() for k, v in module.state_dict().items()}


def close(found, wanted, limit):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(np.asarray(found), wanted, atol=limit * np.abs(wanted).max())


def captions(b=2):
    """Fields of a batch of captions and of empty ones, and the same as they read them: null first."""
    rng = np.random.default_rng(0)
    features, null = rng.normal(size=(2, b, 8, 32)).astype(np.float32)
    mask = np.arange(7) < np.asarray([[4], [7]])
    batch = {"features": jnp.asarray(features), "null_features": jnp.asarray(null), "text_mask": jnp.asarray(mask)}
    both = np.concatenate([null, features]), np.concatenate([np.broadcast_to(np.arange(7) < 2, mask.shape), mask])
    return batch, *map(torch.tensor, both)


def walk(config, network, steps, scale, x, noise):
    """The sample of our ancestral sampler; network: (x, original t) -> outputs with the condition and without."""
    few = config.process.tables.respaced(str(steps))
    variance = "learned_range" if config.network.learn_variance else config.variance
    x, noise = jnp.asarray(x), jnp.asarray(noise)
    for i in range(steps):
        t = jnp.full(len(x), steps - 1 - i)
        out, null = network(x, jnp.asarray(few.timestep_map)[t])
        value, v = config._parts(out)
        value = value if null is None else guidance.guide(value, config._parts(null)[0], scale, config.guided_channels)
        p = gaussian.p_mean_variance(
            few, value, x, t, v=v, predicts=config.predicts, variance=variance, clip=True, clip_range=config.clip_range
        )
        x = gaussian.ddpm_step(p, t, noise[i])
    return x


def trajectory(scheduler, network, steps, x, noise):
    """The sample of their scheduler; network: (x, t) -> the prediction."""
    scheduler.set_timesteps(steps)
    betas = Schedule.named("squaredcos_cap_v2").betas
    np.testing.assert_allclose(scheduler.betas, betas, rtol=1e-5)
    scheduler.betas, scheduler.alphas = torch.tensor(betas), torch.tensor(1 - betas)
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)  # in float64: fp32 loses the digits of 1 - abar_0
    times = scheduler.timesteps
    for i, t in enumerate(times):
        with torch.no_grad():
            value = network(x.float(), t)
        before = times[i + 1] if i + 1 < len(times) else None
        # Their step draws its noise itself.
        drawn = theirs.schedulers.scheduling_unclip.randn_tensor
        theirs.schedulers.scheduling_unclip.randn_tensor = lambda *a, i=i, **k: torch.tensor(noise[i])
        try:
            x = scheduler.step(value, t, x, prev_timestep=before).prev_sample
        finally:
            theirs.schedulers.scheduling_unclip.randn_tensor = drawn
    return x


def test_the_prior_is_that_of_diffusers():
    prior, (batch, features, mask) = prior_of(), captions()
    tensors = published.prior(arrays(prior), PRIOR["num_attention_heads"])
    mean, std = tensors.pop("clip_mean"), tensors.pop("clip_std")
    np.testing.assert_array_equal([mean, std], [prior.clip_mean[0].detach(), prior.clip_std[0].detach()])
    config, model = convert("karlo_prior", tensors, heads=2, clip_range=5.0)
    rng = np.random.default_rng(1)
    x, t = rng.normal(size=(2, 32)).astype(np.float32), np.asarray([3, 801])

    def network(x, t):
        out = prior(
            torch.cat([x, x]), torch.as_tensor(t).expand(len(x)).repeat(2), features[:, 0], features[:, 1:], mask
        )
        return out.predicted_image_embedding

    read = jax.jit(lambda m, drop: m.read(batch, drop))
    context, null = (read(model, jnp.full(2, drop)) for drop in (False, True))
    ours = jax.jit(lambda x, t: (model(x, t, context), model(x, t, null)))
    found = ours(jnp.asarray(x[:, None, None]), jnp.asarray(t))
    with torch.no_grad():
        wanted = network(torch.tensor(x), torch.tensor(t)).numpy()
    close(np.concatenate([found[1], found[0]])[:, 0, 0], wanted, 1e-4)

    def guided(x, t):
        null, value = network(x, t).chunk(2)
        return null + 4.0 * (value - null)

    noise = rng.normal(size=(5, 2, 32)).astype(np.float32)
    scheduler = theirs.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0, num_train_timesteps=1000
    )
    wanted = trajectory(scheduler, guided, 5, torch.tensor(x), noise)
    close(walk(config, ours, 5, 4.0, x[:, None, None], noise[:, :, None, None])[:, 0, 0], wanted, 1e-3)


def test_the_decoder_is_that_of_diffusers():
    (unet, projection), (batch, features, mask) = decoder_of(), captions()
    tensors = published.decoder(arrays(unet), arrays(projection), DECODER["attention_head_dim"])
    config, model = convert("karlo_decoder", tensors, size=8, head_dim=4, length=7)
    rng = np.random.default_rng(1)
    z, t = rng.normal(size=(2, 32)).astype(np.float32), np.asarray([3, 801])
    x, noise = (rng.normal(size=(*n, 2, 3, 8, 8)).astype(np.float32) for n in ((), (4,)))
    tokens, added = projection(
        image_embeddings=torch.tensor(z),
        prompt_embeds=features[:, 0],
        text_encoder_hidden_states=features[:, 1:],
        do_classifier_free_guidance=True,
    )
    whole = torch.nn.functional.pad(mask, (4, 0), value=True)

    def network(x, t):
        given = {"encoder_hidden_states": tokens, "class_labels": added, "attention_mask": whole}
        return unet(torch.cat([x, x]), torch.as_tensor(t).expand(len(x)).repeat(2), **given).sample

    batch = batch | {"image_features": jnp.asarray(z)}
    read = jax.jit(lambda m, drop: m.read(batch, drop))
    context, null = (read(model, jnp.full(2, drop)) for drop in (False, True))
    ours = jax.jit(lambda x, t: (model(x, t, context), model(x, t, null)))
    found = ours(jnp.asarray(x.transpose(0, 2, 3, 1)), jnp.asarray(t))
    with torch.no_grad():
        wanted = network(torch.tensor(x), torch.tensor(t)).numpy()
    close(np.concatenate([found[1], found[0]]).transpose(0, 3, 1, 2), wanted, 1e-4)

    def guided(x, t):
        null, value = network(x, t).chunk(2)
        moved = null[:, :3] + 8.0 * (value[:, :3] - null[:, :3])
        return torch.cat([moved, value[:, 3:]], 1)

    scheduler = theirs.UnCLIPScheduler(
        variance_type="learned_range", prediction_type="epsilon", clip_sample_range=1.0, num_train_timesteps=1000
    )
    wanted = trajectory(scheduler, guided, 4, torch.tensor(x), noise)
    found = walk(config, ours, 4, 8.0, x.transpose(0, 2, 3, 1), noise.transpose(0, 1, 3, 4, 2))
    close(found.transpose(0, 3, 1, 2), wanted.detach(), 1e-3)


def test_the_upsampler_is_that_of_diffusers():
    first, last = (random(theirs.UNet2DModel(**UPSAMPLER), seed) for seed in (0, 1))
    config, model = convert("karlo_sr", published.upsampler(arrays(first), arrays(last)), size=16)
    rng = np.random.default_rng(1)
    small, x = (rng.normal(size=(2, 3, n, n)).astype(np.float32) for n in (4, 16))
    noise = rng.normal(size=(3, 2, 3, 16, 16)).astype(np.float32)
    large = torch.nn.functional.interpolate(torch.tensor(small), (16, 16), mode="bicubic", antialias=True)
    batch = {"low_res": jnp.asarray(small.transpose(0, 2, 3, 1))}

    def network(x, t):
        return (last if t == 0 else first)(torch.cat([x, large], 1), t).sample

    def ours(x, t):
        read = join_inputs(x, batch, config.network.extra_inputs, config.network.upscaling)
        return model(read, t, model.read(batch, jnp.zeros(2, bool))), None

    scheduler = theirs.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="epsilon", clip_sample_range=1.0, num_train_timesteps=1000
    )
    wanted = trajectory(scheduler, network, 3, torch.tensor(x), noise)
    found = walk(config, jax.jit(ours), 3, 1.0, x.transpose(0, 2, 3, 1), noise.transpose(0, 1, 3, 4, 2))
    close(found.transpose(0, 3, 1, 2), wanted.detach(), 1e-3)


def test_a_folder_of_diffusers_becomes_a_model_that_samples(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "karlo"
    prior = random(theirs.PriorTransformer(**(PRIOR | {"num_embeddings": 8})))
    unet, projection = decoder_of()
    text = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=516,
            max_position_embeddings=8,
            projection_dim=32,
            eos_token_id=515,
            bos_token_id=514,
        )
    )
    scheduler = theirs.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)
    parts = {
        "prior": prior,
        "decoder": unet,
        "text_proj": projection,
        "text_encoder": text,
        "prior_scheduler": scheduler,
    }
    for name, part in parts.items():
        part.save_pretrained(path / name)
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    main(["convert", "karlo", str(path), "--out", str(tmp_path / "ours")])
    config = load_artifact(tmp_path / "ours").config
    assert (config.prior.clip_range, config.decoder.network.size) == (5.0, (8, 8))
    main(["sample", str(tmp_path / "ours"), "a cat", "--steps=2", "--prior-steps=2", f"--out={tmp_path / 'made'}"])
    assert Image.open(tmp_path / "made" / "00000.png").size == (8, 8)

    for seed, name in enumerate(("super_res_first", "super_res_last")):
        random(theirs.UNet2DModel(**UPSAMPLER), seed).save_pretrained(path / name)
    main(["convert", "karlo_sr", str(path), "--out", str(tmp_path / "sr")])
    assert json.loads((tmp_path / "sr" / "config.json").read_text())["model"]["network"]["size"] == [16, 16]


STABLE = {
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": (2, 4),
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 64,
    "cross_attention_dim": 32,
    "layers_per_block": 1,
    "use_linear_projection": True,
}


def test_the_unet_of_stable_unclip_is_that_of_diffusers():
    """With the noise of its pipeline: embeddings in units of their spread, noised, with a sinusoid of the level."""
    from diffusers.models.embeddings import get_timestep_embedding
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    unet, normalizer = random(theirs.UNet2DConditionModel(**STABLE)), random(StableUnCLIPImageNormalizer(32))
    statistics = {f"image_{k}": v for k, v in arrays(normalizer).items()}
    null = np.zeros((5, 32), np.float32)
    tensors = arrays(unet) | statistics | {"null_features": null}
    _, model = convert("stable-diffusion", tensors, length=5, **stable_diffusion.settings(unet.config))
    rng, t, level = np.random.default_rng(0), np.asarray([3, 801]), np.asarray([0, 300])
    x, text = rng.normal(size=(2, 4, 4, 4)).astype(np.float32), rng.normal(size=(2, 5, 32)).astype(np.float32)
    z, noise = rng.normal(size=(2, 2, 32)).astype(np.float32)
    scheduler = theirs.DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=1000)
    with torch.no_grad():
        noised = scheduler.add_noise(normalizer.scale(torch.tensor(z)), torch.tensor(noise), torch.tensor(level))
        levels = get_timestep_embedding(torch.tensor(level), 32, flip_sin_to_cos=True, downscale_freq_shift=0)
        whole = torch.cat([normalizer.unscale(noised), levels], 1)
        run = lambda text, whole: unet(torch.tensor(x), torch.tensor(t), torch.tensor(text), class_labels=whole).sample
        wanted = run(text, whole), run(np.stack([null, null]), torch.zeros_like(whole))
    batch = {"features": text, "image_features": z, "image_noise": noise, "image_noise_level": level}
    batch = {k: jnp.asarray(v) for k, v in batch.items()}
    ours = jax.jit(lambda m, drop: m(jnp.asarray(x.transpose(0, 2, 3, 1)), jnp.asarray(t), m.read(batch, drop)))
    for n, drop in enumerate((False, True)):
        close(ours(model, jnp.full(2, drop)).transpose(0, 3, 1, 2), wanted[n], 1e-4)


def stable_folder(path, **more):
    """The folder of a Stable unCLIP without its prior, with `more` parts; and its parts."""
    transformers = pytest.importorskip("transformers")
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    vae = theirs.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()
    parts = {
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**CAPTIONS)).eval(),
        "image_normalizer": random(StableUnCLIPImageNormalizer(32)),
        "unet": random(theirs.UNet2DConditionModel(**STABLE)),
        "scheduler": theirs.EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            timestep_spacing="linspace",
            steps_offset=1,
        ),
        "vae": vae,
        **more,
    }
    for name, part in parts.items():
        part.save_pretrained(path / name)
    for name in ("tokenizer", "prior_tokenizer"):
        (path / name).mkdir()
        (path / name / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    (path / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    (path / "tokenizer" / "vocab.json").write_text(json.dumps({"!": 0, "<|endoftext|>": 515}))
    return parts


CAPTIONS = {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 516}
CAPTIONS |= {"hidden_size": 32, "max_position_embeddings": 8, "eos_token_id": 515, "bos_token_id": 514}


def test_a_folder_of_stable_unclip_becomes_a_model_that_samples(tmp_path):
    transformers = pytest.importorskip("transformers")
    more = {
        "prior": random(theirs.PriorTransformer(**(PRIOR | {"num_embeddings": 8}))),
        "prior_scheduler": theirs.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0),
        "prior_text_encoder": transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(projection_dim=32, **CAPTIONS)
        ),
    }
    stable_folder(tmp_path / "stable", **more)
    main(["convert", "stable-unclip", str(tmp_path / "stable"), "--out", str(tmp_path / "ours")])
    config = load_artifact(tmp_path / "ours").config
    assert config.noise_levels == 1000 and config.sampling.prior_steps == 25 and config.decoder.predicts == "v"
    made = ["--steps=2", "--prior-steps=2", "--image-noise=10", f"--out={tmp_path / 'made'}"]
    main(["sample", str(tmp_path / "ours"), "a cat", *made])
    assert Image.open(tmp_path / "made" / "00000.png").size == (8, 8)


def test_variations_are_those_of_stable_unclip(tmp_path, monkeypatch):
    """`StableUnCLIPImg2ImgPipeline` with the same noise, from a folder without a prior."""
    transformers = pytest.importorskip("transformers")
    from diffusers.pipelines.stable_diffusion import pipeline_stable_unclip_img2img as module

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"image_size": 8, "patch_size": 4, "projection_dim": 32, "hidden_act": "gelu"}
    seer = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**sizes)).eval()
    parts = stable_folder(tmp_path / "stable", image_encoder=seer)
    out, flags = str(tmp_path / "ours"), ["--solver", "euler"]
    main(["convert", "stable-unclip", str(tmp_path / "stable"), "--out", out, *flags])
    ours = Pipeline.load(out)
    assert ours.family.prior is None and ours.family.noise_levels == 1000
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (12, 8, 3)).astype(np.uint8)
    found = ours(["cat", ""], seeds=[3, 4], like=Vary(image), steps=4, guidance=4.0, image_noise=200)

    keys = image_keys([3, 4])
    folded = lambda key, *numbers: functools.reduce(jax.random.fold_in, numbers, key)
    noise = np.stack([jax.random.normal(folded(key, 0, 0), ours.family.decoder.shape) for key in keys])
    of_image = np.stack([jax.random.normal(folded(key, IMAGE_NOISE), (32,)) for key in keys])
    seen = preprocess([image], 8).transpose(0, 3, 1, 2)
    with torch.no_grad():
        z = seer(torch.tensor(seen)).image_embeds.repeat(2, 1)
        ids, _ = ours.text(["cat", "", ""])
        features = parts["text_encoder"](torch.tensor(ids)).last_hidden_state
    np.testing.assert_allclose(ours._embed(image)[0], z[0], atol=1e-4)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.tensor(of_image))
    pipeline = module.StableUnCLIPImg2ImgPipeline(
        None,
        seer,
        parts["image_normalizer"],
        theirs.DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=1000),
        None,
        parts["text_encoder"],
        parts["unet"],
        parts["scheduler"],
        parts["vae"],
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.set_timesteps(4)
    spread = float(pipeline.scheduler.sigmas[0])  # theirs is noise alone times this, ours has all the power of x
    wanted = pipeline(
        image_embeds=z,
        prompt_embeds=features[:2],
        negative_prompt_embeds=features[2:].repeat(2, 1, 1),
        latents=torch.tensor(noise.transpose(0, 3, 1, 2) * (1 + spread**2) ** 0.5),
        num_inference_steps=4,
        guidance_scale=4.0,
        noise_level=200,
        output_type="np",
    ).images
    assert np.abs(found / 255 - wanted).max() < 1.5 / 255

    png = tmp_path / "image.png"
    Image.fromarray(image).save(png)
    main(["sample", out, "--vary", str(png), "--steps=2", f"--out={tmp_path / 'made'}"])
    main(["sample", out, "--blend", str(png), str(png), "--share=0.3", "--steps=2", f"--out={tmp_path / 'between'}"])
    made, between = (np.asarray(Image.open(tmp_path / name / "00000.png")) for name in ("made", "between"))
    np.testing.assert_allclose(made, between, atol=2)
    with pytest.raises(ConfigError, match="no prior, which draws embeddings"):
        ours("cat")
