"""DeepFloyd IF as diffusers keeps it: our UNets against its classes, its pipelines with fixed noise, and a folder that
becomes a model that samples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from t2i_jax.cli import main
from t2i_jax.convert import convert, restore
from t2i_jax.convert.diffusers import empty_t5_caption
from t2i_jax.interop import deepfloyd as published
from t2i_jax.models.diffusion import enlarged, join_inputs
from t2i_jax.noise.schedule import SECTIONS, Schedule, respacing
from t2i_jax.sampling import guidance, solvers
from t2i_jax.storage.artifacts import load_artifact
from t2i_jax.text.t5 import T5
from tests.fixtures.t5_files import SIZES, folder_of, vocabulary

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("diffusers")

FIRST = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 6,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "cross_attention_dim": 32,
    "encoder_hid_dim": 32,
    "attention_head_dim": 8,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "act_fn": "gelu",
}
SECOND = FIRST | {
    "in_channels": 6,
    "layers_per_block": [1, 2],
    "class_embed_type": "timestep",
    "mid_block_scale_factor": 1.414,
    "time_embedding_act_fn": "gelu",
    "time_embedding_dim": 32,
}
AS_RELEASED = SECOND | {
    "only_cross_attention": True,
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1 / 0.7071,
    "mid_block_scale_factor": 1 / 0.7071,
    "time_embedding_dim": 64,
}
CASES = {"first": FIRST, "second": SECOND, "as released": AS_RELEASED}
LENGTH = 7


def unet_of(fields, seed=0, out=1.0):
    """A UNet of theirs with random weights, those of its last layer times `out`, and ours."""
    torch.manual_seed(seed)
    unet = theirs.UNet2DConditionModel(**fields)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            scale = ("norm" in name or "add_embedding.norm" in name) and name.endswith("weight")
            p.copy_(torch.randn_like(p) * (0.1 if p.ndim > 1 else 0.2) + float(scale))
            p.mul_(out if name.startswith("conv_out") else 1)
    tensors = {k: v.numpy() for k, v in unet.state_dict().items()}
    hints = published.settings(dict(unet.config))
    config, model = convert("deepfloyd", published.renamed(tensors, hints["head_dim"]), length=LENGTH, **hints)
    return unet.eval(), config, model


def close(found, wanted, limit):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(np.asarray(found), wanted, atol=limit * np.abs(wanted).max())


def swapped(x):
    return jnp.asarray(np.asarray(x).transpose(0, 2, 3, 1))


def given(seed, side=32):
    """Features of captions and of empty ones, noise and a low-resolution image, in their layout."""
    rng = np.random.default_rng(seed)
    text = rng.normal(size=(2, 2, LENGTH, 32)).astype(np.float32)
    x = rng.normal(size=(2, 3, side, side)).astype(np.float32)
    small = rng.uniform(-1, 1, size=(2, 3, side // 4, side // 4)).astype(np.float32)
    return text, x, small


@pytest.mark.parametrize("case", CASES)
def test_the_unet_is_that_of_diffusers(case):
    unet, config, model = unet_of(CASES[case])
    text, x, small = given(1)
    t, enlarges = np.asarray([3, 801]), CASES[case]["in_channels"] == 6
    levels = np.asarray([0, 250])
    large = torch.nn.functional.interpolate(torch.tensor(small), (32, 32), mode="bilinear", align_corners=True)
    inputs = torch.cat([torch.tensor(x), large], 1) if enlarges else torch.tensor(x)
    labels = {"class_labels": torch.tensor(levels)} if enlarges else {}
    with torch.no_grad():
        wanted = unet(inputs, torch.tensor(t), encoder_hidden_states=torch.tensor(text[1]), **labels).sample
    low_res = {"low_res": swapped(small), "low_res_noise": jnp.asarray(levels / 1000)} if enlarges else {}
    batch = {"features": jnp.asarray(text[1]), **low_res}

    def ours(model, x):
        read = join_inputs(x, batch, config.network.extra_inputs, config.network.upscaling)
        return model(read, jnp.asarray(t), model.read(batch, jnp.zeros(2, bool)))

    close(jax.jit(ours)(model, swapped(x)).transpose(0, 3, 1, 2), wanted, 1e-4)
    tensors = restore("deepfloyd", config, model)
    again, other = convert("deepfloyd", tensors, length=LENGTH, **published.settings(dict(unet.config)))
    assert again == config
    back = restore("deepfloyd", again, other)
    assert all(np.array_equal(back[k], tensors[k]) for k in tensors)


def pipelines(monkeypatch, unet, stage):
    """Their pipeline with random weights, and the noise that it draws: a list that it empties."""
    most = 1.5 if stage == 1 else 1.0
    scheduler = theirs.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=most,
        prediction_type="epsilon",
        variance_type="learned_range",
    )
    betas = torch.tensor(Schedule.named("squaredcos_cap_v2").betas)
    # In float64: fp32 loses the digits of 1 - abar_0.
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = betas, 1 - betas, (1 - betas).cumprod(0)
    parts = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    parts |= {"unet": unet, "scheduler": scheduler, "requires_safety_checker": False}
    if stage == 2:
        parts["image_noising_scheduler"] = theirs.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    pipe = (theirs.IFPipeline if stage == 1 else theirs.IFSuperResolutionPipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    drawn = []

    def draw(shape, **_):
        noise = drawn.pop(0)
        # A scheduler draws for the variance channels, too; the network's output is split before.
        assert noise.shape == tuple(shape), (noise.shape, shape)
        return torch.tensor(noise)

    module = theirs.pipelines.deepfloyd_if
    for place in (module.pipeline_if, module.pipeline_if_superresolution, theirs.schedulers.scheduling_ddpm):
        monkeypatch.setattr(place, "randn_tensor", draw)
    return pipe, drawn


@pytest.mark.parametrize(("stage", "spacing"), [(1, "default"), (2, "smart27")])
def test_a_trajectory_is_that_of_their_pipeline(monkeypatch, stage, spacing):
    # With larger outputs, steps amplify the rounding of those before.
    unet, config, model = unet_of(FIRST if stage == 1 else SECOND, out=0.2)
    text, x, small = given(2)
    steps = 5 if stage == 1 else 27
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(steps, 2, 3, 32, 32)).astype(np.float32)
    of_small = rng.normal(size=x.shape).astype(np.float32)
    pipe, drawn = pipelines(monkeypatch, unet, stage)
    drawn += [x, *([of_small] if stage == 2 else []), *noise]
    prompts = {"prompt_embeds": torch.tensor(text[1]), "negative_prompt_embeds": torch.tensor(text[0])}
    more = {"image": torch.tensor(small), "noise_level": 250} if stage == 2 else {}
    few = respacing(1000, spacing if spacing in SECTIONS else f"ddim{steps}")
    wanted = pipe(**prompts, **more, timesteps=few[::-1], guidance_scale=3.0, output_type="pt").images

    options = dataclasses.replace(
        config.sampling, steps=steps, spacing=spacing, stride=True, noise_aug=0.25, guidance=3.0
    ).arrays()
    most = 1.5 if stage == 1 else 1.0
    np.testing.assert_allclose([options.threshold, options.threshold_most], [0.95, most])
    given_text = [{"features": jnp.asarray(features)} for features in text]
    both = [b | ({"low_res": swapped(small)} if stage == 2 else {}) for b in given_text]

    @jax.jit
    def ours(model):
        path = config.process.timesteps(options.steps, options.stride, options.spacing)
        low_res = {}
        if stage == 2:
            level = jnp.full(2, options.noise_aug)
            low_res = config.noised_low_res(config.low_res_of(both[0]), level, swapped(of_small))
        read = [model.read(b | low_res, jnp.zeros(2, bool)) for b in both]

        def denoise(x, i):
            apply = lambda n: config._parts(config._apply(model, x, jnp.full(2, path.t[i]), read[n], low_res))
            (value, v), (null, _) = apply(1), apply(0)
            moved = guidance.guide(value, null, options.guidance, config.guided_channels)
            return config.denoised(moved, v, x, path.alpha[i], path.sigma[i], options)

        draws = jnp.asarray(noise.transpose(0, 1, 3, 4, 2))
        return solvers.solve(solvers.ddpm, denoise, swapped(x), path, lambda i: draws[i], 1.0)

    close(ours(model).transpose(0, 3, 1, 2), wanted, 1e-3)


def test_names_of_spacings_are_theirs():
    """But fast27, which keeps the noisiest step there."""
    from diffusers.pipelines.deepfloyd_if import timesteps

    for name in SECTIONS:
        kept = respacing(1000, name)[::-1]
        expected = vars(timesteps)[f"{name}_timesteps"]
        assert kept == (expected if name != "fast27" else [997, *expected[1:]])


def test_a_small_picture_is_enlarged_from_corner_to_corner():
    _, _, small = given(4)
    large = torch.nn.functional.interpolate(torch.tensor(small), (32, 32), mode="bilinear", align_corners=True)
    np.testing.assert_allclose(enlarged(swapped(small), (32, 32), "corners"), swapped(large), atol=1e-6)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder of diffusers of both stages, with a small T5; and that T5."""
    path, t5 = tmp_path_factory.mktemp("if"), None
    for name, fields in {"I": FIRST, "II": SECOND}.items():
        unet_of(fields)[0].save_pretrained(path / name / "unet")
        t5 = folder_of(path / name / "text_encoder", SIZES | {"d_model": 32, "feed_forward_proj": "gated-gelu"})
        theirs.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            thresholding=True,
            dynamic_thresholding_ratio=0.9,
            sample_max_value=1.25,
            variance_type="learned_range",
        ).save_pretrained(path / name / "scheduler")
        (path / name / "tokenizer").mkdir()
        vocabulary(path / name / "tokenizer")
    return path, t5


