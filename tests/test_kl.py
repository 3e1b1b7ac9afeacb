"""The KL autoencoder: its codes, its losses, and its weights under the names of other programs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.discriminator import DiscriminatorConfig
from t2i_jax.codecs.kl import KL, DiagonalGaussian, draw_codes
from t2i_jax.convert import convert, find, restore
from t2i_jax.convert.folders import to_folder
from t2i_jax.core.config import to_json
from t2i_jax.data.pipeline import Data
from t2i_jax.data.records import write_records
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.release import with_measured_scale
from t2i_jax.storage.artifacts import Artifact
from t2i_jax.training.experiment import Experiment
from tests.fixtures.families import losses_of
from tests.fixtures.released import released, tensors_of

TINY = AutoencoderConfig(8, (1, 2), blocks=1, latent=3, moments=True, attention=(), groups=4)
CODEC = KL(TINY, channels=2, perceptual=0.0, start=0, discriminator=DiscriminatorConfig(width=4, layers=1))


@pytest.fixture(scope="module")
def model():
    return jax.jit(CODEC.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(1), (4, 8, 8, 3), minval=-1)


def test_divergence_is_that_of_the_integral():
    q = DiagonalGaussian(jnp.full((1, 1, 1, 1), 0.7), jnp.full((1, 1, 1, 1), -1.3))
    z = np.linspace(-12, 12, 200_001)
    density = lambda m, s: np.exp(-((z - m) ** 2) / (2 * s**2)) / (s * np.sqrt(2 * np.pi))
    p, r = density(0.7, np.exp(-0.65)), density(0, 1)
    integral = np.trapezoid(p * np.log(np.maximum(p, 1e-300) / r), z)
    np.testing.assert_allclose(q.kl(), [integral], rtol=1e-4)
    zero = jnp.zeros((2, 3, 3, 4))
    np.testing.assert_allclose(DiagonalGaussian(zero, zero).kl(), 0)


def test_codes_are_shifted_and_scaled_means_or_draws(model, images):
    scaled = dataclasses.replace(CODEC, scale=0.3, shift=0.5)
    q = CODEC.posterior(model, images)
    key = jax.random.key(2)
    noise = jax.random.normal(key, q.mean.shape)
    np.testing.assert_allclose(scaled.encode(model, images), (q.mean - 0.5) * 0.3, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        scaled.encode(model, images, key), (q.mean + q.std * noise - 0.5) * 0.3, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        scaled.decode(model, scaled.encode(model, images)),
        CODEC.decode(model, CODEC.encode(model, images)),
        rtol=1e-4,
        atol=1e-5,
    )
    stored = scaled.to_store(model, images)["latents"]
    np.testing.assert_allclose(draw_codes(stored, key), scaled.encode(model, images, key), rtol=1e-5, atol=1e-6)
    assert scaled.encode(model, images).shape == (4, 4, 4, CODEC.dim)


def test_measured_scale_gives_unit_variance(model, images):
    scale, shift = CODEC.measure(model, [images[:2], images[2:]])
    fitted = dataclasses.replace(CODEC, scale=scale, shift=shift)
    keys = jax.random.split(jax.random.key(3), 256)
    codes = jax.vmap(lambda k: fitted.encode(model, images, k))(keys)
    assert abs(float(codes.mean())) < 0.02 and abs(float(codes.std()) - 1) < 0.02
    with pytest.raises(ValueError, match="no images"):
        CODEC.measure(model, [])


def test_a_release_has_the_scale_of_its_runs_pictures(model, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 3), np.uint8)
    every = [{"key": str(i), "image": x, "captions": [""], "split": "train"} for i, x in enumerate(pictures)]
    write_records(tmp_path / "data", every)
    experiment = Experiment(CODEC, Data(ArrayRecord(str(tmp_path / "data")), image_size=8))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_json(experiment)))
    released = with_measured_scale(Artifact(CODEC, model), tmp_path / "run").config
    wanted = CODEC.measure(model, [pictures.astype(np.float32) / 127.5 - 1])
    np.testing.assert_allclose((released.scale, released.shift), wanted, rtol=1e-6)


def test_the_penalty_pulls_towards_the_normal(model, images):
    assert set(CODEC.objectives()) == {"generator", "discriminator"}
    heavy = dataclasses.replace(CODEC, kl=1.0, adversarial=0.0)
    loss = lambda m: losses_of(heavy, m, {"image": images}, jax.random.key(4), 5)["generator"].loss
    slope = jax.jit(jax.grad(loss, allow_int=True))
    step = jax.tree.map(lambda w, g: w - 1e-3 * g, model.autoencoder, slope(model).autoencoder)
    after = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves((step, model.discriminator)))
    assert CODEC.posterior(after, images).kl().mean() < CODEC.posterior(model, images).kl().mean()


def test_clear_errors(model):
    with pytest.raises(ValueError, match=r"multiples of 2"):
        CODEC.encode(model, jnp.zeros((1, 7, 8, 3)))
    with pytest.raises(ValueError, match=r"moments=True"):
        KL(dataclasses.replace(TINY, moments=False))
    with pytest.raises(ValueError, match=r"decoder.conv_in"):
        convert("kl", {"encoder.conv_in.weight": np.zeros((8, 3, 3, 3), np.float32)})


@pytest.mark.parametrize("style", ["kl", "kl_diffusers", "kl_diffusers_2022"])
@pytest.mark.parametrize("convolutions", [True, False])
def test_published_names_lead_back_to_the_same_codec(style, convolutions):
    attention = () if "diffusers" in style else (1,)
    config = KL(
        dataclasses.replace(TINY, attention=attention, decoder_attention=(), decoder_blocks=2),
        convolutions=convolutions,
        perceptual=0.0,
        adversarial=0.0,
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(config.init, jax.random.key(0))
    model = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
    found, again = convert(style, restore(style, config, model), groups=4, scale=1.0, shift=0.0)
    assert dataclasses.replace(found, channels=0) == config
    jax.tree.map(np.testing.assert_array_equal, again, model)


def test_the_released_file_is_taken_whole():
    config, model = convert("kl", tensors_of("mar_kl16"))
    assert sum(x.size for x in jax.tree.leaves(model)) == released()["mar_kl16"]["numel_params"]
    assert config == KL(config.autoencoder, 16, scale=0.2325, perceptual=0.0, adversarial=0.0)
    assert config.autoencoder.multipliers == (1, 1, 2, 2, 4) and config.autoencoder.decoder_attention == ()


def folder_of(path, config, settings, style):
    """A folder as diffusers lays it out, with random numbers under the names of `style`."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(config.init, jax.random.key(0))
    model = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"norm_num_groups": 4} | settings))
    tensors = {k: np.ascontiguousarray(v) for k, v in restore(style, config, model).items()}
    save_file(tensors, path / "diffusion_pytorch_model.safetensors")
    return model


