"""The discrete VAE: its codes, its densities, its loss; and a stream trained on its codes from one config."""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.codecs import losses
from t2i_jax.codecs.dvae import DVAE, DALLEPytorchVAE, OpenAIdVAE
from t2i_jax.core.family import with_fields
from t2i_jax.data import ArrayRecord, Data
from t2i_jax.data.glyphs import build_glyphs
from t2i_jax.models.stream import Stream, StreamText
from t2i_jax.pipeline import Pipeline
from t2i_jax.text.sentencepiece import SentencePiece, train_vocabulary
from t2i_jax.training import records
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.loop import train
from t2i_jax.training.optimizer import Optimizer

POOLED = DVAE(12, OpenAIdVAE(channels=8, groups=2, blocks=1, code=4), kl=0.1)
STRIDED = DVAE(12, DALLEPytorchVAE(channels=8, layers=2, blocks=1, code=4), pixels="l2", temperature=0.9, anneal=0)
BOTH = {"pooled": POOLED, "strided": STRIDED}
encode = jax.jit(DVAE.encode, static_argnums=0)
decode = jax.jit(DVAE.decode, static_argnums=0)
IMAGES = jax.random.uniform(jax.random.key(0), (2, 8, 12, 3), minval=-1)


@cache
def model_for(config):
    return jax.jit(config.init)(jax.random.key(0))


@pytest.mark.parametrize("config", BOTH.values(), ids=BOTH)
def test_images_become_codes_and_codes_images(config):
    model = model_for(config)
    codes = encode(config, model, IMAGES)
    assert codes.shape == (2, 8 // config.factor, 12 // config.factor) and codes.dtype == jnp.int32
    assert (codes >= 0).all() and (codes < config.vocabulary).all() and len(np.unique(codes)) > 1
    images = decode(config, model, codes)
    assert images.shape == IMAGES.shape and images.dtype == jnp.float32
    with pytest.raises(ValueError, match=f"multiples of {config.factor}"):
        config.encode(model, IMAGES[:, :7])


@pytest.mark.parametrize("config", BOTH.values(), ids=BOTH)
def test_a_cold_sample_is_the_code_and_a_hard_one_keeps_the_gradient(config):
    model = model_for(config)
    hard = dataclasses.replace(config, straight_through=True)
    gumbel = jax.random.gumbel(jax.random.key(1), (2, 8 // config.factor, 12 // config.factor, 12))

    @jax.jit
    def run(logits):
        cold = config.relaxed(model, logits, 0 * gumbel, 1e-5)
        whole = config.decode_head(model, config.embed(model, jnp.argmax(logits, -1)))
        drawn = config.decode_head(model, config.embed(model, jnp.argmax(logits + gumbel, -1)))
        slope = jax.grad(lambda x: hard.relaxed(model, x, gumbel, 0.5).sum())(logits)
        return cold, whole, hard.relaxed(model, logits, gumbel, 0.5), drawn, slope

    cold, whole, relaxed, drawn, slope = run(config.logits(model, IMAGES))
    np.testing.assert_allclose(cold, whole, atol=1e-4)
    np.testing.assert_allclose(relaxed, drawn, atol=1e-4)
    assert jnp.abs(slope).max() > 0


def test_the_laplace_density_has_mass_one_and_its_mode_is_the_image():
    x = jnp.linspace(1e-4, 1 - 1e-4, 20001)
    for place, scale in ((0.0, 0.5), (-1.0, 0.3)):
        nll = jax.vmap(lambda x: losses.logit_laplace(x, place, math.log(scale)))(x)  # noqa: B023
        np.testing.assert_allclose(jnp.trapezoid(jnp.exp(-nll), x), 1, atol=2e-3)
    mapped = POOLED.to_logit_space(IMAGES)
    assert mapped.min() >= 0.1 and mapped.max() <= 0.9
    place = jnp.log(mapped) - jnp.log1p(-mapped)
    np.testing.assert_allclose(POOLED.from_logit_space(jnp.concatenate([place, 0 * place], -1)), IMAGES, atol=1e-5)


def test_divergence_is_that_from_equal_codes():
    equal = jnp.zeros((2, 3, 3, 12))
    y = jnp.zeros((2, 8, 12, 3))
    assert abs(STRIDED.terms(IMAGES, y, equal)[1]) < 1e-5
    certain = 100.0 * jax.nn.one_hot(jnp.zeros((2, 3, 3), int), 12)
    np.testing.assert_allclose(STRIDED.terms(IMAGES, y, certain)[1], 9 * math.log(12), rtol=1e-5)


def test_temperature_and_weight_follow_the_step():
    config = dataclasses.replace(POOLED, temperature=1.0, last_temperature=0.25, anneal=100, kl=2.0, kl_warmup=10)
    at = [float(config.temperature_at(n)) for n in (0, 50, 100, 1000)]
    np.testing.assert_allclose(at, [1, 0.625, 0.25, 0.25], rtol=1e-5)
    model, batch = model_for(POOLED), {"image": IMAGES}
    loss = jax.jit(lambda step: config.loss(model, batch, jax.random.key(1), step))
    for step in (0, 5, 20):
        value, metrics, _ = loss(jnp.int32(step))
        weight = 2.0 * min(step / 10, 1)
        np.testing.assert_allclose(value, metrics["laplace"] + weight * metrics["kl"], rtol=1e-5)


def test_half_a_codec_says_what_it_lacks():
    half = dataclasses.replace(POOLED, half="decoder")
    model = model_for(half)
    assert decode(half, model, jnp.zeros((1, 2, 2), int)).shape == (1, 4, 4, 3)
    with pytest.raises(ValueError, match="no encoder"):
        half.encode(model, IMAGES)


@pytest.mark.slow
def test_codec_and_stream_train_on_captions_and_draw(tmp_path):
    build_glyphs(tmp_path / "glyphs", size=16, limit=30)
    data = Data(ArrayRecord(str(tmp_path / "glyphs")), image_size=16, batch_size=8)
    captions = [c for record in data.examples() for c in record["captions"]]
    train_vocabulary(captions, tmp_path / "words.model", size=300)
    settings = dict(optimizer=Optimizer(learning_rate=1e-3, warmup=2), log_every=1, save_every=4)
    settings |= dict(evaluate_every=0, preview_every=0)
    codec = dataclasses.replace(STRIDED, kl=0.01)
    train(Experiment(codec, data, Train(steps=2, **settings)), tmp_path / "codec")
    words = SentencePiece(str(tmp_path / "words.model"), length=8)
    text = StreamText(words.pieces, 8, start=True, unique_padding=True)
    stream = with_fields(
        Stream(),
        vocabulary=12,
        grid=(4, 4),
        condition=text,
        width=32,
        depth=2,
        heads=2,
        sandwich_norm=True,
        pb_relax=True,
    )
    experiment = Experiment(stream, data, Train(steps=4, **settings), codec=str(tmp_path / "codec"), text=words)
    train(experiment, tmp_path / "run")
    losses = [line["loss"] for line in records.read(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 4 and losses[-1] < losses[0]
    pipeline = Pipeline.load(tmp_path / "run")
    pictures = pipeline.sample(["red heart", "dog"], seeds=[1, 2])
    assert pictures.shape == (2, 16, 16, 3) and pictures.dtype == np.uint8
    np.testing.assert_array_equal(pipeline.sample(["dog"], seeds=[2])[0], pictures[1])