def test_padding_of_captions_is_read_as_they_read_it(released):
    path, t5 = released
    text = T5(str(path / "I" / "text_encoder"), 77, vocabulary=str(path / "I" / "tokenizer" / "spiece.model"))
    ids, mask = text(["a red apple"])
    with torch.no_grad():
        read = lambda ids, mask: t5(torch.tensor(ids).long(), torch.tensor(mask).long()).last_hidden_state
        wanted = read(ids, mask)
        empty = read(np.eye(1, 77, dtype=int), np.eye(1, 77, dtype=int))[0]
    close(jax.jit(text.features)(text.load(), ids, mask), wanted, 1e-4)
    close(empty_t5_caption(text), empty, 1e-4)


def test_folders_of_diffusers_become_a_cascade_that_samples(released, tmp_path):
    path, _ = released
    for name in ("I", "II"):
        main(["convert", "deepfloyd", str(path / name), "--out", str(tmp_path / name)])
    first, second = (load_artifact(tmp_path / name).config for name in ("I", "II"))
    assert (first.sampling.threshold, first.sampling.threshold_most, first.sampling.guidance) == (0.9, 1.25, 7.0)
    assert second.network.level_blocks == (1, 2) and second.network.middle_scale == 1 / 1.414
    assert first.condition.encoded.kept_null and second.low_res_process == second.process
    few = ["--steps=2", "--spacing=default", f"--out={tmp_path / 'made'}", f"--upsample={tmp_path / 'II'}"]
    main(["sample", str(tmp_path / "I"), "a red apple", *few])
    assert Image.open(tmp_path / "made" / "00000.png").size == (32, 32)


