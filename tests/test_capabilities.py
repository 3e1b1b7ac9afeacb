"""What families declare: what is declared works, and all else is refused in one line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from examples.gan import GAN
from t2i_jax import plan as plans
from t2i_jax.cli import main
from t2i_jax.core import narrow
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.params import abstract
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.core.types import Toward, loops_of
from t2i_jax.edits import InitImage, Inpaint
from t2i_jax.guides import Autoguidance, ClassifierGuidance
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.nn.decode import int8_weights
from t2i_jax.pipeline import Pipeline
from t2i_jax.release import release
from t2i_jax.storage.artifacts import Artifact, save_artifact
from t2i_jax.training.loop import train
from tests.fixtures import toys
from tests.fixtures.families import CODECS, FAMILIES, batch_for

NARROW = {
    "family": narrow.as_family,
    "codec": narrow.as_codec,
    "classifier": narrow.as_classifier,
    "reference": narrow.compares_with_reference,
    "token_by_token": narrow.token_by_token,
    "likelihood": narrow.likelihood,
    "inpaint": narrow.inpainting,
    "init_image": narrow.image_to_image,
    "super_resolution": narrow.super_resolution,
    "classifier_guidance": narrow.classifier_guided,
    "any_size": narrow.any_size,
    "autoguidance": narrow.autoguided,
    "int8": narrow.int8_sampling,
    "frozen_networks": narrow.uses_frozen_networks,
    "interpolation": narrow.interpolates,
    "measures_scale": narrow.measures_scale,
    "reads_codec": narrow.reads_codec,
    "fitted": narrow.fitted,
    "shared_forward": narrow.shares_forward,
}
GAN_8 = GAN((8, 8), width=8, noise=4, condition=ClassEmbedder(3))
ALL = FAMILIES | {"histogram": toys.Histogram(), "example": GAN_8}
DRAW = [name for name, config in ALL.items() if config.capabilities.family]


@pytest.mark.parametrize("name", ALL | CODECS)
def test_types_are_narrowed_by_what_is_declared(name):
    config = (ALL | CODECS)[name]
    for flag, narrowed in NARROW.items():
        if dataclasses.asdict(config.capabilities)[flag]:
            assert narrowed(config) is config
        else:
            with pytest.raises(ConfigError, match=f"^a {type(config).__name__} "):
                narrowed(config)


@pytest.mark.parametrize("name", ALL)
def test_execution_is_set_where_there_is_a_choice(name):
    config = ALL[name]
    compute = config.compute
    for change in [{"remat": r} for r in config.capabilities.remat] + [{"dtype": "bfloat16"}]:
        if not config.capabilities.remat:
            continue
        new = dataclasses.replace(compute, **change)
        assert config.with_compute(new).compute == new and config.with_compute(new).with_compute(compute) == config
    if not config.capabilities.attention and type(config) is not toys.Histogram:
        with pytest.raises(ConfigError, match="no choice"):
            config.with_compute(dataclasses.replace(compute, attention="plain"))


@pytest.mark.parametrize("name", DRAW)
def test_what_is_declared_works(name):
    config, can, spec = ALL[name], ALL[name].capabilities, ALL[name].sample_spec()
    batch, model = batch_for(config, 2), abstract(config)
    reads = config.condition_spec()
    condition = {k: v for k, v in batch.items() if k in reads}
    if can.super_resolution:
        condition["low_res"] = np.zeros((2, 2, 2, 3), np.float32)
    assert {k for k, f in reads.items() if not f.optional} <= condition.keys()
    keys, options = jax.random.split(jax.random.key(0), 2), config.options()
    config.check(options)
    turns = [
        turn for own in loops_of(config.loop_trips(options)) for turn in (own if isinstance(own, list) else [(own,)])
    ]
    assert turns and all(isinstance(n, int) for turn in turns for n in turn)

    def drawn(model=model, **more):
        sample = lambda model, condition, keys, options: config.sample(model, condition, keys, options, **more)
        made = jax.eval_shape(sample, model, condition, keys, options.arrays())
        assert made.shape == (2, *spec.shape) and made.dtype == spec.code.dtype

    drawn()
    for guided in (False, True)[: 1 + can.unconditional] if can.guidance else ():
        drawn(guided=guided)
    known, keep = jnp.zeros((2, *spec.shape), spec.code.dtype), jnp.zeros((2, *spec.tokens), bool)
    if can.inpaint:
        drawn(known=known, keep=keep)
    if can.init_image:
        assert 0 < float(options.strength) <= 1
        drawn(known=known)
    if can.classifier_guidance:
        drawn(classifier=jax.tree_util.Partial(lambda x, t, condition: x.sum((1, 2, 3))))
    if can.autoguidance:
        sample = lambda m, w: config.sample(m, condition, keys, options, guide_model=w, guided=True)
        assert jax.eval_shape(sample, model, model).shape == (2, *spec.shape)
    if can.int8:
        drawn(jax.eval_shape(int8_weights, model))
    if can.negative:
        drawn(negative=condition)
    if can.image_embedding:
        size = config.batch_spec()["image_features"].shape
        drawn(image_features=jnp.zeros((2, *size)))
    if can.interpolation:
        drawn(toward=Toward(condition, keys, jnp.ones(2)))
    if can.likelihood:
        codes = {"codes": jnp.zeros((2, *spec.shape), spec.code.dtype)}
        nats = jax.eval_shape(config.log_likelihood, model, condition | codes)
        assert nats.shape == (2,) and nats.dtype == jnp.float32
    if can.token_by_token:
        logits, _ = jax.eval_shape(lambda model: model.prefill(condition, jnp.zeros(2, bool)), model)
        assert logits.shape == (2, *spec.code.sizes)


@pytest.mark.parametrize("name", DRAW)
def test_a_pipeline_refuses_what_is_not_declared(name):
    config, can = ALL[name], ALL[name].capabilities
    pipeline, image = Pipeline.place(config, {}, None, None), np.zeros((4, 4, 3), np.uint8)
    asked = {
        "inpaint": {"edit": Inpaint(image, np.ones((4, 4), bool))},
        "init_image": {"edit": InitImage(image)},
        "classifier_guidance": {"guides": [ClassifierGuidance(Artifact(FAMILIES["classifier"], {}))]},
        "autoguidance": {"guides": [Autoguidance(Artifact(config, {}))]},
        "super_resolution": {"upsampler": pipeline},
        "negative": {"negative": "1"},
    }
    for flag, argument in asked.items():
        if not dataclasses.asdict(can)[flag]:
            with pytest.raises(ConfigError, match=f"a {type(config).__name__} "):
                pipeline.sampler(**argument)
    for guide in (ClassifierGuidance(Artifact(config, {})), Autoguidance(Artifact(CLASSIFIER, {}))):
        with pytest.raises(ConfigError, match="a (Noised|)[A-Z]"):
            pipeline.sampler(guides=[guide])


CLASSIFIER = FAMILIES["classifier"]


@pytest.fixture(scope="module")
def histogram(tmp_path_factory):
    """A run of the toy family with a toy codec, and what was released of it."""
    folder = tmp_path_factory.mktemp("histogram")
    save_artifact(Artifact(toys.Squares(), {}), folder / "codec", "# Squares\n")
    experiment = toys.experiment(toys.Histogram(), toys.Labels(), steps=60)
    experiment = dataclasses.replace(experiment, codec=str(folder / "codec"))
    train(experiment, folder / "run")
    release(folder / "run", folder / "released")
    return experiment, folder


def test_a_family_of_the_protocol_alone_is_trained_released_and_sampled(histogram):
    _, folder = histogram
    pipeline = Pipeline.load(folder / "released", MeshConfig(1))
    made = pipeline.sample(["0", "1"], options=toys.Heat(1e-3))
    assert made.shape == (2, 8, 8, 3) and made[0].max() < 128 < made[1].min()
    main(["sample", str(folder / "released"), "1", "--temperature", "0.001", "--out", str(folder / "pictures")])
    assert np.asarray(Image.open(folder / "pictures" / "00000.png")).min() > 128


def test_a_family_of_the_protocol_alone_is_planned(histogram):
    experiment, _ = histogram
    plan = plans.run(dataclasses.replace(experiment, codec=""), plans.Topology.read("h100:8"), encoded=True)[0]
    assert plan.fits and plan.parameters == 4 * 2 * 2 * 2 * 8


@pytest.mark.parametrize(
    "flags", ["--int8", "--image", "--image --mask", "--classifier", "--autoguide", "--upsample", "--interpolate"]
)
def test_the_command_refuses_what_is_not_declared(histogram, capsys, tmp_path, flags):
    _, folder = histogram
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).convert("RGB").save(tmp_path / "image.png")
    value = {
        "--int8": [],
        "--interpolate": [3],
        "--image": [tmp_path / "image.png"],
        "--mask": [tmp_path / "image.png"],
    }
    words = [str(w) for flag in flags.split() for w in (flag, *value.get(flag, [folder / "released"]))]
    with pytest.raises(SystemExit) as stopped:
        main(["sample", str(folder / "released"), "1", "--out", str(tmp_path / "out"), *words])
    printed = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2 and "a Histogram " in printed and "Traceback" not in printed
