"""Families of any order and head: every cell of the table trains and draws, and what they promise holds."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.fsq import FSQHead
from t2i_jax.convert import convert
from t2i_jax.core.config import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.edits import Inpaint
from t2i_jax.heads import DiffusionHead, FlowHead, MixtureHead, SoftmaxHead
from t2i_jax.models.any_order import AnyOrder
from t2i_jax.models.ar import AR
from t2i_jax.models.masked import Masked
from t2i_jax.networks.condition import CaptionEncoder, ClassEmbedder
from t2i_jax.pipeline import Pipeline
from t2i_jax.presets import MAR, preset
from t2i_jax.sampling.options import ARSampler, MaskedSampler
from t2i_jax.sampling.orders import Confidence, MaskRate, Permutation, Raster, Sets
from t2i_jax.sampling.progress import listening
from t2i_jax.storage.artifacts import Artifact
from tests.fixtures import toys
from tests.fixtures.families import with_aux
from tests.fixtures.released import released, tensors_of

CODES = SoftmaxHead(7)
VECTORS = DiffusionHead(dim=2, width=8, depth=1, steps=20, respacing="3", repeat=2)
TINY = dict(grid=(2, 3), width=8, depth=1, heads=2, condition=ClassEmbedder(3), dropout=0.0)
BIDIRECTIONAL = TINY | dict(buffer=2, decoder=with_fields(MAR, width=8, depth=1, heads=2, dropout=0.0), size_buckets=2)
STACK = TINY | dict(reads="all", rate=MaskRate("cosine", least=0.5))

CELLS = {
    f"{name} {type(head).__name__}": with_fields(family(), **shape, order=order, head=head, **rest)
    for head in (CODES, VECTORS)
    for name, family, shape, order, rest in (
        ("AR raster", AnyOrder, TINY, Raster(), {}),
        ("AR random", AnyOrder, TINY, Permutation(), {}),
        ("masked one by one", Masked, BIDIRECTIONAL, Permutation(), {"rate": MaskRate("uniform")}),
        ("masked sets", Masked, BIDIRECTIONAL, Sets(), {}),
    )
}
MORE = {
    "MaskGIT": with_fields(
        Masked(), **BIDIRECTIONAL | {"depth": 0}, order=Confidence(), head=CODES, rate=MaskRate("cosine")
    ),
    "one stack": with_fields(
        Masked(), **STACK, post_norm=True, tied=True, buffer=1, order=Confidence(), head=CODES, average="images"
    ),
    "one stack crossed": with_fields(Masked(), **STACK, via="cross_attention", head=VECTORS),
    "masked raster": with_fields(Masked(), **BIDIRECTIONAL, order=Raster(), head=CODES),
    "masked flow": with_fields(Masked(), **BIDIRECTIONAL, order=Sets(), head=FlowHead(2, 8, 1, steps=2, repeat=1)),
    "masked mixture": with_fields(Masked(), **BIDIRECTIONAL, order=Sets(), head=MixtureHead(2, 3)),
    "Fluid": with_fields(
        Masked(),
        **BIDIRECTIONAL | {"condition": CaptionEncoder(11, 4, 8, 1, 2), "patch": 2, "grid": (1, 2)},
        rate=MaskRate("uniform"),
        head=dataclasses.replace(VECTORS, dim=8),
    ),
    "AR factors": with_fields(AnyOrder(), **TINY, order=Permutation(), head=FSQHead((3, 2, 4))),
    "masked factors": with_fields(Masked(), **BIDIRECTIONAL, order=Confidence(), head=FSQHead((3, 2, 4))),
    "masked factors of patches": with_fields(
        Masked(), **BIDIRECTIONAL | {"patch": 2}, head=FSQHead((3, 3, 3, 3, 2, 2, 2, 2))
    ),
}
ALL = CELLS | MORE


def batch_of(config, b=3):
    rng = np.random.default_rng(0)
    code, field = config.sample_spec().code, config.batch_spec()["codes"]
    if code.is_discrete:
        codes = rng.integers(0, code.sizes if code.shape else code.sizes[0], (b, *field.shape))
    else:
        codes = rng.normal(size=(b, *field.shape)).astype(np.float32)
    text = {"text": rng.integers(0, 11, (b, 4)), "text_mask": rng.uniform(size=(b, 4)) < 0.7}
    return {"codes": jnp.asarray(codes), "label": jnp.arange(b) % 3} | jax.tree.map(jnp.asarray, text)


def filled(config):
    """Parameters that are all in use: fresh ones have matrices of zeros."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(config.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), shapes)


