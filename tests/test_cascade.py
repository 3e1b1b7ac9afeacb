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
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.models.diffusion import Diffusion, noise_low_res
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.networks.unet import UNet
from t2i_jax.noise.processes import Discrete
from t2i_jax.pipeline import Pipeline
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.storage.artifacts import Artifact, save_artifact

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
    with pytest.raises(ConfigError, match="low_res"):
        first.sampler(upsampler=first)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="noise_aug_conditioning"):
        dataclasses.replace(LARGE.network, extra_inputs=())
