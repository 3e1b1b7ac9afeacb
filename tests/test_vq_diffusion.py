"""Discrete diffusion over codes: its reverse has the right law, its history survives, its options never recompile."""

import dataclasses
import math
import re
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.convert import convert, find, restore, unwrapped
from t2i_jax.convert.discrete import FORMATS
from t2i_jax.core.family import with_fields
from t2i_jax.interop.vq_diffusion import codec_tensors, used_codes
from t2i_jax.models.vq_diffusion import VQDiffusion, guided_log, truncate_log_probs
from t2i_jax.networks.adaln_transformer import AdaNorm
from t2i_jax.networks.condition import CaptionEncoder, ClassEmbedder, CrossAttnFeatures
from t2i_jax.nn.layers import replace
from t2i_jax.nn.positions import AxialPositions
from t2i_jax.noise.discrete import LOWEST, Chain, importance, one_hot
from t2i_jax.sampling.discrete import reverse, timesteps
from t2i_jax.sampling.options import DiscreteSampler
from t2i_jax.sampling.progress import listening
from t2i_jax.training.state import create
from t2i_jax.training.step import make_step
from tests.fixtures.families import with_aux

TINY = with_fields(
    VQDiffusion(),
    chain=Chain(12, 8),
    grid=(2, 3),
    width=16,
    depth=2,
    heads=2,
    condition=CrossAttnFeatures(5, 4),
    condition_dropout=0.5,
)
TEXT = with_fields(TINY, condition=CaptionEncoder(20, 4, width=16, depth=1, heads=2), times="sinusoidal")
CLASS = with_fields(TINY, condition=ClassEmbedder(3), conv_mlp=True, positions=AxialPositions((4, 4)))
NOTHING = with_fields(TINY, condition=ClassEmbedder(0), condition_dropout=0.0, times="none")
ALL = {"features": TINY, "captions": TEXT, "classes": CLASS, "nothing": NOTHING}


@cache
def model_for(config):
    return jax.jit(config.init)(jax.random.key(0))


def batch_for(config, b=4):
    rng = np.random.default_rng(0)
    return {
        "codes": jnp.asarray(rng.integers(0, 12, (b, *config.grid))),
        "features": jnp.asarray(rng.normal(size=(b, 4, 5)), jnp.float32),
        "text": jnp.asarray(rng.integers(0, 20, (b, 4))),
        "text_mask": jnp.ones((b, 4), bool),
        "label": jnp.asarray(rng.integers(0, 3, b)),
    }


def keys_for(b=4, seed=5):
    return jax.random.split(jax.random.key(seed), b)