def condition_of(config, batch):
    return {name: batch[name] for name in config.condition_spec() if name in batch}


def drawn(config, model, rows, options=None, **rest):
    """Images of some rows of the batch, each with its own key."""
    batch, keys = batch_of(config), jax.random.split(jax.random.key(2), 3)
    rest = {k: v[rows] for k, v in rest.items()}
    condition = {k: v[rows] for k, v in condition_of(config, batch).items()}
    return config.sample(model, condition, keys[rows], options, **rest)


def few(config):
    return dataclasses.replace(config.options(), **({"iterations": 3} if isinstance(config, Masked) else {}))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in MORE or "one by one" in n else ()) for n in (*CELLS, *MORE)]
)
def test_every_cell_trains_and_draws(name):
    config, model = ALL[name], filled(ALL[name])
    batch, key = batch_of(config), jax.random.key(0)
    (loss, output), slopes = jax.jit(jax.value_and_grad(with_aux(config.loss), has_aux=True))(model, batch, key)
    assert np.isfinite(loss) and "loss" in output.metrics
    idle = [
        jax.tree_util.keystr(p)
        for p, g in jax.tree_util.tree_flatten_with_path(slopes)[0]
        if not (np.isfinite(g).all() and np.abs(g).sum() > 0)
    ]
    assert not [name for name in idle if ".b" not in name], "parameters that nothing moves"

    three, again = (drawn(config, model, np.asarray(rows), few(config)) for rows in ([0, 1, 2], [2, 0, 1]))
    assert three.shape == batch["codes"].shape and three.dtype == config.sample_spec().code.dtype
    np.testing.assert_allclose(three[jnp.asarray([2, 0, 1])], again, rtol=1e-4, atol=1e-5)
    assert len(np.unique(np.asarray(three).reshape(3, -1), axis=0)) == 3


@pytest.mark.parametrize("name", ["masked sets SoftmaxHead", "AR random DiffusionHead"])
def test_what_is_kept_stays_and_is_read(name):
    config, model = CELLS[name], filled(CELLS[name])
    known = batch_of(config)["codes"]
    keep = jnp.asarray([[[1, 0, 0], [0, 1, 1]], [[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]]], bool)
    rows = np.arange(3)
    codes = drawn(config, model, rows, few(config), known=known, keep=keep)
    chosen = keep if codes.ndim == 3 else keep[..., None]
    np.testing.assert_array_equal(jnp.where(chosen, codes, 0), jnp.where(chosen, known, 0))
    free = drawn(config, model, rows, few(config), known=known, keep=jnp.zeros_like(keep))
    np.testing.assert_allclose(codes[1], free[1], rtol=1e-4, atol=1e-5)
    assert not np.allclose(codes[0], free[0])


def test_options_do_not_compile_anew(traces):
    for name in ("masked sets SoftmaxHead", "AR raster SoftmaxHead"):
        config, model = CELLS[name], filled(CELLS[name])
        drawn(config, model, np.arange(3), few(config))
        traces.clear()
        drawn(config, model, np.arange(3), dataclasses.replace(few(config), guidance=2, temperature=0.5, top_k=3))
        if isinstance(config, Masked):
            for iterations in (1, 2, 40):
                drawn(config, model, np.arange(3), MaskedSampler(iterations=iterations, shape=1))
        assert not traces["_sample"]


