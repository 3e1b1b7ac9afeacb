"""Next-scale prediction: each scale is drawn given those before, and training sees what sampling does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from t2i_jax import convert
from t2i_jax.codecs.multiscale import MultiScaleConfig
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.convert import folders
from t2i_jax.core.config import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.params import named
from t2i_jax.models.var import VAR
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.nn.resize import area, bicubic
from t2i_jax.pipeline import Pipeline
from t2i_jax.sampling.options import ScaleSampler
from t2i_jax.sampling.progress import listening
from t2i_jax.storage.artifacts import Artifact, save_artifact
from t2i_jax.training.loop import train
from t2i_jax.training.trainer import Trainer
from tests.fixtures import toys
from tests.fixtures.families import CODECS, FAMILIES, batch_for, fresh
from tests.fixtures.published_models import random

TINY, CAPTIONS = FAMILIES["var"], FAMILIES["var-captions"]
CODEC = CODECS["vqgan-scales"]
OF_CODEC = dataclasses.replace(TINY, quantizer=CODEC.quantizer.vectors_alone)
SHAKEN = {}


def shaken(config):
    """A model away from its zeros, made once."""
    if config not in SHAKEN:
        shift = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
        SHAKEN[config] = jax.tree.map(shift, fresh(config))
    return SHAKEN[config]


def test_maps_are_resampled_as_they_are_in_pytorch():
    x = jax.random.normal(jax.random.key(0), (2, 7, 5, 3))
    means = area(x, (3, 2))
    for n, rows in enumerate((slice(0, 3), slice(2, 5), slice(4, 7))):
        for m, columns in enumerate((slice(0, 3), slice(2, 5))):
            np.testing.assert_allclose(means[:, n, m], x[:, rows, columns].mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(bicubic(x, (7, 5)), x, atol=1e-6)
    # The weights of a = -0.75 at distances 1.25, 0.75, 0.25, 0.25, 0.75, 1.25, 1.75.
    step = jnp.zeros((1, 4, 1, 1)).at[0, 1].set(1)
    wanted = [-0.10546875, 0.26171875, 0.87890625, 0.87890625, 0.26171875, -0.10546875, -0.03515625, 0]
    np.testing.assert_allclose(bicubic(step, (8, 1))[0, :, 0, 0], wanted, atol=1e-6)
    assert np.isclose(bicubic(jnp.ones((1, 3, 2, 1)), (8, 5)), 1, atol=1e-6).all()


def test_convolutions_are_shared_as_published():
    released = [MultiScaleConfig().convolution_of(n) for n in range(10)]
    assert released == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    one = dataclasses.replace(MultiScaleConfig(), convolutions=1)
    assert {one.convolution_of(n) for n in range(10)} == {0}


def test_the_codes_of_an_image_are_those_of_what_scales_before_leave():
    quantizer = fresh(CODEC).autoencoder.quantizer
    z = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    scales = quantizer.walk(z)
    codes = quantizer.codes(z)
    assert codes.shape == (2, 1 + 9 + 16)
    np.testing.assert_array_equal(codes[:, :1], scales[0].codes.reshape(2, -1))
    np.testing.assert_allclose(scales[1].rest, area(z - scales[0].total, (3, 3)), atol=1e-5)
    np.testing.assert_allclose(quantizer.vectors(codes), scales[-1].total, atol=1e-5)
    inputs = quantizer.inputs(codes)
    np.testing.assert_allclose(inputs[:, :9], area(scales[0].total, (3, 3)).reshape(2, 9, -1), atol=1e-5)
    np.testing.assert_allclose(inputs[:, 9:], scales[1].total.reshape(2, 16, -1), atol=1e-5)
    with pytest.raises(ValueError, match="8 x 8: the last of the scales"):
        quantizer.codes(jnp.zeros((1, 8, 8, 4)))


@pytest.mark.parametrize("config", [OF_CODEC, CAPTIONS], ids=["classes", "captions"])
def test_steps_with_a_cache_are_those_of_the_whole_sequence(config):
    model, batch, quantizer = shaken(config), batch_for(config, 2), config.quantizer

    @jax.jit
    def both(model, batch):
        read = model.read(batch, jnp.zeros(2, bool))
        total, caches, start, scores = (
            jnp.zeros((2, quantizer.side, quantizer.side, quantizer.dim)),
            model.caches(2),
            0,
            [],
        )
        for n, (end, p) in enumerate(zip(quantizer.ends, quantizer.scales, strict=True)):
            x = model.enter(n, read, model.quantizer.means(total, n) if n else None)
            z, caches = model.step(x, read, caches, end)
            scores.append(model.logits(z))
            total = total + model.quantizer.added(batch["codes"][:, start:end].reshape(2, p, p), n)
            start = end
        return jnp.concatenate(scores, 1), model.logits(model(batch))

    stepped, whole = both(model, batch)
    np.testing.assert_allclose(stepped, whole, atol=1e-4)
    # Codes of the last scale change nothing: each scale sees those before it alone.
    other = dict(batch, codes=batch["codes"].copy())
    other["codes"][:, -1] = (other["codes"][:, -1] + 1) % config.vocabulary
    np.testing.assert_array_equal(both(model, other)[1], whole)
    other["codes"][:, 0] = (other["codes"][:, 0] + 1) % config.vocabulary
    changed = np.abs(both(model, other)[1] - whole).max((0, 2))
    assert changed[0] == 0 and (changed[1:] > 1e-3).all()


def test_one_compilation_for_all_settings_and_images_of_their_own(traces):
    model, keys = shaken(TINY), jax.random.split(jax.random.key(1), 3)
    condition = {"label": np.asarray([0, 1, 2])}
    for n in range(5):
        options = ScaleSampler(
            guidance=n,
            guidance_start=n / 40,
            guidance_stop=1 - n / 20,
            guidance_power=n / 3,
            guidance_cosine=n % 2 == 0,
            temperature=0.5 + n / 10 if n % 2 else 1,
            top_k=n,
            top_p=1 - n / 20,
            greedy=n % 3 == 0,
        )
        made = TINY.sample(model, condition, keys, options)
    assert traces["_sample"] == 1
    some = np.asarray([2, 0, 1])
    again = TINY.sample(model, {"label": condition["label"][some]}, keys[some], options)
    np.testing.assert_array_equal(again, np.asarray(made)[some])


def test_guidance_grows_from_none_at_the_first_scale():
    grown = [float(ScaleSampler(guidance=2.5).guidance_at(n, 4)) for n in range(4)]
    np.testing.assert_allclose(grown, [1, 1.5, 2, 2.5], rtol=1e-6)


def test_scales_to_come_add_little_to_what_listeners_see():
    seen, model = [], shaken(TINY)
    with listening(lambda done, total, codes: seen.append((done, total, codes))) as progress:
        made = TINY.sample(
            model, {"label": np.zeros(2, np.int32)}, jax.random.split(jax.random.key(0), 2), progress=progress
        )
    first, last = sorted(seen, key=lambda call: call[0])
    assert first[:2] == (1, 2) and last[:2] == (2, 2)
    np.testing.assert_array_equal(last[2], made)
    np.testing.assert_array_equal(first[2][:, 1:], model.quantizer.smallest())
    np.testing.assert_array_equal(first[2][:, 0], made[:, 0])


@dataclasses.dataclass(frozen=True)
class Codes(toys.Numbers):
    """Batches of classes and codes of all scales."""

    def batches(self, text=None, position=0, rows=None, split="train", spec=None):
        for batch in super().batches(text, position, rows, split, spec):
            label = (batch["x"][:, 0] > 0).astype(np.int32)
            yield {"label": label, "codes": np.tile(7 * label[:, None], (1, 26))}


def test_a_run_reads_the_vectors_of_its_codec_and_trains_none_of_them(tmp_path):
    codec = fresh(CODEC)
    save_artifact(Artifact(CODEC, codec), tmp_path / "codec", "# Scales\n")
    experiment = toys.experiment(OF_CODEC, Codes(), steps=2)
    experiment = dataclasses.replace(experiment, codec=str(tmp_path / "codec"))
    train(experiment, tmp_path / "run")
    pipeline = Pipeline.load(tmp_path / "run")
    theirs = named(codec.autoencoder.quantizer)
    for name, variable in named(pipeline.model.vectors).items():
        np.testing.assert_array_equal(variable[...], theirs[name][...])
    assert pipeline(["0", "1"]).shape == (2, 8, 8, 3)
    with pytest.raises(ConfigError, match="^codec: a VAR reads the vectors of its codec, and none is set"):
        Trainer(dataclasses.replace(experiment, codec=""), tmp_path / "bare")
    with pytest.raises(ConfigError, match="maps of sides 1, 3, 4, the model maps of sides 1, 2: this is not its codec"):
        Trainer(dataclasses.replace(experiment, model=TINY), tmp_path / "other")
    with pytest.raises(ConfigError, match="convolutions=2.*convolutions=1"):
        config = with_fields(OF_CODEC, quantizer=dataclasses.replace(OF_CODEC.quantizer, convolutions=1))
        config.with_codec(fresh(config), CODEC, codec)


PUBLISHED = with_fields(
    VAR(),
    quantizer=MultiScaleConfig(QuantizerConfig(12, 4, normalize=False), (1, 2, 3)),
    width=16,
    depth=2,
    heads=2,
    mlp=64,
    condition=ClassEmbedder(5),
)


def test_blocks_that_share_a_matrix_are_those_that_have_one_each():
    """With shared adaLN, the vectors of a block are those of the one matrix plus its own table (VAR-d36)."""
    own = convert.restore("var", PUBLISHED, random(PUBLISHED)) | convert.find("var").buffers(PUBLISHED)
    draw = np.random.default_rng(1)
    w, b = (draw.normal(size=shape).astype(np.float32) / 4 for shape in ((96, 16), (96,)))
    shared = {k: v for k, v in own.items() if ".ada_lin." not in k or k.startswith("head_nm")}
    shared |= {"shared_ada_lin.1.weight": w, "shared_ada_lin.1.bias": b}
    for n in range(2):
        shared[f"blocks.{n}.ada_gss"] = table = draw.normal(size=(1, 1, 6, 16)).astype(np.float32)
        own[f"blocks.{n}.ada_lin.1.weight"], own[f"blocks.{n}.ada_lin.1.bias"] = w, b + table.reshape(-1)
    batch = {"codes": jnp.asarray(draw.integers(0, 12, (2, 14)), jnp.int32), "label": np.asarray([1, 4])}
    vectors = shaken(PUBLISHED).vectors
    scores = []
    for tensors in (own, shared):
        config, model = convert.convert("var", tensors)
        assert config.quantizer == PUBLISHED.quantizer and config.shared == ("shared_ada_lin.1.bias" in tensors)
        with pytest.raises(ConfigError, match="no vectors of a codec"):
            model(batch)
        scores.append(jax.jit(lambda m: m.logits(m(batch)))(model.with_vectors(vectors)))
        back = convert.restore("var", config, model) | convert.find("var").buffers(config)
        assert back.keys() == tensors.keys() and all(np.array_equal(back[k], tensors[k]) for k in back)
    np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-4)


def test_a_file_is_converted_with_its_codec(tmp_path):
    config = dataclasses.replace(CODEC, quantizer=dataclasses.replace(PUBLISHED.quantizer, scales=(1, 2, 4)))
    save_artifact(Artifact(config, random(config)), tmp_path / "codec", "# Scales\n")
    family = dataclasses.replace(PUBLISHED, quantizer=config.quantizer.vectors_alone)
    tensors = convert.restore("var", family, random(family)) | convert.find("var").buffers(family)
    save_file(tensors, tmp_path / "var.safetensors")
    arguments = "var", tmp_path / "var.safetensors", tmp_path / "out", {}
    with pytest.raises(ConfigError, match="reads the vectors of its codec: give --codec"):
        folders.to_folder(*arguments)
    artifact = folders.to_folder(*arguments, codec=str(tmp_path / "codec"))
    assert artifact.config == family and artifact.image_size == 8
    folders.to_file("var", tmp_path / "out", tmp_path / "back.safetensors")
    back = convert.read(tmp_path / "back.safetensors", "var")
    assert back.keys() == tensors.keys() and all(np.array_equal(back[k], tensors[k]) for k in back)
