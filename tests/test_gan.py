"""GANs of one stage: the terms of their losses, what they refuse, and images between two others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from t2i_jax.cli import main
from t2i_jax.convert import convert, restore
from t2i_jax.convert import read as read_file
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.keys import image_keys
from t2i_jax.core.params import abstract, named
from t2i_jax.core.types import Toward
from t2i_jax.data import ArrayRecord, Data
from t2i_jax.models import gan
from t2i_jax.models.gan import GAN, R1, GradientPenalty
from t2i_jax.networks.condition import ClassEmbedder, PrefixTokens
from t2i_jax.networks.one_stage import OneStage
from t2i_jax.nn.adversarial import Paired
from t2i_jax.pipeline import Pipeline
from t2i_jax.plan.estimate import with_kernel
from t2i_jax.sampling.interpolation import lerp, slerp
from t2i_jax.sampling.options import GANSampler
from t2i_jax.storage.artifacts import Artifact, save_artifact
from t2i_jax.training.experiment import Experiment
from tests.fixtures.families import FAMILIES, batch_for, fresh, losses_of
from tests.published.parity import SMALL

PLAIN, SPATIAL = FAMILIES["gan"], FAMILIES["gan-spatial"]
KEY, STEP = jax.random.key(1), jnp.int32(0)


def test_mismatched_pairs_are_of_other_sentences():
    sentence, ones = jnp.asarray([[0.0], [1.0], [1.0], [3.0]]), jnp.ones(4)
    others, weight = PLAIN._mismatched(sentence, ones)
    assert others[:, 0].tolist() == [3, 0, 1, 1] and weight.tolist() == [1, 1, 0, 1]
    assert PLAIN._mismatched(sentence, ones.at[3].set(0))[1].tolist() == [0, 1, 0, 0]
    others, weight = SPATIAL._mismatched(sentence, ones)
    assert others[:3, 0].tolist() == [1, 1, 3] and weight.tolist() == [1, 0, 1, 0]


def test_padding_of_a_batch_changes_no_loss():
    batch = batch_for(PLAIN, 3)
    padded = {k: np.concatenate([x, x[:1] + 1 if x.dtype == np.float32 else x[:1]]) for k, x in batch.items()}
    padded["weight"] = np.asarray([1, 1, 1, 0], np.float32)
    loss = jax.jit(lambda m, b, b2: PLAIN.discriminator_loss(m, b | {"outputs": b2}, KEY, STEP, False).metrics)
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)
    short = loss(fresh(PLAIN), batch, gan.GeneratedImages(images[:3], fresh(PLAIN).generator))
    long = loss(fresh(PLAIN), padded, gan.GeneratedImages(images, fresh(PLAIN).generator))
    # Of three mismatched pairs two are left: the first image's sentence was that of the last.
    for name in ("real", "fake", "penalty", "logit_real"):
        np.testing.assert_allclose(short[name], long[name], rtol=1e-5)


@pytest.mark.parametrize(
    ("penalty", "names"),
    [
        (None, ["discriminator", "generator"]),
        (GradientPenalty(), ["discriminator", "generator"]),
        (dataclasses.replace(R1, every=4), ["discriminator", "penalty", "generator"]),
    ],
)
def test_a_penalty_is_a_term_or_an_objective(penalty, names):
    for alternating in (False, True):
        objectives = dataclasses.replace(PLAIN, penalty=penalty, alternating=alternating).objectives()
        assert list(objectives) == names
        assert objectives["generator"].after == (tuple(names[:-1]) if alternating else ())
        if "penalty" in objectives:
            lazy = objectives["penalty"]
            assert (lazy.optimizer, lazy.every, lazy.after) == ("discriminator", 4, ("discriminator",))


def test_r1_is_of_the_image_alone():
    """Of a discriminator linear in the image and the sentence, with the gradient (3, 4) by the image."""

    class Linear:
        def features(self, images):
            return jnp.stack([images[:, 0, 0] @ jnp.asarray([3.0, 4.0, 0.0]), images[:, 0, 0, 2] * 0], -1)

        def logits(self, features, sentence):
            return features[:, 0] + 12 * sentence[:, 0]

    images, sentence = jnp.ones((2, 1, 1, 3)), jnp.ones((2, 1))
    each = PLAIN._penalised(Linear(), images, sentence, R1)[2]
    np.testing.assert_allclose(each, 5 * 25.0, rtol=1e-6)
    each = PLAIN._penalised(Linear(), images, sentence, GradientPenalty())[2]
    np.testing.assert_allclose(each, 2 * 13.0**6, rtol=1e-5)


def test_pairs_are_compared_by_the_means_of_squares():
    images = jnp.zeros((2, 4, 6, 3)).at[0, 0, :3].set(jnp.asarray([1.0, 0.0, -1.0])[:, None])  # of mean 0
    real = jnp.zeros((2, 4, 6, 3)).at[1, :2, :3].set(0.5)
    np.testing.assert_allclose(Paired(side=2).distances(images, real), [0, 0.5 / 4], atol=1e-7)
    np.testing.assert_allclose(Paired(side=64).distances(images, real), [2 / 24, 0.5 / 4], rtol=1e-6)
    twice = jnp.repeat(jnp.repeat(real, 2, 1), 2, 2)
    np.testing.assert_allclose(Paired(side=2).distances(images, twice), [0, 0.5 / 4], atol=1e-7)


@pytest.mark.parametrize("name", ["gan", "gan-spatial", "staged-gan"])
def test_paired_images_enter_the_loss_of_the_generator(name):
    """With their weight, and rows that weigh nothing do not."""
    plain, batch = FAMILIES[name], batch_for(FAMILIES[name], 3)
    batch = batch | {"weight": np.asarray([1, 1, 0], np.float32)}
    config, model = dataclasses.replace(plain, paired=Paired(3.0, 4)), fresh(plain)

    @jax.jit
    def run(batch):
        return [losses_of(at, model, batch, KEY, STEP, True)["generator"][:2] for at in (config, plain)]

    (loss, metrics), (without, _) = run(batch)
    np.testing.assert_allclose(loss, without + 3 * metrics["paired"], rtol=1e-5)
    other = batch | {"image": np.concatenate([batch["image"][:2], -batch["image"][2:]])}
    assert run(other)[0][1]["paired"] == metrics["paired"]


def test_an_unconditional_model_has_no_pairs():
    with pytest.raises(ConfigError, match="paired: an unconditional model"):
        with_fields(FAMILIES["staged-gan"], condition=ClassEmbedder(0), judged="sentence", paired=Paired())


def test_the_generator_alone_writes_running_statistics():
    batch, model = jax.tree.map(jnp.asarray, batch_for(SPATIAL)), abstract(SPATIAL)
    written = {}

    def run(model):
        for train in (True, False):
            for name, output in losses_of(SPATIAL, model, batch, KEY, STEP, train).items():
                state = output.state
                changed = {} if state is None else named(state).items()
                old = named(model)
                written[name, train] = [k for k, v in changed if v[...] is not old[k][...]]
        return 0

    jax.eval_shape(run, model)
    norms = [k for k in named(model) if k.endswith((".mean", ".var"))]
    assert sorted(written.pop(("generator", True))) == sorted(norms) and not any(written.values())


def test_words_and_regions_enter_the_loss_of_the_generator():
    config = with_fields(PLAIN, matching="a DAMSM")
    assert config.capabilities.frozen_networks and not PLAIN.capabilities.frozen_networks
    assert "label" in config.batch_spec() and "label" not in config.condition_spec()
    model, batch = fresh(PLAIN), batch_for(PLAIN)
    images = jnp.asarray(batch["image"])
    shown = lambda images: (images[:, :2].reshape(len(images), -1, 6)[..., :5], images[:, 0, :2].reshape(-1, 6)[:, :5])

    def loss(images, encoder):
        given = batch | {"outputs": gan.GeneratedImages(images, model.generator), "frozen": encoder}
        return config.generator_loss(model, given, KEY, STEP, True)

    found = loss(images, shown)
    np.testing.assert_allclose(found.loss, found.metrics["adversarial"] + 0.05 * found.metrics["matching"], rtol=1e-6)
    with pytest.raises(ConfigError, match="of the same DAMSM"):
        loss(images, lambda images: (images[:, 0], images[:, 0, 0]))
    with pytest.raises(ConfigError, match="compares words"):
        with_fields(SPATIAL, matching="a DAMSM")


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="multiples of 16"):
        OneStage((100, 100))
    with pytest.raises(ConfigError, match="multiples of 8"):
        OneStage((4, 8))
    with pytest.raises(ConfigError, match="gives no vectors"):
        GAN(condition=PrefixTokens(1))
    with pytest.raises(ConfigError, match="cannot be trained"):
        with_fields(PLAIN, discriminator=None).objectives()
    assert OneStage((32, 48)).start == (4, 6)


def test_the_generator_is_found_in_a_checkpoint_and_alone(tmp_path):
    tensors = {k: v for k, v in load_file(SMALL / "dfgan" / "weights.safetensors").items() if k.startswith("net")}
    parallel = {"model." + k.replace(".", ".module.", 1): v for k, v in tensors.items()}
    save_file(parallel | {"epoch": np.zeros(1)}, tmp_path / "state_epoch_001.safetensors")
    alone = {"module." + k.removeprefix("netG."): v for k, v in tensors.items() if k.startswith("netG.")}
    save_file(alone, tmp_path / "netG.safetensors")
    read = lambda name: convert("dfgan", read_file(tmp_path / f"{name}.safetensors", "dfgan"))
    (whole, both), (half, generator) = read("state_epoch_001"), read("netG")
    assert whole == with_fields(half, discriminator=whole.discriminator) and half.discriminator is None
    jax.tree.map(np.testing.assert_array_equal, both.generator, generator.generator)
    again = restore("dfgan", whole, both)
    assert all(np.array_equal(again[k], tensors[k]) for k in again)


def test_it_is_planned_whatever_the_size_of_its_images():
    config = with_fields(PLAIN, size=(64, 64))
    assert with_kernel(Experiment(config, Data(ArrayRecord("nowhere")))).model == config


def test_conditions_are_read_by_each_player():
    names = named(abstract(SPATIAL))
    assert {"generator.condition.table.w", "discriminator.condition.table.w"} <= names.keys()


def test_half_precision_changes_little():
    half = PLAIN.with_compute(dataclasses.replace(PLAIN.compute, dtype="bfloat16"))
    batch = batch_for(PLAIN)
    model = jax.tree.map(lambda x: x + 0.05, fresh(PLAIN))  # with a share of the residuals
    penalty = lambda c: jax.jit(jax.value_and_grad(lambda m: c.penalty_loss(m, batch, KEY, STEP, True).loss))
    as_half = dataclasses.replace(half, penalty=PLAIN.penalty)
    rebuilt = jax.tree.unflatten(jax.tree.structure(abstract(half)), jax.tree.leaves(model))
    exact, slopes = penalty(PLAIN)(model)
    near, rough = penalty(as_half)(rebuilt)
    np.testing.assert_allclose(near, exact, rtol=0.2)
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(float) for tree in (slopes, rough))
    assert np.dot(a, b) > 0.95 * np.linalg.norm(a) * np.linalg.norm(b)


def test_noise_keeps_its_length_on_the_way():
    x, y = np.random.default_rng(0).normal(size=(2, 3, 4000))
    share = jnp.asarray([0.0, 0.5, 1.0])
    between = slerp(jnp.asarray(x), jnp.asarray(y), share)
    np.testing.assert_allclose(between[0], x[0], rtol=1e-5)
    np.testing.assert_allclose(between[2], y[2], rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(between[1]) / 4000**0.5, 1, atol=0.05)
    assert np.array_equal(slerp(jnp.asarray(x), jnp.asarray(x), share), lerp(jnp.asarray(x), jnp.asarray(x), share))


def test_all_options_share_one_program_and_ends_are_images_of_their_own(traces):
    model, keys = fresh(PLAIN), image_keys([0, 1])
    condition = {k: v for k, v in batch_for(PLAIN, 2).items() if k in PLAIN.condition_spec()}
    sample = lambda c, k, o=None, **more: np.asarray(PLAIN.sample(model, c, k, o, **more))
    plain = sample(condition, keys)
    traces.clear()
    for options in (GANSampler(0.5), GANSampler(1, 2), GANSampler(truncation=0.5), GANSampler(0)):
        sample(condition, keys, options)
    assert np.array_equal(sample(condition, keys, GANSampler(1.0, 0.0)), plain)
    assert not traces["_sample"]
    back = {k: v[::-1] for k, v in condition.items()}
    toward = lambda share: Toward(back, keys[::-1], jnp.asarray(share))
    np.testing.assert_allclose(sample(condition, keys, toward=toward([0.0, 1.0])), plain[[0, 0]], atol=1e-5)
    np.testing.assert_allclose(*sample(condition, keys, toward=toward([0.5, 0.5])), atol=1e-5)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gan") / "model"
    save_artifact(Artifact(SPATIAL, fresh(SPATIAL), None), folder, "# GAN\n")
    return folder


def test_a_pipeline_draws_the_way_between_prompts_and_between_seeds(released, tmp_path, capsys):
    pipeline = Pipeline.load(released)
    way = pipeline.interpolate([0, 1, 2], seeds=3, count=3)
    ends = pipeline([0, 1, 2], seeds=[3, 3, 3])
    assert way.shape == (5, 8, 8, 3) and np.array_equal(way[::2], ends)
    assert np.array_equal(pipeline.interpolate(1, seeds=[3, 4], count=2), pipeline(1, seeds=[3, 4]))
    with pytest.raises(ValueError, match="as many of each"):
        pipeline.interpolate([0, 1, 2], seeds=[3, 4])
    words = ["sample", str(released), "0", "1", "2", "--seed", "3", "--interpolate", "3", "--out", str(tmp_path)]
    main(words)
    drawn = np.stack([np.asarray(Image.open(tmp_path / f"0000{n}.png")) for n in range(5)])
    assert np.array_equal(drawn, way) and (tmp_path / "grid.png").exists()
    main(words)
    assert ": 0 new" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sample", str(released), "0", "--interpolate", "3", "--out", str(tmp_path / "other")])
    assert "--count 2" in capsys.readouterr().err