def test_hidden_tokens_are_not_seen_and_visible_ones_are():
    config, model = CELLS["masked sets DiffusionHead"], filled(CELLS["masked sets DiffusionHead"])
    batch = batch_of(config)
    hidden = jnp.asarray([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0]], bool)
    of = lambda codes: model(batch | {"codes": codes}, hidden)
    seen = jax.jit(jax.grad(lambda codes: jnp.sin(of(codes)).sum()))(batch["codes"])
    np.testing.assert_array_equal(jnp.abs(seen).sum(-1).reshape(3, -1) > 0, ~hidden)
    # An encoder that takes no more tokens than are visible gives the same.
    short = jax.jit(lambda codes: model(batch | {"codes": codes}, hidden, visible=5))
    np.testing.assert_allclose(short(batch["codes"]), jax.jit(of)(batch["codes"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [Raster(), Permutation()])
def test_kept_keys_and_values_give_what_the_whole_sequence_gives(order):
    config = with_fields(AnyOrder(), **TINY, head=CODES, order=order)
    model, batch = filled(config), batch_of(config)
    orders = jax.vmap(lambda key: Permutation().draw(key, 6))(jax.random.split(jax.random.key(5), 3))
    keys = jax.random.split(jax.random.key(2), 3)
    greedy = ARSampler(guidance=2.5, greedy=True)
    codes = config.sample(model, condition_of(config, batch), keys, greedy, orders=orders)

    def logits(dropped):
        z, x = model(batch | {"codes": codes}, orders, jnp.full(3, dropped))
        return config.head.logits(model.head, z), x

    (own, x), (null, _) = logits(False), logits(True)
    np.testing.assert_array_equal((null + 2.5 * (own - null)).argmax(-1), x)


def test_a_causal_model_gives_probabilities_in_every_order():
    config = with_fields(AnyOrder(), **TINY | {"grid": (1, 3)}, head=SoftmaxHead(3), order=Permutation())
    model = filled(config)
    codes = jnp.asarray(list(itertools.product(range(3), repeat=3))).reshape(-1, 1, 3)
    batch = {"codes": codes, "label": jnp.zeros(len(codes), int)}
    total = jax.jit(lambda order: jnp.exp(config.log_likelihood(model, batch, jnp.tile(order, (len(codes), 1)))).sum())
    for order in ([2, 1, 0], [0, 2, 1]):
        np.testing.assert_allclose(total(jnp.asarray(order)), 1, rtol=1e-5)
    factors = dataclasses.replace(config, grid=(1, 2), head=FSQHead((3, 2)))
    codes = jnp.asarray(list(itertools.product(itertools.product(range(3), range(2)), repeat=2)))[:, None]
    batch = {"codes": codes, "label": jnp.zeros(len(codes), int)}
    np.testing.assert_allclose(jnp.exp(factors.log_likelihood(filled(factors), batch)).sum(), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="gives no probability"):
        dataclasses.replace(config, head=VECTORS).log_likelihood(model, batch)


def test_a_causal_model_that_learned_a_joint_law_knows_it_in_every_order():
    """Four bits that hang on each other: what each order says of them costs their entropy, and no order more."""
    config = with_fields(
        AnyOrder(),
        **TINY | {"grid": (2, 2), "width": 32, "depth": 2, "condition": ClassEmbedder(1), "condition_dropout": 0.0},
        head=SoftmaxHead(2),
        order=Permutation(),
    )
    codes = jnp.asarray(list(itertools.product(range(2), repeat=4))).reshape(16, 2, 2)
    law = jax.random.dirichlet(jax.random.key(3), jnp.full(16, 0.5))
    alone = {"codes": codes, "label": jnp.zeros(16, int)}
    # Every picture is in every batch, weighed by its probability: orders are all that is drawn.
    batch = jax.tree.map(lambda x: jnp.tile(x, (8, *[1] * (x.ndim - 1))), alone | {"weight": law})
    steps = 1000
    tx = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    def step(state, key):
        model, moments = state
        updates, moments = tx.update(jax.grad(lambda m: config.loss(m, batch, key).loss)(model), moments)
        return (optax.apply_updates(model, updates), moments), None

    @jax.jit
    def learn(model):
        keys = jax.random.split(jax.random.key(0), steps)
        (model, _), _ = jax.lax.scan(step, (model, tx.init(model)), keys)
        orders = jnp.asarray(list(itertools.permutations(range(4))))
        return jax.lax.map(lambda order: config.log_likelihood(model, alone, jnp.tile(order, (16, 1))), orders)

    costs = -np.asarray(learn(config.init(jax.random.key(0))) @ law)  # nats an image, for each of 24 orders
    entropy = -float((law * jnp.log(law)).sum())  # 2.30, and independent fair bits would cost 2.77
    assert costs.min() > entropy - 1e-3, "no law costs less than the true one"
    assert costs.max() < entropy + 0.1 and np.ptp(costs) < 0.08


def test_steps_ask_for_what_the_schedule_says():
    config, model = CELLS["masked sets SoftmaxHead"], filled(CELLS["masked sets SoftmaxHead"])
    batch, counts = batch_of(config), []
    keys = jax.random.split(jax.random.key(2), 3)
    condition = condition_of(config, batch)
    for iterations in (2, 9):  # the second is more than there are tokens
        with listening(lambda count, total, codes: counts.append(count)) as progress:
            config.sample(model, condition, keys, MaskedSampler(iterations=iterations), progress=progress)
    assert sorted(counts[:2]) == [1, 2] and sorted(counts[2:]) == [1, 2, 3, 4, 5, 6]


def test_clear_errors():
    with pytest.raises(ValueError, match="order Confidence needs a head with probabilities"):
        Masked(head=VECTORS, order=Confidence())
    with pytest.raises(ValueError, match="patch 2: a code of one number"):
        Masked(head=CODES, patch=2)
    with pytest.raises(ValueError, match="asks for sets"):
        AnyOrder(order=Sets())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="mar-b"):
        preset("mar-x")
    with pytest.raises(ValueError, match="iterations 0"):
        MaskedSampler(iterations=0).arrays()


def test_a_pipeline_draws_only_where_the_mask_says():
    config = with_fields(Masked(), **BIDIRECTIONAL, head=dataclasses.replace(VECTORS, dim=3))
    pipeline = Pipeline.place(config, filled(config), Artifact(toys.Pixels(), {}), None)
    picture = np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8)
    mask = np.asarray([[0, 1, 0], [0, 0, 1]], bool)
    made = pipeline.sampler(few(config), edit=Inpaint(picture, mask)).sample(["0"], [5])[0]
    assert np.abs(made.astype(int) - picture)[~mask].max() <= 1 and (made != picture)[mask].any()
    with pytest.raises(ConfigError, match=r"image has the shape \(1, 3, 3\); this model draws images of \(2, 3, 3\)"):
        pipeline.sampler(edit=Inpaint(picture[:1], mask[:1]))
    with pytest.raises(ConfigError, match="the mask has the dtype uint8: bool is needed"):
        pipeline.sampler(edit=Inpaint(picture, mask.astype(np.uint8)))
    with pytest.raises(ConfigError, match="cannot fill holes"):
        Pipeline.place(AR(grid=(2, 3)), {}, Artifact(toys.Pixels(), {})).sampler(edit=Inpaint(picture, mask))


