"""Imagen: dynamic thresholding in every solver, an Efficient UNet, and noise on the low-resolution image."""

import dataclasses
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import examples.multistep  # noqa: F401  (registers lms)
from t2i_jax.convert import convert, restore
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.params import abstract
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import ClassEmbedder, Conditioning, Context, CrossAttnFeatures, TextFeatures
from t2i_jax.networks.dit import DiT
from t2i_jax.networks.imagen import AttentionPooledFeatures
from t2i_jax.networks.unet import UNet
from t2i_jax.nn.layers import replace
from t2i_jax.noise.gaussian import join, thresholded
from t2i_jax.noise.processes import EDM, Discrete, Flow
from t2i_jax.noise.schedule import SECTIONS, respacing
from t2i_jax.presets import preset
from t2i_jax.sampler import check_threshold
from t2i_jax.sampling import solvers
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.training.experiment import load_experiment
from t2i_jax.training.objectives import forward_of
from t2i_jax.training.optimizer import Optimizer
from t2i_jax.training.state import create
from t2i_jax.training.step import make_step
from tests.fixtures.families import CODECS, FAMILIES, UNET, batch_for, fresh

UPSAMPLER = FAMILIES["imagen-upsampler"]
PIXELS = with_fields(DiT(), size=(4, 4), channels=3, patch=2, width=16, depth=1, heads=2, learn_variance=False)
KINDS = {
    "discrete": Diffusion(PIXELS, Discrete("cosine")),
    "flow": Diffusion(PIXELS, Flow(), "velocity"),
    "edm": Diffusion(PIXELS, EDM(), "v"),
}


# ------------------------------------------------------------------------------------------------ dynamic thresholding


def test_an_image_is_divided_by_the_quantile_of_its_sizes():
    x = 3 * jax.random.normal(jax.random.key(0), (4, 5, 5, 3)) * jnp.asarray([1.0, 1.0, 1.0, 0.01])[:, None, None, None]
    found = thresholded(x, jnp.asarray([0.9, 0.9, 0.0, 0.9]), jnp.asarray([jnp.inf, 1.5, 1.5, 1.5]))
    s = np.quantile(np.abs(np.asarray(x)).reshape(4, -1), 0.9, axis=1)
    assert s[0] > 1.5 and s[3] < 1
    expected = [np.clip(x[0], -s[0], s[0]) / s[0], np.clip(x[1], -1.5, 1.5) / 1.5, x[2], np.clip(x[3], -1, 1)]
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-6)
    np.testing.assert_array_equal(thresholded(x, 0.0), x)
    np.testing.assert_allclose(thresholded(x, 1.0, 1.0), np.clip(x, -1, 1))
    gradient = jax.grad(lambda x: thresholded(x, 0.9).sum())(x)
    assert np.isfinite(gradient).all()


@partial(jax.jit, static_argnames=("kind", "solver"))
def drawn(kind, solver, options, wild, draws):
    """Samples of a model whose predicted image is `wild` at every step."""
    config = KINDS[kind]
    path, x0 = config.process.timesteps(jnp.int32(6)), wild * config.process.scale

    def denoise(x, i):
        alpha, sigma = path.alpha[i], path.sigma[i]
        prediction = join(config.predicts, x0, (x - alpha * x0) / sigma, alpha, sigma)
        return config.denoised(prediction, None, x, alpha, sigma, options)

    sample = solvers.solve(solvers.SOLVERS[solver], denoise, draws[-1], path, lambda i: draws[i], 1.0)
    return sample / config.process.scale


@pytest.mark.parametrize(
    ("solver", "kind"),
    [(solver, kind) for solver in solvers.SOLVERS for kind in ("discrete", "flow")] + [("heun", "edm")],
)
def test_every_solver_sees_thresholded_images(solver, kind, traces):
    """Where all predictions are one image, each ends at it; values of the options compile nothing anew."""
    wild = 2 * jax.random.normal(jax.random.key(0), (3, 4, 4, 3))
    draws, rows = jax.random.normal(jax.random.key(1), (8, 3, 4, 4, 3)), lambda *x: jnp.asarray(x, jnp.float32)
    draw = lambda **fields: drawn(kind, solver, DiffusionSampler(**fields).arrays(), wild, draws)
    np.testing.assert_allclose(draw(threshold=rows(0, 0, 0)), wild, atol=1e-3)
    traces.clear()
    for p, most in ((rows(0.8, 0, 1), jnp.inf), (rows(0.7, 0.9, 0.99), 1.5), (rows(1, 1, 1), 1)):
        found = draw(threshold=p, threshold_most=None if most == jnp.inf else most)
        np.testing.assert_allclose(found, thresholded(wild, p, most), atol=1e-3)
    clipped = draw(threshold=rows(0, 0, 0), clip=True)
    assert not traces["drawn"]
    np.testing.assert_allclose(found, clipped, atol=1e-5)


