"""TAESD: published names in all their sizes, a decoder alone, codes that train, and intermediate images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from t2i_jax.cli import main
from t2i_jax.codecs.taesd import TAESD, DecoderLevels, EncoderLevels
from t2i_jax.convert import convert
from t2i_jax.convert.folders import to_file, to_folder
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.params import named
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.networks.dit import DiT
from t2i_jax.noise.processes import Discrete
from t2i_jax.storage.artifacts import Artifact, load_artifact, save_artifact
from tests.fixtures.commands import refused
from tests.fixtures.families import CODECS, fresh
from tests.fixtures.published_files import random

SMALL = TAESD(3, EncoderLevels((8, 8, 8), (1, 2, 1), True), DecoderLevels((8, 8, 8), (1, 2, 1), True), adversarial=0.0)
SANA = TAESD(
    32,
    EncoderLevels((64,) * 4, (1, 3, 3, 3), entry=(32, 64)),
    DecoderLevels((256, 128, 64, 64, 64, 64), (3, 3, 3, 3, 3, 1)),
    adversarial=0.0,
)
FLUX_2 = TAESD(32, EncoderLevels(normed=True), DecoderLevels(normed=True), adversarial=0.0)


@pytest.mark.parametrize(
    ("config", "convolutions", "count"),
    [
        (TAESD(adversarial=0.0), ({0, 2, 6, 10, 14}, {1, 7, 12, 17, 19}), 1_222_532 + 1_222_531),
        (TAESD(16, adversarial=0.0), ({0, 2, 6, 10, 14}, {1, 7, 12, 17, 19}), None),
        (FLUX_2, ({0, 2, 6, 10, 14}, {1, 7, 12, 17, 19}), None),
        (SANA, ({0, 2, 5, 9, 13, 17}, {1, 7, 12, 17, 22, 27, 29}), None),
    ],
    ids=["taesd", "taesd3", "taef2", "taesana"],
)
def test_names_and_sizes_are_the_published_ones(config, convolutions, count):
    tensors = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in random("taesd", config).items()}
    for side, places in zip(("encoder", "decoder"), convolutions, strict=True):
        single = {n.split(".")[1] for n in tensors if n.startswith(side) and n.count(".") == 2}
        assert {int(n) for n in single} == places
    again, model = convert("taesd", tensors)
    assert again == config
    assert count is None or sum(x.size for x in jax.tree.leaves(model)) == count
    # diffusers counts the layers of a decoder without the first one, which has no weights.
    later = {}
    for name, tensor in tensors.items():
        side, number, rest = name.split(".", 2)
        later[f"{side}.layers.{int(number) - (side == 'decoder')}.{rest}"] = tensor
    assert convert("taesd", later)[0] == config


def test_a_file_gives_the_computation_of_its_layers():
    """A decoder of one block, each layer by hand."""
    config = TAESD(2, None, DecoderLevels((4, 4), (1, 1)), adversarial=0.0)
    tensors = {k: 0.3 * v for k, v in random("taesd", config).items()}
    alone = {name.removeprefix("decoder."): tensor for name, tensor in tensors.items()}
    found, model = convert("taesd", alone)
    assert found == config and not config.spec.encodes
    z = 2 * jax.random.normal(jax.random.key(0), (1, 3, 2, 2))

    def conv(x, place):
        kernel = jnp.transpose(jnp.asarray(alone[f"{place}.weight"]), (2, 3, 1, 0))
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + alone.get(f"{place}.bias", 0)

    def block(x, n):
        y = jax.nn.relu(conv(jax.nn.relu(conv(x, f"{n}.conv.0")), f"{n}.conv.2"))
        return jax.nn.relu(x + conv(y, f"{n}.conv.4"))

    h = block(jax.nn.relu(conv(3 * jnp.tanh(z / 3), 1)), 3)
    h = block(conv(jnp.repeat(jnp.repeat(h, 2, 1), 2, 2), 5), 6)
    np.testing.assert_allclose(config.decode(model, z), 2 * conv(h, 7) - 1, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no codes of images"):
        config.encode(model, jnp.zeros((1, 4, 4, 3)))


def test_folders_and_files_are_read_and_written(tmp_path):
    tensors = random("taesd", SMALL)
    published = tmp_path / "taef0"
    published.mkdir()
    for side in ("encoder", "decoder"):
        part = {k.removeprefix(f"{side}."): v.astype(np.float16) for k, v in tensors.items() if k.startswith(side)}
        save_file(part, published / f"taef0_{side}.safetensors")
    artifact = to_folder("taesd", published, tmp_path / "both", {"perceptual": 0.0})
    assert artifact.config == dataclasses.replace(SMALL, perceptual=0.0)
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)), jnp.float32)
    read = load_artifact(tmp_path / "both")
    codes = read.config.encode(read.model, images)
    assert codes.shape == (2, 2, 2, 3) and read.config.decode(read.model, codes).shape == images.shape
    to_file("taesd", tmp_path / "both", tmp_path / "back.safetensors")
    again = to_folder("taesd", tmp_path / "back.safetensors", tmp_path / "again", {})
    for name, value in named(again.model).items():
        np.testing.assert_array_equal(value[...], named(read.model)[name][...])
    # The folder of diffusers has a scale, too.
    hub = tmp_path / "hub"
    hub.mkdir()
    later = lambda name: f"{name[:8]}layers.{int(name.split('.')[1]) - (name[0] == 'd')}.{name.split('.', 2)[2]}"
    save_file({later(k): v for k, v in tensors.items()}, hub / "diffusion_pytorch_model.safetensors")
    (hub / "config.json").write_text('{"scaling_factor": 0.5, "shift_factor": 0.25}')
    scaled = to_folder("taesd", hub, tmp_path / "scaled", {})
    (hub / "config.json").write_text('{"act_fn": "silu"}')
    with pytest.raises(ConfigError, match="act_fn is 'silu'"):
        to_folder("taesd", hub, tmp_path / "none", {})
    assert scaled.config == dataclasses.replace(SMALL, scale=0.5, shift=0.25)
    np.testing.assert_allclose(scaled.config.encode(scaled.model, images), (codes - 0.25) / 2, rtol=0.02, atol=0.02)
    (published / "taef0_decoder.safetensors").unlink()
    for path, said in ((published, "of .*decoder there is none"), (published / "taef0_encoder.safetensors", "alone")):
        with pytest.raises(ConfigError, match=said):
            to_folder("taesd", path, tmp_path / "none", {})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TAESD(encoder=EncoderLevels((64, 64), (1, 1))), "a code of 2 pixels"),
        (lambda: DecoderLevels((64, 64), (1,)), "one number a level"),
        (lambda: EncoderLevels(entry=(32,)), "it ends with the channels of the first level"),
    ],
)
def test_sizes_that_do_not_fit_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_measured_scale_gives_unit_variance():
    config = CODECS["taesd"]
    images = jax.random.uniform(jax.random.key(1), (8, 8, 8, 3), minval=-1)
    scale, shift = config.measure(fresh(config), [images[:4], images[4:]])
    codes = dataclasses.replace(config, scale=scale, shift=shift).encode(fresh(config), images)
    assert abs(float(codes.mean())) < 1e-3 and abs(float(codes.std()) - 1) < 1e-3


def test_intermediate_images_by_a_small_decoder(tmp_path, capsys):
    network = with_fields(
        DiT(), size=(2, 2), channels=3, patch=1, width=8, depth=1, heads=1, condition=ClassEmbedder(2)
    )
    family, own = Diffusion(network, Discrete("cosine", 8)), CODECS["kl"]
    other = TAESD(4, None, SMALL.decoder, adversarial=0.0)
    small = dataclasses.replace(SMALL, encoder=None)
    for name, codec in {"own": own, "small": small, "other": other}.items():
        save_artifact(Artifact(codec, fresh(codec)), tmp_path / name, "# codec\n")
    save_artifact(Artifact(family, fresh(family), codec=str(tmp_path / "own")), tmp_path / "model", "# model\n")
    arguments = ["sample", str(tmp_path / "model"), "0", "--steps", "2", "--scale", "1"]
    sides = {}
    for name, more in {"whole": [], "little": ["--watch-codec", str(tmp_path / "small")]}.items():
        main([*arguments, "--out", str(tmp_path / name), "--watch", *more])
        sides[name] = Image.open(tmp_path / name / "growing.png").size
        assert Image.open(tmp_path / name / "00000.png").size == (4, 4)
    assert sides["little"] != sides["whole"]  # the small decoder makes larger images of these codes
    x = [*arguments, "--out", str(tmp_path / "x")]
    assert "without --watch" in refused(capsys, *x, "--watch-codec", tmp_path / "small")
    assert "not its codec" in refused(capsys, *x, "--watch", "--watch-codec", tmp_path / "other")
