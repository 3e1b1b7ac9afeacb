"""What holds of every family and codec: it trains on what it says it takes, and held-out losses are the model's own."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.core import narrow
from t2i_jax.core.errors import ConfigError, DataError
from t2i_jax.core.family import path_of, with_fields
from t2i_jax.core.params import abstract
from t2i_jax.core.specs import FieldSpec, SampleSpec, check_batch, check_example
from t2i_jax.data import ArrayRecord, Data
from t2i_jax.models.ar import AR
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.networks.dit import DiT
from t2i_jax.noise.processes import Discrete
from t2i_jax.pipeline import Pipeline
from t2i_jax.sampling.progress import listening
from t2i_jax.training.experiment import Experiment, record_spec
from tests.fixtures.curves import FILE, curve
from tests.fixtures.families import ALL, CODECS, FAMILIES, batch_for, fresh, losses_of

REGULAR = {
    "dropout": 0.5,
    "drop_path": 0.5,
    "token_dropout": 0.5,
    "condition_dropout": 0.9,
    "corruption": 0.9,
    "label_smoothing": 0.5,
    "z_loss": 1.0,
    "noise_aug": 0.9,
}
"""Fields that regularise, and values that are felt."""


def regularised(config, strong):
    """A configuration, with those it is made of, whose regularising fields are strong or 0."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    inner = {k: regularised(v, strong) for k, v in fields.items() if dataclasses.is_dataclass(v) and k != "sampling"}
    mine = {k: v * strong for k, v in REGULAR.items() if k in fields}
    return dataclasses.replace(config, **inner, **mine)


@pytest.mark.parametrize("name", ALL)
def test_it_learns_what_it_did_on_what_it_says_it_takes(name):
    config = ALL[name]
    batch, model = batch_for(config), fresh(config)
    check_batch(config.batch_spec(), batch)
    losses = jax.jit(lambda m, b: [o.loss for o in losses_of(config, m, b, jax.random.key(1), 3, False).values()])
    assert np.isfinite(losses(model, batch)).all()
    recorded = {k: v for k, v in json.loads(FILE.read_text()).items() if k.split("/")[0] == name}
    losses = {f"{name}/{k}": v for k, v in curve(config).items()}
    assert losses.keys() == recorded.keys()
    for k, v in losses.items():
        np.testing.assert_allclose(v, recorded[k], rtol=1e-3, atol=1e-6, err_msg=k)


@pytest.mark.parametrize("name", FAMILIES)
def test_held_out_losses_are_of_the_model_alone(name):
    strong, none = (regularised(FAMILIES[name], strong) for strong in (1, 0))
    batch = batch_for(none)

    def program(config, train):
        loss = lambda m, b: {k: o.loss for k, o in losses_of(config, m, b, jax.random.key(1), 3, train).items()}
        text = str(jax.make_jaxpr(loss)(abstract(config), batch))
        return re.sub("0x[0-9a-f]+", "", text)

    assert program(strong, False) == program(none, False)
    if strong != none:
        assert program(strong, True) != program(none, True)


@pytest.mark.parametrize("name", ALL)
def test_what_it_does_not_take_is_named(name):
    spec = ALL[name].batch_spec()
    batch = batch_for(ALL[name])
    for field, takes in spec.items():
        if field not in batch:
            continue
        x = batch[field]
        wrong = [x[..., None], x.astype(complex)] + [x[..., :-1]] * bool(takes.shape and takes.shape[-1])
        if takes.dtype == "int32":
            wrong += [
                np.where(np.arange(x.size).reshape(x.shape) == 1, np.int64(n), x)
                for n in (takes.low - 1, takes.high + 1)
            ]
            wrong += [x.astype(np.float32)]
        for value in wrong:
            with pytest.raises(DataError, match=f"'{field}'"):
                check_batch(spec, batch | {field: value})
        if not takes.optional:
            with pytest.raises(DataError, match=f"no '{field}'"):
                check_batch(spec, {k: v for k, v in batch.items() if k != field})


def test_one_of_a_group_is_needed_and_the_first_is_read():
    family = next(f for f in FAMILIES.values() if isinstance(f, Diffusion) and not f.is_super_resolution)
    batch = {k: v for k, v in batch_for(family).items() if k not in ("codes", "image")}
    with pytest.raises(DataError, match="none of 'codes', 'image'"):
        check_batch(family.batch_spec(), batch)
    codes, image = np.zeros((len(batch["label"]), *family.shape), np.float32), np.zeros((3, 64, 64, 3), np.float32)
    check_batch(family.batch_spec(), batch | {"codes": codes, "image": image})
    with pytest.raises(DataError, match="'image' has shape"):
        check_batch(family.batch_spec(), batch | {"image": image})