def test_thresholds_are_of_pixels():
    latent = dataclasses.replace(KINDS["discrete"], network=dataclasses.replace(PIXELS, channels=4))
    latent.check(DiffusionSampler(clip=True))
    with pytest.raises(ValueError, match="threshold: of models of pixels"):
        latent.check(DiffusionSampler(threshold=0.95))
    KINDS["discrete"].check(DiffusionSampler(threshold=jnp.asarray([0.0, 0.95])))
    check_threshold(CODECS["kl"], DiffusionSampler())
    with pytest.raises(ConfigError, match="codes of a codec"):
        check_threshold(CODECS["kl"], DiffusionSampler(threshold=0.95))
    for odd in ({"threshold": 1.5}, {"threshold_most": 0.5}):
        with pytest.raises(ConfigError, match="threshold"):
            DiffusionSampler(**odd)


# ------------------------------------------------------------------------------------------------------------ spacings


@pytest.mark.parametrize("name", SECTIONS)
def test_named_spacings_are_of_steps_that_the_process_has(name):
    process, config = Discrete("cosine"), KINDS["discrete"]
    kept = respacing(1000, name)
    path = process.timesteps(50, spacing=name)
    assert int(path.steps) == len(kept) == config.loop_trips(DiffusionSampler(spacing=name))
    assert len(kept) == int("".join(c for c in name if c.isdigit()))
    np.testing.assert_array_equal(path.t[: len(kept)], kept[::-1])
    np.testing.assert_allclose(path.sigma[: len(kept) + 1], [*process.tables.sigma[kept[::-1]], 0], rtol=1e-6)
    with pytest.raises(ValueError, match="discrete steps"):
        KINDS["flow"].check(DiffusionSampler(spacing=name))
    config.check(DiffusionSampler(len(kept), spacing=name))
    with pytest.raises(ValueError, match=f"steps 3: spacing '{name}' is of {len(kept)}"):
        config.check(DiffusionSampler(3, spacing=name))
    with pytest.raises(ValueError, match="section"):
        dataclasses.replace(config, process=Discrete("cosine", 20)).check(DiffusionSampler(20, spacing=name))


# ------------------------------------------------------------------------------------------------------ Efficient UNet