def test_a_pipeline_tells_how_its_pictures_grow():
    config = with_fields(Masked(), **BIDIRECTIONAL, head=dataclasses.replace(VECTORS, dim=3))
    pipeline = Pipeline.place(config, filled(config), Artifact(toys.Pixels(), {}), None, MeshConfig(1))
    seen, done, options = {}, [], few(config)
    watch, progress = lambda share, codes: seen.update({round(share, 3): codes}), lambda n, of: done.append((n, of))
    sampler = pipeline.sampler(options)
    made = sampler.sample(["0", "1", "2"], batch_size=2, on_progress=progress, on_preview=watch)
    np.testing.assert_array_equal(made, pipeline.sample(["0", "1", "2"], options=options, batch_size=2))
    assert 0 < min(seen) < 1 == max(seen) and done[-1] == (3, 3) and len(done) > 2
    np.testing.assert_array_equal(sampler.decode(seen[1.0]), made[-len(seen[1.0]) :])


@pytest.mark.parametrize("name", [n for n in released() if n.startswith("mar_") and not n.startswith("mar_kl")])
def test_released_files_are_taken_whole(name):
    config, model = convert("mar", tensors_of(name))
    assert sum(x.size for x in jax.tree.leaves(model)) == released()[name]["numel_params"]
    assert config.grid == (16, 16) and config.buffer == 64 and config.conditioning.what == ClassEmbedder(1000)


def test_a_stack_of_all_tokens_refuses_what_it_does_not_have():
    for fields, says in (
        ({"decoder": MAR}, "there is no decoder"),
        ({"depth": 0}, "it needs layers"),
        ({"tied": True, "head": VECTORS}, "a SoftmaxHead only"),
    ):
        with pytest.raises(ConfigError, match=says):
            with_fields(Masked(), **STACK | fields)
    with pytest.raises(ConfigError, match="Masked has prefix"):
        with_fields(Masked(), **TINY, via="cross_attention")


def test_a_tied_table_scores_words_in_training_and_codes_in_sampling():
    config = ALL["one stack"]
    model = filled(config)
    z = jnp.ones((2, 8))
    whole, codes = model.output()(z), model.output(whole=False)(z)
    assert whole.shape == (2, 7 + 4 + 1) and codes.shape == (2, 7)  # 3 classes, none, and the mask token
    np.testing.assert_allclose(whole[:, :7], codes, rtol=1e-6)
    rows = np.concatenate([model.entrance.w[...], model.condition.table.w[...], model.mask_token[...][None]])
    np.testing.assert_allclose(whole, z @ rows.T + model.output_bias[...], rtol=1e-5)
    other, y = filled(with_fields(config, activation="relu")), jnp.linspace(-1, 1, 48).reshape(2, 3, 8)
    np.testing.assert_allclose(other.finish(y), other.transform_norm(jax.nn.relu(other.transform(y))), rtol=1e-6)