def test_a_small_image_is_needed_where_none_can_be_made():
    family = next(f for f in FAMILIES.values() if isinstance(f, Diffusion) and f.upscale)
    batch = {k: v for k, v in batch_for(family).items() if k != "low_res"}
    check_batch(family.batch_spec(), batch)
    with pytest.raises(DataError, match="'low_res'"):
        check_batch(dataclasses.replace(family, upscale=0).batch_spec(), batch)


@pytest.mark.parametrize("codec", [None, CODECS["kl"]])
@pytest.mark.parametrize("names", [("codes",), ("latents",), ("latents", "image"), ("image",), ()])
def test_records_hold_latents_or_what_they_are_made_of(names, codec):
    family = Diffusion(
        with_fields(DiT(), size=(4, 4), channels=4, patch=2, width=16, depth=1, heads=2, condition=ClassEmbedder(3)),
        Discrete("cosine", 20),
    )
    spec = record_spec(Experiment(family, Data(ArrayRecord("nowhere"))), codec)
    record = {"codes": np.zeros((4, 4, 4), np.float16), "latents": np.zeros((4, 4, 8), np.float32)}
    record |= {"image": np.zeros((8, 8, 3), np.uint8)}
    record = {name: record[name] for name in names} | {"label": np.int32(1)}
    if names in ((), ("image",)) and (codec is None or not names):
        with pytest.raises(DataError):
            check_example(spec, record)
    else:
        check_example(spec, record)


@pytest.mark.parametrize(
    "make",
    [lambda: with_fields(DiT(), size=(4, 4), channels=3, condition=None), lambda: Diffusion(None, Discrete())],
)  # pyright: ignore
def test_what_needs_a_value_says_so(make):
    with pytest.raises(ConfigError, match="needs a value"):
        make()


def test_any_width_of_integers_and_floats_is_taken():
    ids, vectors = FieldSpec((2,), "int32", 0, 300), FieldSpec((None, 3), "float32", multiple=2)
    for dtype in (np.uint16, np.int64, np.int32):
        assert not ids.fault(np.asarray([0, 300], dtype))
    for dtype in (np.float16, jax.numpy.bfloat16, np.float64):
        assert not vectors.fault(np.zeros((4, 3), dtype))
    assert "multiples of 2" in vectors.fault(np.zeros((3, 3)))
    assert "one number" in FieldSpec((), "int32").fault(np.zeros(2, int))
    assert "holds 301" in ids.fault(np.asarray([0, 301]))


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_does_what_it_declares(name):
    config, spec = CODECS[name], CODECS[name].spec
    model, grid = abstract(config), (spec.scales[-1:] * 2 or (8 // spec.factor, 12 // spec.factor))
    images = jax.ShapeDtypeStruct((2, *(n * spec.factor for n in grid), 3), np.float32)
    codes = jax.eval_shape(config.encode, model, images)
    check_batch({"codes": SampleSpec(grid, spec.code, scales=spec.scales).field}, {"codes": codes})
    made = jax.eval_shape(config.decode, model, codes)
    assert (made.shape, made.dtype) == (images.shape, images.dtype)
    assert jax.eval_shape(config.to_store, model, images).keys() <= {"codes", "latents"}
    half = config.with_compute(with_fields(config.compute, dtype="bfloat16"))
    assert half.compute.dtype == "bfloat16" and half.spec == config.spec


def test_a_perceptual_loss_is_declared():
    for name in ("vqgan", "kl"):
        assert not CODECS[name].capabilities.frozen_networks
        assert dataclasses.replace(CODECS[name], perceptual=1.0).capabilities.frozen_networks


def test_the_scale_of_codes_is_measured():
    config = narrow.measures_scale(CODECS["kl"])
    scale, shift = config.measure(fresh(config), [np.zeros((2, 8, 8, 3), np.float32)])
    assert np.isfinite(scale) and np.isfinite(shift) and scale > 0


def test_what_declares_nothing_is_no_model():
    for value in (AR, ClassEmbedder(3), None, 3):
        with pytest.raises(ConfigError, match=r"Experiment.model.*a family or a codec"):
            Experiment(value, Data(ArrayRecord("nowhere")))  # pyright: ignore[reportArgumentType]


def models_that_draw(of):
    return [name for name, config in FAMILIES.items() if config.capabilities.family and of(config)]


@pytest.mark.parametrize("name", models_that_draw(lambda c: c.sample_spec().kind != "pixels"))
def test_codes_are_no_images(name):
    config = FAMILIES[name]
    pipeline = Pipeline.place(config, fresh(config), None, None)
    with pytest.raises(ConfigError, match="no codec"):
        pipeline.sample(["0"])


def test_latents_are_no_images():
    config = Diffusion(
        with_fields(DiT(), size=(4, 4), channels=4, patch=2, width=16, depth=1, heads=2, condition=ClassEmbedder(3))
    )
    with pytest.raises(ConfigError, match="no codec"):
        Pipeline.place(config, fresh(config), None, None).sample(["0"])


@pytest.mark.parametrize(
    "name",
    models_that_draw(
        lambda c: c.capabilities.guidance and not c.capabilities.super_resolution and path_of(c, "condition_dropout")
    ),
)
def test_no_guidance_by_a_branch_that_was_never_learned(name):
    """Without dropped conditions in training, a sampler leaves the unconditional branch out unless it is asked for."""
    config = with_fields(FAMILIES[name], condition_dropout=0.0)
    batch = batch_for(config, 2)
    condition = {k: v for k, v in batch.items() if k in config.condition_spec()}
    keys = jax.random.split(jax.random.key(1), 2)

    def program(**more):
        sample = lambda m, c, k: config.sample(m, c, k, config.options(), **more)
        return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(sample)(abstract(config), condition, keys)))

    assert program() == program(guided=False) != program(guided=True)