def shapes(network, features=(3, 6)):
    """Names of outputs of all stages are those of the shapes; returns the module, abstract."""
    model = jax.eval_shape(network.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((2, *network.size, network.channels_in), jnp.float32)
    batch = {"features": jnp.zeros((2, *features)), "low_res_noise": jnp.zeros(2)}

    def run(model, x):
        context = model.read(batch, jnp.zeros(2, bool))
        return model.encode(x, context.pooled, context)[1], model(x, jnp.zeros(2), context)

    skips, out = jax.eval_shape(run, model, x)
    assert out.shape == (2, *network.size, network.channels * (1 + network.learn_variance))
    return model, [skip.shape[1:] for skip in skips]


def test_levels_begin_with_their_size_and_channels_and_have_blocks_of_their_own():
    network = dataclasses.replace(
        UPSAMPLER.network, size=(8, 8), multipliers=(1, 2, 4), level_blocks=(0, 2, 1), attention=(4,), only_context=()
    )
    model, skips = shapes(network)
    assert skips == [(8, 8, 8), (4, 4, 16), (4, 4, 16), (4, 4, 16), (2, 2, 32), (2, 2, 32)]
    assert [stage.attention is not None for stage in model.down] == [False, False, False, False, True]
    assert len(model.up) == 6 and [stage.resample is not None for stage in model.up] == [0, 1, 0, 0, 1, 0]
    late = dataclasses.replace(network, resample_first=False, level_blocks=())
    assert shapes(late)[1] == [(8, 8, 8), (8, 8, 8), (4, 4, 8), (4, 4, 16), (2, 2, 16), (2, 2, 32)]


def test_a_level_reads_the_text_alone():
    attention = dataclasses.replace(UPSAMPLER.network, context_norm="layer").init(jax.random.key(0)).down[1].attention
    attention = replace(attention, out=replace(attention.out, w=jnp.eye(16)))
    x = jax.random.normal(jax.random.key(1), (1, 2, 2, 16))
    tokens = 3 * jax.random.normal(jax.random.key(2), (1, 3, 8)) + 1
    context = Context(jnp.zeros((1, 32)), tokens, jnp.asarray([[True, True, False]]))
    q = attention.qkv(attention.norm(x)).reshape(4, 2, 8)
    seen = tokens[0, :2]
    seen = (seen - seen.mean(1, keepdims=True)) / seen.std(1, keepdims=True)
    k, v = jnp.moveaxis(attention.context(seen).reshape(2, 2, 2, 8), 2, 0)
    share = jax.nn.softmax(jnp.einsum("tnh,snh->nts", q, k) / 8**0.5, -1)
    expected = x + jnp.einsum("nts,snh->tnh", share, v).reshape(x.shape)
    np.testing.assert_allclose(attention(x, context), expected, atol=1e-4)


def test_scales_are_of_sums_and_of_skips():
    network = with_fields(UNet(), **UNET, learn_variance=False, condition=ClassEmbedder(3))
    x, e = jax.random.normal(jax.random.key(1), (1, 4, 4, 8)), jnp.zeros((1, 32))
    block = lambda **scales: dataclasses.replace(network, **scales).init(jax.random.key(0))
    plain, scaled = block().down[0].block, block(residual_scale=0.5)
    np.testing.assert_allclose(scaled.down[0].block(x, e), plain(x, e) / 2, atol=1e-6)
    assert (scaled.before.scale, block(middle_scale=0.25).before.scale, block().before.scale) == (0.5, 0.25, 1.0)


def test_the_pooled_vector_is_attention_from_the_mean():
    """With equal keys it is the mean of all values, and of that of the query itself."""
    condition = AttentionPooledFeatures(CrossAttnFeatures(6, 3), 2, 12)
    model = condition.init(jax.random.key(0), 8)
    still = jax.tree.map(jnp.zeros_like, model.k)
    model = replace(model, k=still, out=replace(model.out, b=jnp.arange(12.0)))
    x = jax.random.normal(jax.random.key(1), (2, 3, 6))
    normed = model.norm(x)
    mean = normed.mean(1, keepdims=True) + model.position[...]
    values = jnp.concatenate([mean, normed], 1) @ model.v.w[...] + model.v.b[...]
    expected = model.out_norm(model.out(values.mean(1)))
    np.testing.assert_allclose(model.whole({"features": x}, jnp.zeros(2, bool)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"level_blocks": (1,)}, "level_blocks"),
        ({"resample": "block"}, "resample_first"),
        ({"context": 0, "pool": "mean", "conditioning": None}, "only_context"),
        ({"conditioning": Conditioning(TextFeatures(5, 6)), "pool": "mean"}, "padding"),
        ({"time_width": 40}, "33|40"),
    ],
)
def test_networks_that_cannot_be_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(UPSAMPLER.network, **fields)


# ------------------------------------------------------------------------------------ noise on the low-resolution image


def test_the_enlarged_image_is_noised_at_the_level_that_the_network_reads():
    small = jax.random.uniform(jax.random.key(0), (3, 2, 2, 3), minval=-1, maxval=1)
    large = UPSAMPLER.low_res_of({"low_res": small})
    assert large.shape == (3, 4, 4, 3)
    np.testing.assert_allclose(large[:, 0, 0], small[:, 0, 0], atol=1e-6)
    np.testing.assert_allclose(large[:, -1, -1], small[:, -1, -1], atol=1e-6)
    noise, level = jax.random.normal(jax.random.key(1), large.shape), jnp.asarray([0.0, 0.25, 0.9999])
    found = UPSAMPLER.noised_low_res(large, level, noise)
    np.testing.assert_allclose(1000 * found["low_res_noise"], [0, 250, 999])
    tables, t = UPSAMPLER.low_res_process.tables, np.asarray([0, 250, 999])
    alpha, sigma = (np.asarray(x[t], np.float32)[:, None, None, None] for x in (tables.alpha, tables.sigma))
    np.testing.assert_allclose(found["low_res"], alpha * large + sigma * noise, atol=1e-5)


@pytest.mark.parametrize("process", [Discrete(), Flow(), EDM()])
def test_no_noise_and_all_of_it_have_a_time(process):
    config = dataclasses.replace(UPSAMPLER, low_res_process=process)
    small = jnp.ones((2, 4, 4, 3))
    found = config.noised_low_res(small, jnp.asarray([0.0, 1.0]), jnp.zeros_like(small))
    assert np.all(np.isfinite(found["low_res_noise"])) and np.all(np.isfinite(found["low_res"]))
    np.testing.assert_allclose(found["low_res"][0], 1, atol=0.02)