DIFFUSERS = dataclasses.replace(
    TINY, attention=(), decoder_attention=(), decoder_blocks=2, middle_attention=True, latent=16
)


@pytest.mark.parametrize(("style", "whole"), [("kl_diffusers", True), ("kl_diffusers_2022", False)])
def test_a_folder_tells_the_scale_of_its_codes(tmp_path, style, whole, caplog):
    """That of FLUX.1, whose shapes are Stable Diffusion 3's; names of either year, alone or in a whole model."""
    path = tmp_path / "model" / "vae" if whole else tmp_path / "model"
    config = KL(DIFFUSERS, convolutions=False, perceptual=0.0, adversarial=0.0)
    settings = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    model = folder_of(path, config, settings, style)
    artifact = to_folder("kl_diffusers", tmp_path / "model", tmp_path / "out", {})
    assert (artifact.config.scale, artifact.config.shift) == (0.3611, 0.1159) and not caplog.text
    jax.tree.map(np.testing.assert_array_equal, artifact.model, model)
    # The file alone does not say, and the guess is printed.
    file = path / "diffusion_pytorch_model.safetensors"
    guessed = to_folder("kl_diffusers", file, tmp_path / "guessed", {"groups": 4}).config
    assert (guessed.scale, guessed.shift) == (1.5305, 0.0609)
    assert "scale 1.5305" in caplog.text and "FLUX.1 has --scale 0.3611 --shift 0.1159" in caplog.text
    given = to_folder("kl_diffusers", file, tmp_path / "given", {"groups": 4, "scale": 0.3611}).config
    assert (given.scale, given.shift) == (0.3611, 0.1159)


def test_settings_without_a_scale_are_those_of_the_first_version(tmp_path):
    plain = KL(dataclasses.replace(DIFFUSERS, latent=4), perceptual=0.0, adversarial=0.0)
    folder_of(tmp_path / "vae", plain, {}, "kl_diffusers")
    found = find("kl_diffusers").folder(tmp_path).hints
    assert found == {"groups": 4, "scale": 0.18215, "shift": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        dict(latent_channels=4),  # Stable Diffusion, SDXL
        dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),  # Stable Diffusion 3, FLUX
    ],
)
@pytest.mark.parametrize("names", ["kl_diffusers", "kl_diffusers_2022"])
def test_equal_to_diffusers(kind, names):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        sample_size=16,
        **kind,
    ).eval()
    tensors = {k: v.numpy() for k, v in theirs.state_dict().items()}
    if names.endswith("2022"):
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            tensors = {k.replace(f".{new}.", f".{old}."): v for k, v in tensors.items()}
    config, model = convert(names, tensors, groups=4)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        q = theirs.encode(torch.tensor(images)).latent_dist
        picture = theirs.decode(q.mean).sample.numpy()
    ours = config.posterior(model, images.transpose(0, 2, 3, 1))
    close = lambda a, b: np.testing.assert_allclose(a, b.transpose(0, 2, 3, 1), rtol=1e-3, atol=1e-4)
    close(ours.mean, q.mean.numpy())
    close(ours.logvar, q.logvar.numpy())
    close(config.decode(model, config.encode(model, images.transpose(0, 2, 3, 1))), picture)