def test_the_files_of_the_original_become_a_model(tmp_path, capsys):
    """Its names, without settings, and the features of an empty caption in a file."""
    _, config, model = unet_of(AS_RELEASED | {"act_fn": "gelu"})
    tensors = restore("deepfloyd", config, model)
    torch.save({k: torch.tensor(v) for k, v in tensors.items()}, tmp_path / "pytorch_model.bin")
    np.save(tmp_path / "zero_t5.npy", np.ones((77, 32), np.float32))
    hints = ["--head-dim=8", "--pool-heads=2", "--size=32"]
    main(["convert", "deepfloyd", str(tmp_path), "--out", str(tmp_path / "ours"), *hints])
    artifact = load_artifact(tmp_path / "ours")
    np.testing.assert_array_equal(artifact.model.condition.encoded.null[...], np.ones((77, 32)))
    network = artifact.config.network
    assert (network.only_context, network.time_width, network.residual_scale) == ((2,), 64, 0.7071)
    same = {"conditioning": config.network.conditioning, "residual_scale": 1.0, "middle_scale": 0.0}
    assert dataclasses.replace(network, **same) == dataclasses.replace(config.network, **same)
    np.save(tmp_path / "zero_t5.npy", np.ones(77, np.int32))
    with pytest.raises(SystemExit):
        main(["convert", "deepfloyd", str(tmp_path), "--out", str(tmp_path / "other"), *hints])
    assert "vectors of an empty caption are wanted" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("class_embed_type", "projection"),
        ("act_fn", "mish"),
        ("attention_head_dim", (8, 4)),
        ("up_block_types", ["UpBlock2D"]),
    ],
)
def test_settings_that_are_not_supported_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        published.settings(FIRST | {field: value})