def test_noise_of_the_small_image_is_drawn_once_or_anew(traces):
    config = dataclasses.replace(UPSAMPLER, solver="ddim", clip_range=1.0)
    model, batch = fresh(UPSAMPLER), batch_for(UPSAMPLER)
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    model = tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])
    condition = {"features": batch["features"], "low_res": np.zeros((4, 2, 2, 3), np.float32)}
    draw = lambda **fields: config.sample(
        model,
        condition,
        jax.random.split(jax.random.key(0), 4),
        DiffusionSampler(3, guidance=1.0, **fields),
        guided=False,
    )
    once = draw(noise_aug=jnp.asarray([0.0, 0.5, 0.5, 0.9]))
    traces.clear()
    anew = draw(noise_aug=jnp.asarray([0.0, 0.5, 0.5, 0.9]), renew_noise_aug=True)
    np.testing.assert_array_equal(draw(noise_aug=jnp.asarray([0.0, 0.5, 0.5, 0.9])), once)
    assert not traces["_sample"]
    assert float(jnp.abs(once[1:] - anew[1:]).max()) > 1e-3
    assert float(jnp.abs(draw(noise_aug=0.1) - once)[1:].max()) > 1e-3


@pytest.mark.parametrize("name", ["imagen_glyphs", "imagen_glyphs_upsample"])
def test_two_steps_of_the_configs_train(name):
    """Smaller, and with captions that are read already."""
    config = load_experiment(Path(__file__).parent.parent / "configs" / f"{name}.py").model
    what = AttentionPooledFeatures(CrossAttnFeatures(6, 3), 2, 32)
    small = {"size": (4, 4), "width": 8, "multipliers": (1, 2), "attention": (), "only_context": (), "groups": 4}
    small |= {"level_blocks": (0, 1), "heads": 2, "context": 8, "condition": what}
    config = dataclasses.replace(config, network=with_fields(config.network, **small))
    objectives, batch = config.objectives(), batch_for(config)
    optimizers = {key: Optimizer(learning_rate=1e-3, warmup=0).build(2) for key in objectives}
    state = jax.jit(lambda key: create(config.init, objectives, optimizers, key))(jax.random.key(0))
    step = jax.jit(make_step(abstract(config), objectives, optimizers, forward=forward_of(config)))
    before = state
    for _ in range(2):
        state, metrics = step(state, {}, batch)
        assert np.isfinite(metrics["loss"])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, state.params)
    assert np.mean(jax.tree.leaves(moved)) > 0.3  # zeros keep gradients from what is below


@pytest.mark.parametrize("levels", [4, 5, 6])
def test_stages_of_deepfloyd_are_recognised_by_their_shapes(levels):
    """In the original's names; its third stage reads features of the width of its context."""
    later, side = levels > 4, {4: 64, 5: 256, 6: 1024}[levels]
    encoded = CrossAttnFeatures(64, 77, trained_null=False, kept_null=True)
    network = UNet(
        (side, side),
        width=32,
        multipliers=(1,) * levels,
        blocks=1,
        level_blocks=(1,) * (levels - 1) + (2,),
        attention=(2 ** (levels - 1),),
        only_context=(2 ** (levels - 1),) if later else (),
        head_dim=32,
        residual_scale=0.7071 if later else 1.0,
        activation="gelu",
        time_width=96,
        conditioning=Conditioning(AttentionPooledFeatures(encoded, 1, 96, projected=levels < 6)),
        context=64,
        context_norm="group",
        pool="summary",
        extra_inputs=("low_res",) if later else (),
        upscaling="corners",
        noise_aug_conditioning=later,
    )
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract(Diffusion(network)))
    found, _ = convert("deepfloyd", restore("deepfloyd", Diffusion(network), zeros), head_dim=32, pool_heads=1)
    assert found.network == network
    sampling = found.sampling
    found_options = sampling.spacing, sampling.guidance, sampling.noise_aug, sampling.threshold, sampling.threshold_most
    first, second, third = ("smart100", 7.0, 0.0, 0.95, 1.5), ("smart50", 4.0, 0.25, 0.95, 1.0), ("super40", 4.0, 0.0)
    assert found_options == {4: first, 5: second, 6: (*third, 0.95, 1.0)}[levels]
    assert found.low_res_process == (found.process if later else None) and found.guided_channels == 3
    tensors = restore("deepfloyd", found, zeros)
    del tensors["encoder_pooling.0.weight"]
    with pytest.raises(ValueError, match=r"no UNet of DeepFloyd IF: no encoder_pooling\.0\.weight"):
        convert("deepfloyd", tensors)


@pytest.mark.parametrize("name", ["imagen", "imagen-sr", "imagen-sr-1024", "if-i-m", "if-i-l", "if-i-xl"])
def test_presets_have_the_sizes_that_are_published(name):
    """In millions; the upsamplers of Imagen are larger here."""
    config = preset(name)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract(config))) / 1e6
    known = {"imagen": 2306, "imagen-sr": 790, "imagen-sr-1024": 752, "if-i-m": 372, "if-i-l": 936, "if-i-xl": 4305}
    assert abs(count - known[name]) < 1
