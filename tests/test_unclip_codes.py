"""unCLIP whose prior draws codes of principal components one by one: the codes, the prior's law, and what it reads."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.codecs.principal import Moments, PrincipalCodes
from t2i_jax.core import flops
from t2i_jax.core.config import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.params import abstract, rebuild
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.core.types import InTurn
from t2i_jax.data import ArrayRecord, Data, write_records
from t2i_jax.encode import encode_splits
from t2i_jax.models.unclip import UnCLIP
from t2i_jax.networks.condition import CrossAttnFeatures, Joined
from t2i_jax.networks.unclip import CaptionAndTokens, NoisedImageAndTokens, Similarity
from t2i_jax.noise.processes import Discrete
from t2i_jax.previews import Previews
from t2i_jax.sampling.options import UnCLIPSampler
from t2i_jax.text.clip import ClipCaption
from t2i_jax.training.loop import train
from t2i_jax.training.optimizer import Optimizer
from t2i_jax.training.state import create
from t2i_jax.training.step import make_step
from t2i_jax.training.trainer import Trainer
from tests.fixtures import toys
from tests.fixtures.clip_files import random_clip
from tests.fixtures.families import CODES_PRIOR, FAMILIES, NOISED_DECODER, batch_for, fresh

CONFIG = FAMILIES["unclip-codes"]


@pytest.mark.parametrize(("kept", "buckets"), [(6, 16), (3, 16), (3, 256)])
def test_a_round_trip_of_a_gaussian_loses_what_theory_says(kept, buckets):
    """The variance of the components that are left out, and of buckets D^2 / 12 of that of each kept one."""
    rng = np.random.default_rng(0)
    values = np.asarray([9.0, 4.0, 2.0, 1.0, 0.5, 0.25])
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    z = rng.normal(size=(40_000, 6)) * np.sqrt(values) @ basis.T + 5.0
    config = PrincipalCodes(kept, buckets)
    axes = config.init(6).fitted(Moments.of(np.split(z, 4)))
    np.testing.assert_allclose(axes.std[...] ** 2, values[:kept], rtol=0.03)
    np.testing.assert_allclose(np.abs(axes.axes[...].T @ basis[:, :kept]), np.eye(kept), atol=0.05)
    z = jnp.asarray(z, jnp.float32)
    codes = axes.encode(z)
    assert codes.dtype == jnp.int32 and codes.shape == (40_000, kept)
    assert (codes >= 0).all() and (codes < buckets).all()
    error = float(jnp.sum((z - axes.decode(codes)) ** 2, 1).mean())
    lost = values[kept:].sum() + values[:kept].sum() * config.width**2 / 12
    assert abs(error - lost) < 0.03 * lost
    far = axes.decode(axes.encode(jnp.full((1, 6), 1e6)))  # what lies beyond is in the outermost buckets
    assert np.isfinite(far).all()


def test_embeddings_that_vary_too_little_are_refused():
    z = np.ones((10, 4)) * np.arange(10)[:, None]
    with pytest.raises(ConfigError, match="vary in 1 directions only"):
        PrincipalCodes(2, 8).init(4).fitted(Moments.of([z]))
    with pytest.raises(ConfigError, match="kept 5: embeddings have 4 numbers"):
        PrincipalCodes(5, 8).init(4)


def joint(n, seed=0):
    """A caption, 0 or 1, and an embedding that it makes likely: one of two, at odds of 3 to 1 or 1 to 3."""
    rng = np.random.default_rng(seed)
    caption, odd = rng.integers(0, 2, n), rng.uniform(size=n) < 0.25
    z = np.asarray([[3, 0, 1, 0, 0], [-3, 2, -1, 0, 0]], np.float32)[np.where(odd, 1 - caption, caption)]
    z = z + rng.normal(0, 0.1, z.shape).astype(np.float32)
    features = np.zeros((n, *CONFIG.condition_spec()["features"].shape), np.float32)
    features[:, :7, :2] = np.eye(2, dtype=np.float32)[caption][:, None]
    batch = {"features": features, "text_mask": np.ones((n, 6), bool), "image_features": z}
    return caption, batch | {"image": np.zeros((n, 4, 4, 3), np.float32)}


def test_a_prior_that_learned_a_joint_law_draws_from_it():
    condition = CONFIG.prior.conditioning.what.parts[0]
    prior = with_fields(CODES_PRIOR, token_dropout=0.0, dropout=0.0, condition=condition)
    config = replace(CONFIG, prior=prior)
    model = config.fitted(fresh(config), [joint(4096)[1]])
    objectives = {"prior": config.objectives()["prior"]}
    optimizers = {"prior": Optimizer(learning_rate=1e-2, warmup=10).build(300)}
    begin = lambda model: create(lambda _: model, objectives, optimizers, jax.random.key(0))
    state = jax.jit(begin)(model)
    step = jax.jit(make_step(abstract(config), objectives, optimizers))
    for n in range(300):
        state, metrics = step(state, {}, joint(64, n + 1)[1])
    model = rebuild(abstract(config), {**state.params, **state.carried})
    caption, batch = joint(1024, 1000)
    condition = {k: jnp.asarray(v) for k, v in batch.items() if k in ("features", "text_mask")}
    options = UnCLIPSampler(prior_guidance=1.0)
    draw = jax.jit(lambda m, c: config.embeddings(m, c, jax.random.split(jax.random.key(0), 1024), options.arrays()))
    z = np.asarray(draw(model, condition))
    second = z[:, 1] > 1
    for kind, share in ((0, 0.25), (1, 0.75)):
        assert abs(second[caption == kind].mean() - share) < 0.07
    codes = [np.asarray(model.axes.encode(jnp.asarray(x))) for x in (z, batch["image_features"])]
    for drawn, true in zip(codes[0].T, codes[1].T, strict=True):
        drawn, true = (np.bincount(x, minlength=8) / 1024 for x in (drawn, true))
        assert np.abs(drawn - true).sum() / 2 < 0.1
    assert float(metrics["loss"]) < np.log(8)


def test_buckets_of_similarity_are_equally_likely_and_the_upper_ones_are_drawn(monkeypatch):
    rng, n = np.random.default_rng(0), 4096
    _, batch = joint(n)
    batch |= {"image_features": rng.normal(size=(n, 5)).astype(np.float32)}
    batch["features"][:, 0, :5] = [3.0, 4.0, 0.0, 0.0, 0.0]
    model = CONFIG.fitted(fresh(CONFIG), [batch])
    mean, std = np.asarray(model.similarity[...])
    assert abs(mean) < 0.3 and abs(std - 5) < 0.3
    product = jnp.asarray(batch["image_features"] @ batch["features"][0, 0, :5])
    buckets = np.asarray(model.bucket_of(product, CONFIG.similarities))
    assert np.abs(np.bincount(buckets, minlength=8) / n - 1 / 8).max() < 0.02
    assert (np.diff(buckets[np.argsort(product)]) >= 0).all()

    seen = []
    kept = lambda self, model, condition, keys, options: (
        seen.append(condition["similarity"]) or jnp.zeros((len(keys), 1, 3), jnp.int32)
    )
    monkeypatch.setattr(type(CODES_PRIOR), "sample", kept)
    condition = {k: jnp.asarray(batch[k][:512]) for k in ("features", "text_mask")}
    for least in (0.5, 0.0):
        CONFIG.embeddings(
            model, condition, jax.random.split(jax.random.key(1), 512), UnCLIPSampler(prior_similarity=least)
        )
        drawn = np.bincount(np.asarray(seen[-1]), minlength=8) / 512
        assert (drawn[: int(8 * least)] == 0).all() and np.abs(
            drawn[int(8 * least) :] - 0.125 / (1 - least)
        ).max() < 0.1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"prior: draws 8 codes on a grid of \(1, 3\); the decoder needs 16 codes"):
        replace(CONFIG, codes=PrincipalCodes(3, 16))
    with pytest.raises(ConfigError, match="prior: draws 8 codes"):
        replace(CONFIG, codes=None)
    with pytest.raises(ConfigError, match="fit_examples 0"):
        replace(CONFIG, fit_examples=0)
    with pytest.raises(ConfigError, match="there is none"):
        UnCLIP(None, NOISED_DECODER, candidates=2)
    with pytest.raises(ValueError, match="prior_steps 7: this prior draws its codes one by one"):
        CONFIG.check(UnCLIPSampler(prior_steps=7))
    with pytest.raises(ValueError, match="prior_similarity 0.2: this prior does not read"):
        FAMILIES["unclip"].check(UnCLIPSampler(prior_similarity=0.2))
    alone, batch = FAMILIES["unclip-images"], batch_for(FAMILIES["unclip-images"])
    condition = {k: v for k, v in batch.items() if k != "image_features"}
    with pytest.raises(ConfigError, match="no prior, which draws embeddings"):
        alone.sample(fresh(alone), condition, jax.random.split(jax.random.key(0), 4))


def test_loops_of_both_parts_count_as_often_as_they_run():
    config = FAMILIES["unclip"]
    batch, model = batch_for(config), abstract(config)
    condition, keys = (
        {k: batch[k] for k in config.condition_spec() if k in batch},
        jax.random.split(jax.random.key(0), 4),
    )

    def work(steps, prior_steps):
        options = UnCLIPSampler(steps, prior_steps=prior_steps)
        trips = config.loop_trips(options)
        assert trips == InTurn((prior_steps, steps))
        return flops.count(lambda m: config.sample(m, condition, keys, options), model, trips=trips)

    prior, decoder = work(2, 4) - work(2, 3), work(3, 3) - work(2, 3)
    assert 0 < prior < decoder
    np.testing.assert_allclose(work(20, 30), work(2, 3) + 27 * prior + 18 * decoder)
    codes = FAMILIES["unclip-codes"]
    assert codes.loop_trips(UnCLIPSampler(steps=9)) == 9


def test_training_begins_with_the_axes_of_its_embeddings_computed_or_stored(tmp_path):
    rng = np.random.default_rng(0)
    image = lambda: rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    records = [{"key": str(n), "image": image(), "captions": ["a cat"], "split": "train"} for n in range(16)]
    write_records(tmp_path / "data", records)
    text, read = ClipCaption(random_clip(tmp_path, 16)), CrossAttnFeatures(16, 9)
    what = NoisedImageAndTokens(read, 16, 16, Discrete("cosine", 20))
    network = with_fields(NOISED_DECODER.network, condition=what)
    prior = with_fields(CODES_PRIOR, condition=Joined((CaptionAndTokens(read), Similarity(8))))
    config = replace(CONFIG, prior=prior, decoder=replace(NOISED_DECODER, network=network), fit_examples=16)
    data = Data(ArrayRecord(str(tmp_path / "data")), image_size=4, batch_size=8)
    experiment = replace(toys.experiment(config, data, MeshConfig(1, 1, 1), steps=2), text=text)
    state = Trainer(experiment, tmp_path / "run").start()
    encode_splits(experiment, tmp_path / "codes", ["train"], 8)
    reader = ArrayRecord(str(tmp_path / "codes")).open()
    z = np.stack([reader[n]["image_features"] for n in range(len(reader))])
    assert z.shape == (16, 16) and reader[0]["features"].shape == (1, 9, 16)
    np.testing.assert_allclose(state.carried["axes.mean"], z.mean(0), atol=1e-4)
    axes, std = np.asarray(state.carried["axes.axes"]), np.asarray(state.carried["axes.std"])
    np.testing.assert_allclose(np.cov(z.T, bias=True) @ axes, axes * std**2, atol=1e-3 * std.max() ** 2)

    stored = replace(experiment, data=replace(data, source=ArrayRecord(str(tmp_path / "codes"))))
    again = Trainer(stored, tmp_path / "other").start()
    np.testing.assert_allclose(again.carried["axes.std"], std, rtol=1e-3)
    assert float(again.carried["similarity"][1]) > 0
    train(stored, tmp_path / "run")

    images = replace(experiment, model=UnCLIP(None, config.decoder), data=replace(data, held_out=data.source))
    images = replace(images, train=replace(images.train, steps=1, preview_every=1, previews=2))
    train(images, tmp_path / "images", Previews())  # drawn for embeddings of the held-out images
    assert (tmp_path / "images" / "samples" / "0000001.png").is_file()


def test_guidance_of_the_prior_may_be_one_number_per_image():
    config, batch = replace(CONFIG, candidates=3), batch_for(CONFIG)
    condition = {k: v for k, v in batch.items() if k in config.condition_spec()}
    draw = lambda model, scale: config.embeddings(
        model, condition, jax.random.split(jax.random.key(0), 4), UnCLIPSampler(prior_guidance=scale)
    )
    assert jax.eval_shape(draw, abstract(config), jnp.arange(4.0)).shape == (4, 5)