@pytest.mark.parametrize("fields", [{}, {"objective": "continuous", "chain": Chain(12, 8, kind="mask")}])
def test_logits_a_few_tokens_at_a_time_give_the_same_loss_and_gradients(fields):
    config = with_fields(NOTHING, **fields)
    chunked, batch, model = with_fields(config, loss_chunk=4), batch_for(config), model_for(config)

    def run(config):
        loss = lambda m: config.loss(m, batch, jax.random.key(1)).loss
        return jax.jit(jax.value_and_grad(loss, allow_int=True))(model)

    for a, b in zip(jax.tree.leaves(run(config)), jax.tree.leaves(run(chunked)), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    program = str(jax.make_jaxpr(lambda m: chunked.loss(m, batch, jax.random.key(1)).loss)(model))
    assert "f32[4,4,12]" in program and "f32[4,6,12]" not in program


# -- the reverse chain on one token whose law is known

P = np.array([0.5, 0.3, 0.15, 0.05])
COUNT = 20000


@cache
def toy(kind):
    """Draws with the true p(x_0 | x_t) of one token: any jumps of the chain must give back P."""
    chain = Chain(4, 12, kind, alpha_bar=(0.95, 0.001), gamma_bar=(0.02, 0.9 if kind == "mask and replace" else 0.999))

    @jax.jit
    def run(options):
        def guess(x, t, share):
            every = one_hot(jnp.arange(4), 5)[None]
            evidence = jnp.take_along_axis(chain.q_start(every, t[:1])[0].T, x, 0)  # q(x_t | x_0 = k), [x_t, k]
            log_p = jax.nn.log_softmax(jnp.log(jnp.asarray(P, jnp.float32)) + evidence)
            return jnp.concatenate([log_p, jnp.full((COUNT, 1), LOWEST)], -1)[:, None]

        def noise(i):
            key = jax.random.fold_in(jax.random.key(1), i)
            return jax.random.uniform(key, (COUNT, 1, 5)), jnp.full((COUNT, 1), 0.5)

        return reverse(chain, guess, chain.start(jax.random.key(0), (COUNT, 1)), noise, options)

    return run


@pytest.mark.parametrize("kind", ["mask and replace", "mask", "replace"])
@pytest.mark.parametrize("steps", [0, 1, 5, 20])
def test_any_number_of_steps_draws_the_law_of_the_data(kind, steps):
    x = np.asarray(toy(kind)(DiscreteSampler(steps=steps).arrays()))[:, 0]
    np.testing.assert_allclose(np.bincount(x, minlength=4) / COUNT, P, atol=0.012)


def test_visited_times_are_the_published_ones():
    def times(total, **options):
        count, moment = timesteps(total, DiscreteSampler(**options).arrays())
        count = int(count)
        rows = moment(jnp.arange(count))
        return [tuple(int(x) for x in row) for row in zip(*map(np.asarray, rows), strict=True)]

    assert times(4) == [(3, 3, 2), (2, 2, 1), (1, 1, 0), (0, 0, -1)]
    assert times(100, steps=25)[:2] == [(99, 99, 95), (95, 95, 91)]
    assert [t for t, *_ in times(25, stride=2)] == [*range(24, -1, -2)]
    assert [t for t, *_ in times(100, stride=4)][-2:] == [3, 0]
    assert times(25, stride=2)[0] == (24, 23, 22)
    assert times(100, stride=1) == times(100)
    assert times(4, steps=6)[-1] == (0, 0, -1)


# -- sampling


@cache
def guided_draw(config):
    return partial(config.sample, model_for(config), batch_for(config))


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_every_rule_and_number_of_steps_leaves_clean_codes(config):
    seen = set()
    for options in (
        DiscreteSampler(),
        DiscreteSampler(steps=1),
        DiscreteSampler(steps=20, rule=1),
        DiscreteSampler(steps=3, rule=2, purity=2.0),
    ):
        codes = np.asarray(guided_draw(config)(keys_for(), options))
        assert codes.shape == (4, 2, 3) and codes.dtype == np.int32
        assert codes.min() >= 0 and codes.max() < 12
        seen.add(codes.tobytes())
    assert len(seen) == 4


def test_the_same_seed_gives_the_same_picture_in_any_batch():
    codes = guided_draw(TINY)(keys_for())
    assert len({row.tobytes() for row in np.asarray(codes)}) == 4
    some = jnp.array([2, 0])
    two = TINY.sample(model_for(TINY), jax.tree.map(lambda x: x[some], batch_for(TINY)), keys_for()[some])
    np.testing.assert_array_equal(two, codes[some])


def test_one_compilation_for_all_settings(traces):
    for n in range(10):
        options = DiscreteSampler(
            guidance=n / 2,
            truncation=1 - n / 20,
            top_k=n,
            temperature=1 if n % 2 else 1.3,
            steps=(0, 4, 2, 1, 8, 20, 3, 5, 6, 7)[n],
            stride=n % 3,
            rule=n % 3,
            purity=n / 3,
        )
        keep = jnp.arange(24).reshape(4, 2, 3) % (n + 2) == 0
        known = batch_for(TINY)["codes"]
        TINY.sample(model_for(TINY), batch_for(TINY), keys_for(seed=n), options, known=known, keep=keep)
    assert traces["_sample"] <= 1  # none if another test has done it


def test_the_sampler_takes_three_random_numbers_a_token_and_step_however_many_codes():
    model, batch = model_for(TINY), batch_for(TINY)
    draw = lambda keys: TINY.sample(model, batch, keys, DiscreteSampler())
    found = re.findall(r"random_bits\[.*?shape=\((.*?)\)", str(jax.make_jaxpr(draw)(keys_for())), re.DOTALL)
    sizes = [math.prod(int(n) for n in shape.replace(" ", "").strip(",").split(",")) for shape in found if shape]
    assert sizes and max(sizes) == 2 * TINY.length  # what a token becomes; one more decides which tokens, by a rule


def test_kept_codes_stay_and_the_others_are_drawn_around_them():
    known = batch_for(TINY)["codes"][::-1]
    keep = jnp.asarray(np.random.default_rng(1).uniform(size=known.shape) < 0.5)
    for options in (DiscreteSampler(), DiscreteSampler(rule=2)):
        codes = guided_draw(TINY)(keys_for(), options, known=known, keep=keep)
        np.testing.assert_array_equal(np.where(keep, codes, 0), np.where(keep, known, 0))
        assert (np.asarray(codes) != np.asarray(known))[~np.asarray(keep)].any()


def test_without_guidance_half_the_rows_give_the_same_codes():
    plain = guided_draw(TINY)(keys_for(), DiscreteSampler(guidance=1.0))
    np.testing.assert_array_equal(guided_draw(TINY)(keys_for(), guided=False), plain)


def test_previews_come_after_every_step():
    seen = {}
    with listening(lambda i, total, guess: seen.setdefault(i, guess)) as progress:
        codes = guided_draw(TINY)(keys_for(), DiscreteSampler(steps=4, rule=1), progress=progress)
    assert sorted(seen) == [1, 2, 3, 4]
    np.testing.assert_array_equal(seen[4], codes)
    assert all(guess.max() < 12 for guess in seen.values())  # none is masked


def test_cuts_keep_the_first_code_past_the_rate_and_k_of_them():
    log_p = jnp.log(jnp.array([[[0.4, 0.3, 0.2, 0.1]]]))
    log_p = jnp.concatenate([log_p, jnp.full((1, 1, 1), LOWEST)], -1)
    kept = lambda **options: (np.asarray(truncate_log_probs(log_p, DiscreteSampler(**options)))[0, 0] > LOWEST).tolist()
    assert kept(truncation=0.5) == [True, True, False, False, False]
    assert kept(truncation=0.0) == [True, False, False, False, False]
    assert kept(top_k=3) == [True, True, True, False, False]
    assert kept()[:4] == [True] * 4
    cooled = np.exp(np.asarray(truncate_log_probs(log_p, DiscreteSampler(temperature=0.5))))[0, 0, :4]
    np.testing.assert_allclose(cooled, np.array([16, 9, 4, 1]) / 30, rtol=1e-5)


def test_guidance_is_normalised_and_nothing_at_one():
    rng = np.random.default_rng(0)
    with_mask = lambda p: jnp.concatenate([jnp.log(jnp.asarray(p)), jnp.full((2, 3, 1), LOWEST)], -1)
    log_p, log_null = (with_mask(rng.dirichlet(np.ones(4), (2, 3))) for _ in range(2))
    np.testing.assert_allclose(guided_log(log_p, log_null, 1.0), log_p, atol=1e-5)
    strong = np.asarray(guided_log(log_p, log_null, 3.0))
    np.testing.assert_allclose(np.exp(strong).sum(-1), 1, rtol=1e-5)
    slope = np.diff(strong[..., :4] - np.asarray(3 * log_p - 2 * log_null)[..., :4])
    np.testing.assert_allclose(slope, 0, atol=1e-4)


# -- training


@cache
def gradients(config):
    return jax.jit(jax.value_and_grad(with_aux(config.loss), has_aux=True))


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_loss_is_finite_and_moves_every_parameter(config):
    (loss, output), slopes = gradients(config)(model_for(config), batch_for(config), jax.random.key(1))
    assert np.isfinite(loss) and output.metrics["bits_per_token"] > 0
    flat, _ = jax.tree_util.tree_flatten_with_path(slopes)
    unmoved = {jax.tree_util.keystr(p) for p, g in flat if not np.asarray(g).any()}
    assert all("history" in name or "count" in name for name in unmoved), unmoved


def test_times_are_drawn_by_their_loss_once_all_were_seen():
    model = model_for(TINY)
    history = jnp.array([1.0, 400.0, 100.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    draws = jax.jit(lambda model: TINY.sample_times(model, 40000, jax.random.key(0)))
    for count, law in ((11.0, importance(history)), (10.0, jnp.full(8, 1 / 8))):
        t, p = draws(replace(model, history=history, count=jnp.full(8, 20.0).at[3].set(count)))
        np.testing.assert_allclose(np.bincount(t, minlength=8) / 40000, law, atol=0.01)
        np.testing.assert_allclose(p, law[t], rtol=1e-5)


def test_history_is_a_running_mean_of_squares_whatever_the_order_of_rows():
    model = replace(model_for(TINY), history=jnp.full(8, 2.0), count=jnp.full(8, 1.0))
    t, size, seen = jnp.array([3, 1, 3, 5]), jnp.array([1.0, 4.0, 3.0, 7.0]), jnp.array([True, True, True, False])
    after = TINY.remembered(model, t, size, seen)
    want = np.full(8, 2.0)
    want[[1, 3]] = 0.9 * 2 + 0.1 * np.array([16, (1 + 9) / 2])
    np.testing.assert_allclose(after.history[...], want, rtol=1e-6)
    np.testing.assert_array_equal(after.count[...], [1, 2, 1, 3, 1, 1, 1, 1])
    turned = TINY.remembered(model, t[::-1], size[::-1], seen[::-1])
    np.testing.assert_allclose(turned.history[...], after.history[...], rtol=1e-6)


def test_a_resumed_run_is_the_straight_one_with_its_history():
    optimizers = {"model": optax.adam(1e-3)}
    objectives = TINY.objectives()
    abstract = jax.eval_shape(TINY.init, jax.random.key(0))
    step = jax.jit(make_step(abstract, objectives, optimizers))
    start = create(TINY.init, objectives, optimizers, jax.random.key(0))
    batch = batch_for(TINY)
    middle = step(step(start, None, batch)[0], None, batch)[0]
    straight = step(middle, None, batch)[0]
    saved = {name: np.asarray(x) for name, x in middle.flat().items()}
    assert "carried/history" in saved and saved["carried/count"].sum() == 8
    resumed = step(start.unflat(saved), None, batch)[0]
    chex.assert_trees_all_equal(resumed, straight)


def test_dropped_rows_see_the_null_alone():
    model, batch = model_for(TINY), batch_for(TINY)
    x, t = batch["codes"].reshape(4, -1), jnp.arange(4)

    @jax.jit
    def logits(features, dropped):
        return model.logits(model(x, t, model.read(batch | {"features": features}, dropped)))

    dropped = jnp.array([True, False, True, False])
    one, two = logits(batch["features"], dropped), logits(batch["features"] + 1, dropped)
    same = np.isclose(one, two, atol=1e-6).all((1, 2))
    np.testing.assert_array_equal(same, dropped)
    embedded = model.read(batch | {"text_mask": jnp.zeros((4, 4), bool)}, jnp.zeros(4, bool))
    np.testing.assert_array_equal(embedded.context, np.broadcast_to(model.condition.null[...], (4, 4, 5)))


def test_the_mean_of_classes_stands_for_none():
    rows = lambda config: jax.eval_shape(config.init, jax.random.key(0)).blocks.mlp_norm.table.w.shape[1]
    assert rows(CLASS) == 4 and rows(dataclasses.replace(CLASS, mean_null=True)) == 3
    norm = AdaNorm(16, 3, jax.random.key(0))
    mean = jnp.repeat(norm.table.w[...].mean(0, keepdims=True), 3, 0)
    averaged = replace(norm, table=replace(norm.table, w=mean))
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    np.testing.assert_allclose(norm(x, jnp.array([3, 3])), averaged(x, jnp.array([0, 1])), rtol=1e-5, atol=1e-6)


def test_guidance_without_a_learned_null_asks_for_the_empty_caption():
    config = with_fields(TINY, condition=CrossAttnFeatures(5, 4, trained_null=False))
    with pytest.raises(ValueError, match="null_features"):
        config.sample(model_for(TINY), batch_for(config), keys_for())


# -- continuous time

CONTINUOUS = dataclasses.replace(TINY, chain=Chain(12, 8, "mask"), objective="continuous")


def test_the_continuous_bound_of_a_model_that_knows_nothing_is_the_entropy_of_codes():
    model, x0 = model_for(CONTINUOUS), jnp.zeros((4000, 6), jnp.int32)
    blank = jax.tree.map(jnp.zeros_like, model)
    embedded = blank.read(batch_for(CONTINUOUS, 4000), jnp.zeros(4000, bool))
    terms = jax.jit(CONTINUOUS.continuous)(blank, embedded, x0, jax.random.key(0))
    np.testing.assert_allclose(terms.loss.mean() / 6, np.log(12), rtol=0.05)


def test_the_bound_over_all_times_of_a_model_that_knows_nothing_is_the_entropy_of_codes():
    blank = jax.tree.map(jnp.zeros_like, model_for(CONTINUOUS))
    nats = -jax.jit(CONTINUOUS.log_likelihood)(blank, batch_for(CONTINUOUS, 2000)) / 6
    np.testing.assert_allclose(nats.mean(), np.log(12), rtol=0.03)


def test_the_continuous_objective_trains_and_samples():
    (loss, (_, _, model)), slopes = gradients(CONTINUOUS)(
        model_for(CONTINUOUS), batch_for(CONTINUOUS), jax.random.key(1)
    )
    assert np.isfinite(loss) and model.history is None
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(slopes))
    codes = np.asarray(guided_draw(CONTINUOUS)(keys_for(), DiscreteSampler(steps=3)))
    assert codes.max() < 12
    with pytest.raises(ValueError, match="continuous"):
        dataclasses.replace(CONTINUOUS, chain=Chain(12, 8))


# -- published files


def test_the_average_and_the_whole_model_of_a_file_are_the_same_names():
    weights = restore("vq_diffusion", TINY, model_for(TINY))
    file = {f"transformer.{k}": v for k, v in weights.items()} | {"content_codec.enc.quant_conv.weight": np.zeros(3)}
    format = find("vq_diffusion")
    assert unwrapped({"ema": weights, "model": {}}, format).keys() == weights.keys()
    assert unwrapped({"model": file}, format).keys() == weights.keys()
    config = FORMATS["vq_diffusion"].describe(weights, grid=(2, 3), heads=2)
    assert with_fields(config, sampling=TINY.sampling, condition_dropout=0.5, positions=AxialPositions(), mlp=0) == TINY


def test_used_codes_are_the_first_that_map_to_each():
    rows = used_codes(np.array([-1, 2, 0, 2, 1, 0]))
    np.testing.assert_array_equal(rows, [2, 4, 1])
    with pytest.raises(ValueError, match="leaves out 1"):
        used_codes(np.array([0, 2]))
    book = np.arange(12.0).reshape(6, 2)
    file = {"content_codec.dec.quantize.embed.weight": book, "transformer.x": book}
    found = codec_tensors(file, np.array([-1, 2, 0, 2, 1, 0]))
    assert list(found) == ["quantize.embed.weight"]
    np.testing.assert_array_equal(found["quantize.embed.weight"], book[[2, 4, 1]])


def test_a_codec_whose_codebook_is_an_average_is_that_of_ithq():
    """Its codebook and the counts of its use are buffers; what the average is made of is made anew."""
    book = QuantizerConfig(codes=6, dim=4, normalize=False, decay=0.99, commitment=1.0)
    whole = VQGAN(AutoencoderConfig(8, (1, 2), blocks=1, latent=4, groups=4), book, adversarial=0.0)
    abstract = jax.eval_shape(whole.init, jax.random.key(0))
    model = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(x.dtype), abstract)
    weights = restore("taming-vqgan", whole, model)
    assert weights["quantize.embedding"].shape == (6, 4) and weights["quantize.cluster_size"].shape == (6,)
    file = {f"content_codec.enc.{k}": v for k, v in weights.items()}
    file |= {"content_codec.enc.quantize.embedding_avg": weights["quantize.embedding"]}
    config, found = convert("vq_diffusion-codec", unwrapped({"model": file}, find("vq_diffusion-codec")), groups=4)
    assert config.quantizer == book
    again = restore("vq_diffusion-codec", config, found)
    assert again.keys() == weights.keys() and all(np.array_equal(again[k], weights[k]) for k in weights)


def test_a_codec_is_read_with_the_codes_that_the_model_knows():
    whole = VQGAN(
        AutoencoderConfig(8, (1, 1), blocks=1, latent=4, groups=4),
        QuantizerConfig(codes=6, dim=4, normalize=False),
        adversarial=0.0,
    )
    abstract = jax.eval_shape(whole.init, jax.random.key(0))
    model = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(x.dtype), abstract)
    weights = restore("taming-vqgan", whole, model)
    used = np.array([1, 2, 0, 2, 1, 0])
    file = {"model": {f"content_codec.dec.{k}": v for k, v in weights.items()}, "ema": {}}
    config, found = convert("vq_diffusion-codec", unwrapped(file, find("vq_diffusion-codec")), used=used, groups=4)
    assert config.vocabulary == 3
    np.testing.assert_array_equal(
        found.autoencoder.quantizer.codebook[...], model.autoencoder.quantizer.codebook[...][[2, 0, 1]]
    )
