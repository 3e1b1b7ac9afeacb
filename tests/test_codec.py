"""The VQGAN codec: shapes, quantisation, objectives, and what each of them may touch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from einops import repeat

from t2i_jax.codecs.autoencoder import AutoencoderConfig, Decoder, Encoder
from t2i_jax.codecs.discriminator import DiscriminatorConfig, StyleDiscriminatorConfig
from t2i_jax.codecs.quantize import GumbelConfig, Quantizer, QuantizerConfig, nearest, usage
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.core import flops
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.params import named
from t2i_jax.core.sharding import MeshConfig, batch_sharding
from t2i_jax.nn.conv import Upsample, patchify, unpatchify
from t2i_jax.nn.layers import ModelState, replace
from t2i_jax.training.state import create
from t2i_jax.training.step import make_step
from tests.fixtures.families import losses_of

KEY = jax.random.key(0)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiled to run once
SMALL = AutoencoderConfig(channels=4, multipliers=(1, 2), blocks=1, decoder_blocks=1, latent=4, groups=2)
CODEC = VQGAN(
    dataclasses.replace(SMALL, attention=()),
    QuantizerConfig(codes=16, dim=4),
    perceptual=0.0,
    adversarial=0.8,
    adaptive=True,
    start=3,
    discriminator=DiscriminatorConfig(width=4, layers=1),
)
BATCH = {"image": jax.random.uniform(KEY, (2, 8, 8, 3), minval=-1)}


def test_upsampling_in_phases_is_doubling_then_convolving():
    up = Upsample(3, KEY)
    up = replace(up, conv=replace(up.conv, b=jnp.arange(3.0)))
    x = jax.random.normal(KEY, (2, 4, 5, 3))
    np.testing.assert_allclose(up(x), up.conv(repeat(x, "b i j c -> b (i p) (j q) c", p=2, q=2)), atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        dataclasses.replace(SMALL, patch=2, attention=(), middle_attention=False, decoder_blocks=1),
        dataclasses.replace(SMALL, moments=True, attention=(0, -1), decoder_attention=(), multipliers=(1, 2, 2)),
    ],
)
def test_encoder_and_decoder_shapes(config):
    x = jnp.zeros((1, 16, 24, 3))
    z = jax.eval_shape(lambda k: Encoder(config, k)(x), KEY)
    assert z.shape == (1, 16 // config.factor, 24 // config.factor, 8 if config.moments else 4)
    z = jnp.zeros((*z.shape[:-1], 4))
    assert jax.eval_shape(lambda k: Decoder(config, k)(z), KEY).shape == x.shape


def test_an_attention_level_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"levels \(3,\).*0 to 1"):
        Encoder(dataclasses.replace(SMALL, attention=(3,)), KEY)


def test_patches_go_back():
    x = jax.random.normal(KEY, (2, 6, 4, 3))
    assert patchify(x, 2).shape == (2, 3, 2, 12)
    assert (unpatchify(patchify(x, 2), 2) == x).all()


@pytest.fixture(scope="module")
def model():
    return jit(CODEC.init)(KEY)


def test_codes_and_images(model):
    codes = jit(CODEC.encode)(model, BATCH["image"])
    assert codes.shape == (2, 4, 4) and codes.dtype == jnp.int32
    assert codes.min() >= 0 and codes.max() < CODEC.vocabulary
    images = jit(CODEC.decode)(model, codes)
    assert images.shape == BATCH["image"].shape and CODEC.factor == 2
    assert CODEC.embed(model, codes).shape == (2, 4, 4, 4)
    np.testing.assert_allclose(jnp.linalg.norm(CODEC.embed(model, codes), axis=-1), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="multiples of 2"):
        CODEC.encode(model, jnp.zeros((1, 7, 8, 3)))


def test_codes_may_be_the_vectors_that_are_quantised_in_decoding(model):
    """The latents of a diffusion over a VQGAN."""
    vectors = dataclasses.replace(CODEC, continuous=True)
    codes = jit(vectors.encode)(model, BATCH["image"])
    assert codes.dtype == jnp.float32 and codes.shape[1:] == (4, 4, *vectors.spec.code.shape)
    whole = jit(CODEC.decode)(model, jit(CODEC.encode)(model, BATCH["image"]))
    np.testing.assert_allclose(jit(vectors.decode)(model, codes), whole, atol=1e-5)


def test_a_discriminator_of_one_size_names_it():
    with pytest.raises(ConfigError, match="reads 8 x 8 pixels"):
        StyleDiscriminatorConfig((4, 4)).init(KEY)(jnp.zeros((1, 16, 16, 3)))
    with pytest.raises(ConfigError, match="at least that of 4 x 4"):
        StyleDiscriminatorConfig(())


@pytest.mark.parametrize(("v", "chunk"), [(5, 1024), (37, 8), (16, 8)])
def test_nearest_is_brute_force(v, chunk):
    z, rows = jax.random.normal(KEY, (50, 3)), jax.random.normal(jax.random.key(1), (v, 3))
    brute = jnp.argmin(jnp.sum((z[:, None] - rows) ** 2, -1), -1)
    assert (nearest(z, rows, chunk) == brute).all()


def test_equal_rows_give_the_lowest_index():
    assert (nearest(jnp.ones((3, 2)), jnp.ones((20, 2)), chunk=4) == 0).all()


def test_straight_through():
    q = Quantizer(QuantizerConfig(codes=8, dim=3, normalize=False), KEY)
    z, pull = jax.random.normal(KEY, (5, 3)), jax.random.normal(jax.random.key(2), (5, 3))
    vectors = lambda z: q(z)[0]
    np.testing.assert_allclose(vectors(z), q.vectors(q.codes(z)), atol=1e-6)
    np.testing.assert_allclose(jax.vjp(vectors, z)[1](pull)[0], pull)
    # The two halves of the loss pull the one at the other, each with its weight.
    e = q.vectors(q.codes(z))
    np.testing.assert_allclose(jax.grad(lambda z: q(z)[2])(z), 0.25 * 2 * (z - e) / z.size, rtol=1e-5)
    rows = jax.grad(lambda q: q(z)[2])(q).codebook[...]
    np.testing.assert_allclose(rows, jnp.zeros((8, 3)).at[q.codes(z)].add(2 * (e - z) / z.size), rtol=1e-4, atol=1e-7)


def test_moving_averages_by_hand():
    q = Quantizer(QuantizerConfig(codes=2, dim=1, normalize=False, decay=0.75), KEY)
    q = replace(q, codebook=jnp.array([[0.0], [10.0]]), sizes=jnp.array([4.0, 2.0]))
    z = jnp.array([[1.0], [2.0], [3.0]])
    after = q.ema_update(z, q.codes(z), KEY)
    np.testing.assert_allclose(after.sizes[...], [0.75 * 4 + 0.25 * 3, 0.75 * 2])
    np.testing.assert_allclose(after.codebook[...], [[0.25 * 6 / 3.75], [10.0]])
    assert isinstance(q.codebook, ModelState) and isinstance(after.codebook, ModelState)
    assert not jnp.any(jax.grad(lambda q: q(z)[2])(q).codebook[...])  # with a decay it follows no gradient


def test_dead_rows_restart_at_vectors_of_the_batch():
    q = Quantizer(QuantizerConfig(codes=4, dim=2, normalize=False, decay=0.5, revive=0.1), KEY)
    rows = jnp.array([[0.0, 0.0], [9.0, 9.0], [50.0, 0.0], [0.0, 50.0]])
    q = replace(q, codebook=rows, sizes=jnp.array([4.0, 4.0, 0.0, 0.1]))
    z = jax.random.normal(KEY, (16, 2))
    after = q.ema_update(z, q.codes(z), KEY)
    moved = after.codebook[...]
    assert (moved[1] == rows[1]).all()  # alive, though this batch left it out
    for dead in (2, 3):
        assert (moved[dead] == z).all(-1).any()
        assert after.sizes[dead] == 16 / 4
    assert not (q.ema_update(z, q.codes(z), jax.random.key(9)).codebook[...] == moved).all()  # drawn with the key
    far = replace(q, codebook=rows + 100, sizes=jnp.zeros(4))  # a codebook that all vectors miss
    assert len(jnp.unique(far.codes(z))) == 1 and len(jnp.unique(far.ema_update(z, far.codes(z), KEY).codes(z))) > 1


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_a_row_without_vectors_keeps_its_value(normalize, decay):
    """For longer than its cluster size has a number in fp32."""
    q = Quantizer(QuantizerConfig(codes=6, dim=2, normalize=normalize, decay=decay), KEY)
    every = jax.random.normal(KEY, (6, 2))
    q = q.ema_update(every, q.codes(every), KEY)
    first = jnp.broadcast_to(q.rows()[2], (8, 2))  # from now on everything falls on one row
    step = lambda q, key: (q.ema_update(first, q.codes(first), key), q.codes(first))
    after, codes = jit(lambda q, keys: jax.lax.scan(step, q, keys))(q, jax.random.split(KEY, 12_000))
    unused = np.setdiff1d(np.arange(6), codes)
    assert len(unused) >= 4 and (after.sizes[...][unused] == 0).any()
    np.testing.assert_array_equal(after.codebook[...][unused], q.codebook[...][unused])
    np.testing.assert_allclose(after.rows()[codes[-1]], first, rtol=1e-5)


def clusters(key, count, centres=64):
    """Vectors about 64 points that all lie far from 0, as an encoder may give at first."""
    which, noise = jax.random.split(key)
    points = 3 + 0.2 * jax.random.normal(jax.random.key(7), (centres, 4))
    return points[jax.random.randint(which, (count,), 0, centres)] + 0.01 * jax.random.normal(noise, (count, 4))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("count", [32, 64, 1000])
def test_a_fresh_codebook_starts_from_the_first_batch(normalize, count):
    config = QuantizerConfig(codes=64, dim=4, normalize=normalize, decay=0.9)
    start = Quantizer(config, KEY)
    z = clusters(KEY, count)
    move = jit(lambda q, z, key: q.ema_update(z, q.codes(z), key))
    q = move(start, z, KEY)
    rows, known = np.asarray(q.codebook[...]), np.asarray(q.prepare(z))
    distance = np.linalg.norm(rows[:, None] - known, axis=-1).min(1)
    assert (distance < 1e-6).all() if count >= 64 else (distance < 0.1 * known.std()).all()
    assert len(np.unique(rows, axis=0)) == 64 and (q.sizes[...] == count / 64).all()
    again = (move(q, z, key).codebook[...] for key in jax.random.split(KEY))
    np.testing.assert_array_equal(*again)  # it starts once: nothing is drawn after that

    def used(q):
        for n in range(30):
            q = move(q, clusters(jax.random.key(n), count), jax.random.key(n))
        return usage(q.codes(clusters(jax.random.key(99), 4000)), 64)["perplexity"]

    assert used(q) > 2 * used(replace(start, sizes=jnp.full(64, 1e-9)))  # that is, from the random rows


def test_a_codebook_starts_from_the_first_part_of_a_batch_that_is_accumulated():
    q = Quantizer(QuantizerConfig(codes=8, dim=2, decay=0.9), KEY)
    parts, keys = jax.random.normal(KEY, (3, 16, 2)), jax.random.split(KEY, 3)
    move = lambda q, part: q.ema_update(part[0], q.codes(part[0]), part[1])
    scanned = jit(lambda q: jax.lax.scan(lambda q, part: (move(q, part), None), q, (parts, keys))[0])(q)
    for part in zip(parts, keys, strict=True):
        q = move(q, part)
    np.testing.assert_allclose(scanned.codebook[...], q.codebook[...], rtol=1e-5, atol=1e-6)
    assert jnp.isclose(q.sizes[...].sum(), 16)


def test_statistics_are_those_of_the_whole_batch():
    """At the start, from fewer vectors than rows too, and after it."""
    mesh = MeshConfig(data=8).build()
    z = jax.random.normal(KEY, (16, 4, 2))
    for codes in (8, 100):
        q = Quantizer(QuantizerConfig(codes=codes, dim=2, decay=0.9, revive=0.5), KEY)
        move = jax.jit(lambda q, z: q.ema_update(z, q.codes(z), KEY))
        whole = [move(q, z), move(move(q, z), z[::-1])]
        with jax.set_mesh(mesh):
            first = move(q, jax.device_put(z, batch_sharding(mesh)))
            parts = [first, move(first, jax.device_put(z[::-1], batch_sharding(mesh)))]
        for one, other in zip(whole, parts, strict=True):
            for name, v in named(one).items():
                np.testing.assert_allclose(v[...], named(other)[name][...], rtol=1e-5, atol=1e-6, err_msg=name)


def test_usage():
    even = usage(jnp.arange(8).reshape(2, 4), 8)
    assert even["usage"] == 1 and np.isclose(even["perplexity"], 8)
    one = usage(jnp.zeros((2, 4), int), 8)
    assert np.isclose(one["usage"], 1 / 8) and np.isclose(one["perplexity"], 1)


def test_entropy_term_favours_sure_and_even_choices():
    q = Quantizer(QuantizerConfig(codes=2, dim=2, normalize=False, temperature=0.1), KEY)
    q = replace(q, codebook=jnp.array([[1.0, 0.0], [-1.0, 0.0]]))
    even, one = jnp.array([[1.0, 0.0], [-1.0, 0.0]]), jnp.array([[1.0, 0.0], [1.0, 0.0]])
    assert q.entropy(even) < q.entropy(one) and q.entropy(even) < q.entropy(jnp.zeros((2, 2)))
    np.testing.assert_allclose(q.entropy(even), -np.log(2), rtol=1e-4)


@functools.cache
def gradient(codec, objective):
    return jit(jax.grad(lambda model, step: losses_of(codec, model, BATCH, KEY, step)[objective].loss))


def gradients(codec, model, objective, step):
    return gradient(codec, objective)(model, jnp.asarray(step))


def test_objectives_train_all_and_nothing_twice(model):
    trained = [name for objective in CODEC.objectives().values() for name in objective.params]
    assert sorted(trained) == sorted({name.split(".")[0] for name in named(model)})
    alone = dataclasses.replace(CODEC, adversarial=0.0)
    assert list(alone.objectives()) == ["generator"]
    assert all(n.startswith("autoencoder.") for n in named(jax.eval_shape(alone.init, KEY)))


def test_the_discriminator_pulls_at_nothing_of_the_autoencoder(model):
    grads = gradients(CODEC, model, "discriminator", 5)
    assert not any(jnp.any(x) for x in jax.tree.leaves(grads.autoencoder))
    assert all(jnp.any(x) for x in jax.tree.leaves(grads.discriminator.stem))


def test_before_its_start_the_adversary_is_not_heard_at_all(model):
    early, late = gradients(CODEC, model, "generator", 2), gradients(CODEC, model, "generator", 3)
    never = dataclasses.replace(CODEC, adversarial=0.0)
    without = gradients(never, model, "generator", 2)
    for name, v in named(without.autoencoder).items():
        np.testing.assert_array_equal(v[...], named(early.autoencoder)[name][...], err_msg=name)
    assert any(jnp.any(a != b) for a, b in zip(jax.tree.leaves(early), jax.tree.leaves(late), strict=True))
    assert not any(jnp.any(x) for x in jax.tree.leaves(gradients(CODEC, model, "discriminator", 2)))


def test_losses_return_what_moved(model):
    codec = dataclasses.replace(CODEC, quantizer=QuantizerConfig(codes=16, dim=4, decay=0.9, revive=0.1))
    model = jit(codec.init)(KEY)
    losses = jit(lambda m, step: list(losses_of(codec, m, BATCH, KEY, step).values()))
    (_, metrics, after), (_, judged, judge) = losses(model, jnp.asarray(4))
    changed = lambda m: {k for k, v in named(m).items() if jnp.any(v[...] != named(model)[k][...])}
    assert changed(after) == {"autoencoder.quantizer.codebook", "autoencoder.quantizer.sizes"}
    assert changed(judge) == {"discriminator.norms.0.mean", "discriminator.norms.0.var"}
    assert {"l2", "psnr", "usage", "perplexity", "commitment", "adversarial", "adversarial_weight"} <= set(metrics)
    assert set(judged) == {"real", "fake"}
    assert all(v.shape == () for v in (metrics | judged).values())


def test_encoder_and_decoder_run_once_in_a_step(model):
    """A step takes what the generator's alone does, and what the discriminator's gradient does at images given."""

    def step_flops(objectives):
        optimizers = {name: optax.sgd(1.0) for name in objectives}
        state = jax.eval_shape(lambda key: create(CODEC.init, objectives, optimizers, key), KEY)
        return flops.count(make_step(model, objectives, optimizers, forward=CODEC.forward), state, {}, BATCH)

    objectives = CODEC.objectives()
    forward = lambda m: CODEC.forward(m, BATCH, KEY, 5)

    def judged(judge, outputs):
        whole = replace(model, discriminator=judge)
        return objectives["discriminator"].loss(whole, BATCH | {"outputs": outputs}, KEY, 5, True).loss

    alone = flops.count(jax.grad(judged), model.discriminator, jax.eval_shape(forward, model))
    assert step_flops(objectives) == step_flops({"generator": objectives["generator"]}) + alone
    assert flops.count(forward, model) > 0 < alone


def test_a_perceptual_loss_asks_for_its_network(model):
    with pytest.raises(ValueError, match="frozen"):
        jax.eval_shape(lambda m: losses_of(dataclasses.replace(CODEC, perceptual=1.0), m, BATCH, KEY, 0), model)


def test_bfloat16_keeps_losses_in_float32(model):
    codec = dataclasses.replace(CODEC, dtype="bfloat16")
    numbers = jax.eval_shape(lambda m: losses_of(codec, m, BATCH, KEY, 5)["generator"], model)
    assert all(v.dtype == jnp.float32 for v in (numbers.loss, *numbers.metrics.values()))
    assert jax.eval_shape(lambda m, x: codec.decode(m, codec.encode(m, x)), model, BATCH["image"]).dtype == jnp.float32


def test_gumbel_chooses_a_row_forwards_and_a_mixture_backwards():
    config = GumbelConfig(codes=5, dim=3, temperature=0.5, temperature_end=0.1, temperature_steps=100)
    q, z = config.init(KEY), jax.random.normal(KEY, (4, 2, 3))
    noise = jax.random.gumbel(KEY, (4, 2, 5))
    weights = q.choice(q.logits(z), noise, 0.5)
    np.testing.assert_allclose(weights, jax.nn.one_hot((q.logits(z) + noise).argmax(-1), 5), atol=1e-6)
    target = jnp.arange(5.0)
    hard = jax.grad(lambda l: (q.choice(l, noise, 0.5) @ target).sum())(q.logits(z))
    soft = jax.grad(lambda l: (jax.nn.softmax((l + noise) / 0.5) @ target).sum())(q.logits(z))
    np.testing.assert_allclose(hard, soft, atol=1e-6)
    np.testing.assert_array_equal(q.codes(z), q.logits(z).argmax(-1))
    np.testing.assert_allclose(
        [config.temperature_at(step) for step in (0, 50, 100, 999)], [0.5, 0.3, 0.1, 0.1], rtol=1e-5
    )
    assert abs(q.divergence(jnp.zeros((2, 5)))) < 1e-6  # an even choice is no distance from an even one
    codec = VQGAN(AutoencoderConfig(8, (1, 2), 1, latent=4, groups=4), config, perceptual=0.0, adversarial=0.0)
    model = jax.eval_shape(codec.init, KEY)
    images = {"image": jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)}
    loss, metrics, _ = jax.eval_shape(lambda m, b: losses_of(codec, m, b, KEY, 7)["generator"], model, images)
    assert loss.shape == () and {"kl", "temperature", "usage"} <= metrics.keys()