def sampling(name, steps=3):
    """Arguments of `sample` of a family, with few steps."""
    config = FAMILIES[name]
    condition = {k: v for k, v in batch_for(config, 2).items() if k in config.condition_spec()}
    if config.capabilities.super_resolution:
        condition["low_res"] = np.zeros((2, 2, 2, 3), np.float32)
    options = config.options()
    few = {f.name: steps for f in dataclasses.fields(options) if f.name in ("steps", "iterations")}
    return condition, jax.random.split(jax.random.key(1), 2), dataclasses.replace(options, **few)


@pytest.mark.parametrize("name", models_that_draw(lambda c: c.capabilities.inpaint))
def test_known_tokens_stay_and_progress_counts_steps_to_the_end(name):
    config, spec, seen = FAMILIES[name], FAMILIES[name].sample_spec(), []
    (rows, columns), rng = spec.tokens, np.random.default_rng(3)
    shape = (2, *spec.shape)
    known = jnp.asarray(rng.integers(0, 16, shape) if spec.code.is_discrete else rng.uniform(-1, 1, shape))
    known = known.astype(spec.code.dtype)
    keep = (np.arange(rows * columns) < np.asarray([[1], [3]])).reshape(2, rows, columns)
    model, kept = fresh(config), {"known": known, "keep": keep}
    with listening(lambda done, total, sample: seen.append((done, total, sample))) as progress:
        made = config.sample(model, *sampling(name), **kept, progress=progress, guided=False)
    of_codes = np.repeat(np.repeat(keep, spec.patch, 1), spec.patch, 2)
    np.testing.assert_allclose(np.asarray(made)[of_codes], np.asarray(known)[of_codes], atol=1e-5)
    seen = sorted(seen, key=lambda call: call[0])
    done, totals = [n for n, _, _ in seen], {total for _, total, _ in seen}
    assert done == sorted(set(done)) and done[0] >= 1 and totals == {done[-1]}
    assert all(sample.shape == shape and sample.dtype == made.dtype for _, _, sample in seen)
    np.testing.assert_allclose(seen[-1][2], made, atol=1e-5)
    if spec.code.is_discrete:  # one is -1 until it is drawn, and then stays, or is drawn again
        hidden = [int((sample < 0).sum()) for _, _, sample in seen]
        assert hidden == sorted(hidden, reverse=True) and hidden[-1] == 0


@pytest.mark.parametrize("name", models_that_draw(lambda c: c.capabilities.inpaint))
def test_what_is_known_is_checked_alike(name):
    config = FAMILIES[name]
    spec, prefix = config.sample_spec(), config.capabilities.inpaint_prefix
    known, keep = np.zeros((2, *spec.shape), spec.code.dtype), np.zeros((2, *spec.tokens), bool)
    last = keep.copy()
    last[:, -1, -1] = True
    wrong = [(None, keep, "go together"), (known[:1], keep, "known has"), (known, keep[:, :1], "keep has")]
    wrong += [(known, keep.astype(int), "keep has")] + [(known, last, "cannot fill holes")] * prefix
    for known, keep, says in wrong:
        with pytest.raises(ValueError, match=says):
            config.sample(abstract(config), *sampling(name), known=known, keep=keep)


@pytest.mark.parametrize("name", models_that_draw(lambda c: c.capabilities.unconditional))
def test_guidance_is_by_the_branch_that_was_learned(name):
    config = FAMILIES[name]

    def program(**more):
        sample = lambda *arguments: config.sample(*arguments, **more)
        *arguments, options = sampling(name)
        made = jax.make_jaxpr(sample)(abstract(config), *arguments, options.arrays())
        return re.sub("0x[0-9a-f]+", "", str(made))

    assert program() == program(guided=True) != program(guided=False)
