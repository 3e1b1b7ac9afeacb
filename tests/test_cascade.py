"""A cascade: small images enlarged by a second model, conditioned on how noisy they are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from t2i_jax.cli import main
from t2i_jax.core.config import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.keys import image_keys
from t2i_jax.core.sharding import MeshConfig, to_host
from t2i_jax.data.pipeline import Data
from t2i_jax.data.records import write_records
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.encode import encode_splits
from t2i_jax.models.diffusion import Diffusion, noise_low_res
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.networks.unet import UNet
from t2i_jax.noise.processes import Discrete
from t2i_jax.pipeline import Pipeline
from t2i_jax.previews import Previews
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.storage.artifacts import Artifact, save_artifact
from t2i_jax.training.experiment import Experiment, Train, make_prepare, record_spec
from t2i_jax.training.loop import train
from t2i_jax.training.optimizer import Optimizer
from tests.fixtures.toys import Halves

BASE = Diffusion(
    with_fields(
        UNet(),
        size=(4, 4),
        width=8,
        multipliers=(1,),
        blocks=1,
        attention=(),
        groups=4,
        heads=1,
        condition=ClassEmbedder(3),
    ),
    Discrete("cosine", 20),
    sampling=DiffusionSampler(3, guidance=2.0),
)
LARGE = dataclasses.replace(
    BASE,
    network=dataclasses.replace(BASE.network, size=(8, 8), extra_inputs=("low_res",), noise_aug_conditioning=True),
    upscale=2,
    noise_aug=0.6,
    sampling=DiffusionSampler(3, guidance=1.0, noise_aug=0.2),
)


@pytest.fixture(scope="module")
def model():
    fresh = jax.jit(LARGE.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def test_noise_keeps_the_power_of_the_small_picture():
    keys = jax.random.split(jax.random.key(0))
    small, noise = (jax.random.normal(k, (64, 8, 8, 3)) for k in keys)
    for share in (0.0, 0.5, 1.0):
        found = noise_low_res(small, jnp.full(64, share), noise)
        assert abs(float(found["low_res"].std()) - 1) < 0.02
        np.testing.assert_allclose(jnp.mean(found["low_res"] * noise), share, atol=0.02)
    np.testing.assert_array_equal(noise_low_res(small, jnp.zeros(64), noise)["low_res"], small)


def test_the_small_picture_is_made_of_the_large_one():
    image = jnp.repeat(jnp.repeat(jnp.arange(16.0).reshape(1, 4, 4, 1), 4, 1), 4, 2)
    small = dataclasses.replace(LARGE, upscale=4).low_res_of({"image": image})
    assert small.shape == (1, 4, 4, 1)
    np.testing.assert_allclose(small[0, 1:3, 1:3, 0], jnp.arange(16.0).reshape(4, 4)[1:3, 1:3], atol=0.5)
    given = jnp.ones((1, 2, 2, 1))
    np.testing.assert_array_equal(LARGE.low_res_of({"image": image, "low_res": given}), given)
    with pytest.raises(ValueError, match="low_res"):
        LARGE.low_res_of({"label": jnp.zeros(1)})


def test_the_second_model_learns_from_pictures_and_reads_the_small_one(model):
    image = jnp.tanh(jax.random.normal(jax.random.key(2), (2, 8, 8, 3)))
    batch = {"image": image, "label": jnp.asarray([0, 1])}
    loss = jax.jit(LARGE.loss)(model, batch, jax.random.key(3)).loss
    assert np.isfinite(loss)
    draw = lambda small, **options: LARGE.sample(
        model,
        {"label": batch["label"], "low_res": small},
        image_keys([0, 1]),
        DiffusionSampler(3, guidance=1.0, **options),
        guided=False,
    )
    small = LARGE.low_res_of(batch)
    plain, other, noisy = draw(small), draw(-small), draw(small, noise_aug=jnp.asarray([0.0, 0.9]))
    assert float(jnp.abs(plain - other).max()) > 1e-3
    np.testing.assert_allclose(noisy[0], plain[0], atol=1e-5)
    assert float(jnp.abs(noisy[1] - plain[1]).max()) > 1e-3


@pytest.mark.slow
def test_the_command_draws_in_two_stages(model, tmp_path):
    base = jax.jit(BASE.init)(jax.random.key(0))
    save_artifact(Artifact(BASE, base), tmp_path / "base", "")
    save_artifact(Artifact(LARGE, model), tmp_path / "large", "")
    out = tmp_path / "pictures"
    main(["sample", str(tmp_path / "base"), "1", "2", "--upsample", str(tmp_path / "large"), "--out", str(out)])
    made = np.stack([np.asarray(Image.open(out / f"{n:05d}.png")) for n in range(2)])
    assert made.shape == (2, 8, 8, 3)
    first, second = (Pipeline.load(tmp_path / name, MeshConfig(1)) for name in ("base", "large"))
    small = first.sample(["1", "2"], [0, 0])
    again = second.sampler().generate(["1", "2"], [0, 0], low_res=small)
    np.testing.assert_allclose(np.asarray(again).astype(int), made.astype(int), atol=1)
    with pytest.raises(ConfigError, match="no second stage"):
        first.sampler(upsampler=first)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="noise_aug_conditioning"):
        dataclasses.replace(LARGE.network, extra_inputs=())


def pixels_as_latents(side, **fields):
    """An upsampler of latents by a codec that halves the sides; without parameters that training changed."""
    network = dataclasses.replace(
        BASE.network,
        size=(side, side),
        channels=12,
        learn_variance=False,
        extra_inputs=("low_res",),
        low_res_channels=3,
        noise_aug_conditioning=True,
        noise_levels=20,
    )
    fields = {"noise_aug": 0.5, "low_res_process": Discrete("cosine", 20)} | fields
    return dataclasses.replace(BASE, network=network, **fields)


def test_a_table_has_a_row_for_each_level_of_the_small_image():
    config = pixels_as_latents(4)
    model = jax.jit(config.init)(jax.random.key(0))
    table = model.noise.w[...]
    assert table.shape == (20, 32)
    rows = {"label": jnp.zeros(21, jnp.int32), "low_res_noise": jnp.arange(21) / 1000}
    pooled = model.read(rows, jnp.zeros(21, bool)).pooled
    plain = model.condition(rows, jnp.zeros(21, bool), jnp.float32)[0][0, 0]
    np.testing.assert_allclose(pooled[:20] - plain, table, atol=1e-6)
    np.testing.assert_array_equal(pooled[20], pooled[19])  # beyond the last is the last
    for fields, why in (
        ({"low_res_process": None}, "it is None"),
        ({"low_res_process": Discrete("cosine")}, "1000"),
        ({"upscale": 2}, "of pixels"),
    ):
        with pytest.raises(ConfigError, match=why):
            dataclasses.replace(config, **fields)
    for fields in ({"noise_aug_conditioning": False}, {"extra_inputs": (), "noise_aug_conditioning": False}):
        with pytest.raises(ValueError, match="noise_levels|low_res_channels"):
            dataclasses.replace(config.network, **fields)


def test_training_makes_the_small_image_of_latents_of_the_image():
    """With a codec alone, whose latents have a position for each of its pixels; what a record holds stays."""
    config, codec = pixels_as_latents(4), Halves()
    spec = config.batch_spec()
    image = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    batch = {"image": jnp.asarray(image), "label": jnp.zeros(2, jnp.int32)}
    ready = make_prepare(codec, None, spec)({"codec": {}}, batch, jax.random.key(0))
    assert ready.keys() == {"label", "codes", "low_res"} and ready["codes"].shape == (2, 4, 4, 12)
    known = jax.image.resize(batch["image"] / 127.5 - 1, (2, 4, 4, 3), "linear", antialias=True)
    np.testing.assert_allclose(ready["low_res"], known, atol=1e-5)
    given = batch | {"low_res": jnp.ones((2, 4, 4, 3))}
    assert make_prepare(codec, None, spec)({"codec": {}}, given, jax.random.key(0))["low_res"].min() == 1
    experiment = Experiment(config, Data(ArrayRecord("nowhere")))
    assert record_spec(experiment, codec)["low_res"].optional and not record_spec(experiment, None)["low_res"].optional
    loss = config.loss(jax.jit(config.init)(jax.random.key(0)), ready, jax.random.key(1)).loss
    assert np.isfinite(loss)


@pytest.mark.slow
def test_an_upsampler_of_latents_is_trained_from_images(tmp_path):
    """The small ones are made of them, for previews too, which `t2i encode` would not store."""
    rng = np.random.default_rng(0)
    image = lambda: rng.integers(0, 256, (16, 16, 3), np.uint8)
    records = [{"image": image(), "label": n % 3, "split": s} for n in range(8) for s in ("train", "val")]
    write_records(tmp_path / "data", records)
    save_artifact(Artifact(Halves(), {}), tmp_path / "codec", "")
    data = Data(ArrayRecord(str(tmp_path / "data")), image_size=16, batch_size=8)
    settings = Train(2, evaluate_every=2, preview_every=2, previews=2, save_every=2, optimizer=Optimizer(warmup=1))
    experiment = Experiment(pixels_as_latents(8), data, settings, codec=str(tmp_path / "codec"))
    train(experiment, tmp_path / "run", Previews())
    assert (tmp_path / "run" / "samples" / "0000002.png").exists()
    third = Pipeline.load(tmp_path / "run", MeshConfig(1)).sampler()
    small = np.zeros((1, 8, 8, 3), np.uint8)
    assert third.generate(["1"], [0], low_res=small).shape == (1, 16, 16, 3)
    with pytest.raises(ConfigError, match="trains on images"):
        encode_splits(dataclasses.replace(experiment, mesh=MeshConfig(1)), tmp_path / "codes", ["train"], 8)


def placed(config, codec=None):
    """A pipeline of fresh weights on one device."""
    codec = codec and Artifact(codec, {})
    return Pipeline.place(config, jax.jit(config.init)(jax.random.key(0)), codec, None, MeshConfig(1))


def test_a_cascade_has_any_number_of_stages(model):
    """Each reads the images of the one before it, and has noise of its own for the same seed."""
    base, large = placed(BASE), dataclasses.replace(placed(LARGE), model=model)
    third = placed(pixels_as_latents(4), Halves())  # of the size of what it is given
    images = base(["1", "2"], seeds=[5, 6], upsampler=[large, third])
    assert images.shape == (2, 16, 16, 3)
    sampler = base.sampler(upsampler=[large, third])
    first = base.sampler().generate(["1", "2"], [5, 6])
    second = sampler.upsampler.generate(["1", "2"], [5, 6], low_res=to_host(first))
    again = sampler.upsampler.upsampler.generate(["1", "2"], [5, 6], low_res=to_host(second))
    np.testing.assert_array_equal(again, images)
    np.testing.assert_array_equal(second, base(["1", "2"], seeds=[5, 6], upsampler=large))
    alone = third.sized(16, 16).sampler().generate(["1", "2"], [5, 6], low_res=to_host(second))
    assert np.abs(np.asarray(alone, int) - np.asarray(images, int)).max() > 0
    assert sampler.about["upsampler"].count("DiffusionSampler") == 2


def test_a_stage_that_would_shrink_its_image_is_refused():
    base, large = placed(BASE), placed(LARGE)
    with pytest.raises(ConfigError, match="its images are 8x8, smaller than 16x12 before it"):
        base.sized(12, 16).sampler(upsampler=large)
    with pytest.raises(ConfigError, match="no second stage of a cascade"):
        base.sampler(upsampler=[large, base])
