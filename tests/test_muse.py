"""Muse: a second stage that reads the codes of the first one's image, and negative prompts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.core import config
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.heads import SoftmaxHead
from t2i_jax.models.any_order import AnyOrder
from t2i_jax.models.masked import Masked
from t2i_jax.networks.condition import ClassEmbedder, Joined, LowCodes, TextFeatures
from t2i_jax.pipeline import Pipeline
from t2i_jax.sampling.guidance import Branches
from t2i_jax.sampling.options import ARSampler, MaskedSampler
from t2i_jax.sampling.orders import Confidence, Permutation
from t2i_jax.storage.artifacts import Artifact
from t2i_jax.training.experiment import make_prepare, make_store, record_spec
from tests.fixtures import toys
from tests.fixtures.families import FAMILIES

FIELDS = dict(width=8, depth=1, heads=2, dropout=0.0, head=SoftmaxHead(8))
MASKED = FIELDS | dict(order=Confidence(), reads="all", via="cross_attention", sampling=MaskedSampler(iterations=2))
BASE = with_fields(Masked(), **MASKED, grid=(2, 2), condition=ClassEmbedder(2))
SMALL = LowCodes(8, (2, 2), width=8, depth=1, heads=2)
UPSAMPLER = with_fields(Masked(), **MASKED, grid=(4, 4), condition=Joined((ClassEmbedder(2), SMALL)))


def filled(family):
    """A model whose parameters are all in use."""
    rng, shapes = np.random.default_rng(1), jax.eval_shape(family.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.5, size=x.shape), x.dtype), shapes)


def pipeline(family):
    return Pipeline.place(family, filled(family), Artifact(toys.Squares(), {}))


def test_a_cascade_of_codes():
    base, upsampler = pipeline(BASE), pipeline(UPSAMPLER)
    images = base([0, 1], upsampler=upsampler, negative=1)
    assert images.shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(images, base([0, 1], upsampler=upsampler, negative=1))
    plain = dataclasses.replace(UPSAMPLER, sampling=MaskedSampler(guidance=1.0, iterations=2))
    assert base.sampler(upsampler=pipeline(plain), negative="1").upsampler.negative == ""
    with pytest.raises(ConfigError, match="enlarges images"):
        upsampler([0])


def test_low_codes_are_of_the_small_image_by_the_codec():
    codec, spec = toys.Squares(), UPSAMPLER.batch_spec()
    small = np.random.default_rng(0).integers(0, 8, (3, 2, 2))
    images = np.kron(small, np.ones((8, 8)))[..., None].repeat(3, -1) / 4 - 1 + 0.1
    batch = {"image": ((images + 1) * 127.5).astype(np.uint8), "label": np.zeros(3, np.int32)}
    ready = make_prepare(codec, None, spec)({"codec": {}}, batch, jax.random.key(0))
    np.testing.assert_array_equal(ready["low_codes"], small)
    assert ready["codes"].shape == (3, 4, 4) and "image" not in ready
    assert make_store(codec, None, spec)({"codec": {}}, batch).keys() == {"codes", "low_codes"}
    given = batch | {"low_codes": 7 - small}  # of the data set, not computed again
    ready = make_prepare(codec, None, spec)({"codec": {}}, given, jax.random.key(0))
    np.testing.assert_array_equal(ready["low_codes"], 7 - small)
    experiment = dataclasses.replace(toys.experiment(), model=UPSAMPLER)
    assert record_spec(experiment, codec)["low_codes"].optional
    assert not record_spec(experiment, None)["low_codes"].optional


def test_conditions_are_joined():
    both = UPSAMPLER.conditioning.what
    assert both.length == 5 and both.batch_spec().keys() == {"label", "low_codes"}
    assert config.from_json(config.to_json(UPSAMPLER)) == UPSAMPLER
    with pytest.raises(ConfigError, match="two of them read 'label'"):
        Joined((ClassEmbedder(2), ClassEmbedder(3)))
    in_any_order = dataclasses.replace(ANY_ORDER, conditioning=dataclasses.replace(ANY_ORDER.conditioning, what=both))
    for family in (UPSAMPLER, in_any_order):
        assert family.capabilities.super_resolution
        with pytest.raises(ConfigError, match="codes 0 to 7"):
            dataclasses.replace(family, head=SoftmaxHead(9))
    assert Joined((TextFeatures(5, 6), SMALL)).spec.has_padding


def test_other_families_of_codes_are_second_stages_too_and_those_without_are_refused():
    low, prefix = LowCodes(16, (1, 1), 16, 1, 2), LowCodes(16, (2, 2), 16, 1, 2)
    for name, what in {"ar": prefix, "vq-diffusion": low}.items():
        family = with_fields(FAMILIES[name], condition=what, condition_dropout=0.0)
        assert family.capabilities.super_resolution and "low_codes" in family.condition_spec()
        with pytest.raises(ConfigError, match="codes 0 to 7 of small images: the model has 16 codes"):
            with_fields(family, condition=dataclasses.replace(what, vocabulary=8))
    with pytest.raises(ConfigError, match="codes 0 to 15 of small images: the model has codes of 3 numbers"):
        with_fields(FAMILIES["dit"], condition=low)
    with pytest.raises(ConfigError, match="16 codes, in maps of several sizes"):
        with_fields(FAMILIES["var"], condition=low)


def test_branches_have_the_negative_condition_in_turn():
    condition = {"label": jnp.asarray([0, 1]), "low_codes": jnp.arange(2)}
    rows, dropped = Branches(True, {"label": jnp.asarray([2, 3]), "other": jnp.zeros(2)}).conditions(condition, 2)
    assert rows["label"].tolist() == [0, 2, 1, 3] and rows["low_codes"].tolist() == [0, 0, 1, 1]
    assert rows.keys() == condition.keys() and not dropped.any()
    rows, dropped = Branches(True).conditions(condition, 2)
    assert rows["label"].tolist() == [0, 0, 1, 1] and dropped.tolist() == [False, True] * 2
    rows, dropped = Branches(False, condition).conditions(condition, 2)
    assert rows["label"].tolist() == [0, 1] and not dropped.any()


ANY_ORDER = with_fields(
    AnyOrder(), **FIELDS, order=Permutation(), grid=(2, 2), condition=ClassEmbedder(2), condition_dropout=0.0
)


@pytest.mark.parametrize("family", [BASE, ANY_ORDER], ids=["masked", "any order"])
def test_a_negative_prompt_is_in_the_place_of_the_unconditional_branch(family):
    """Nothing moves an image away from its own prompt, and another prompt does, with or without a learned null."""
    model, keys = filled(family), jax.random.split(jax.random.key(0), 6)
    kind = MaskedSampler if isinstance(family, Masked) else ARSampler
    label = {"label": jnp.zeros(6, jnp.int32)}
    sample = lambda scale, **more: np.asarray(family.sample(model, label, keys, kind(guidance=scale), **more))
    plain = sample(1.0, guided=False)
    np.testing.assert_array_equal(sample(9.0, negative=label), plain)
    assert (sample(9.0, negative={"label": jnp.ones(6, jnp.int32)}) != plain).any()


def test_what_takes_no_negative_prompt_says_so():
    with pytest.raises(ConfigError, match="takes no negative prompt"):
        pipeline(toys.Histogram()).sampler(negative="1")
    with pytest.raises(ConfigError, match="nothing guides"):
        pipeline(BASE)([0], negative=1, guidance=1.0)
    with pytest.raises(ConfigError, match="not one of 0 to 1"):
        pipeline(BASE)([0], negative=7)
