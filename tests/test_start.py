"""Runs that begin with the weights of another model: what is taken, resized, new, and said."""

import dataclasses
import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t2i_jax.core.config import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.params import abstract, named, rebuild
from t2i_jax.core.sharding import MeshConfig, shardings
from t2i_jax.models.any_order import AnyOrder
from t2i_jax.models.ar import AR
from t2i_jax.models.masked import Masked
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.nn.layers import ModelState, position_table
from t2i_jax.storage.artifacts import Artifact, open_artifact, save_artifact
from t2i_jax.training import trainer as trainer_module
from t2i_jax.training.loop import train
from t2i_jax.training.objectives import forward_of
from t2i_jax.training.optimizer import Optimizer, with_rates
from t2i_jax.training.start import fit, interpolated, read_start
from t2i_jax.training.state import carried_of, create
from t2i_jax.training.step import make_step
from t2i_jax.training.trainer import Trainer
from tests.fixtures import toys
from tests.fixtures.families import ALL, FAMILIES, batch_for, fresh

SGD = Optimizer("sgd", learning_rate=0.1, schedule="constant", warmup=0, clip=0.0)


def begin(folder, config):
    """The start of a run of `config` from a model in a folder."""
    experiment = dataclasses.replace(toys.experiment(start=str(folder)), model=config)
    model, mesh = abstract(config), MeshConfig(1).build(jax.devices()[:1])
    return read_start(experiment, model, {k: v.get_value() for k, v in named(shardings(model, mesh)).items()})


@pytest.mark.parametrize("name", ALL)
def test_a_model_begins_as_itself(tmp_path, name):
    config, rng = ALL[name], np.random.default_rng(0)
    shapes = abstract(config)
    full = lambda x: jnp.asarray(rng.uniform(0, 9, x.shape), x.dtype)
    model = rebuild(shapes, {k: v.replace(full(v)) for k, v in named(shapes).items()})
    save_artifact(Artifact(config, model), tmp_path / "released", "a card")
    begun = begin(tmp_path / "released", config)
    assert not (begun.new or begun.resized or begun.unused)
    other = jax.tree.map(jnp.zeros_like, model)
    jax.tree.map(np.testing.assert_array_equal, begun.into(other, begun.values), model)


def another_grid(name, config):
    """A family or codec of larger images; None where nothing of it depends on their size."""
    if name.startswith("var"):
        return dataclasses.replace(config, quantizer=dataclasses.replace(config.quantizer, scales=(1, 3)))
    for field, larger in (("grid", (4, 6)), ("size", (8, 8))):
        try:
            return with_fields(config, **{field: larger})
        except (ConfigError, ValueError, TypeError):
            continue
    return None


@pytest.mark.parametrize("name", FAMILIES)
def test_every_array_of_another_grid_is_resized(name):
    """Every parameter whose shape depends on the grid is declared as a table of positions."""
    config = FAMILIES[name]
    if name.startswith(("gan", "staged-gan")):
        return  # their first layer makes the whole first grid
    larger = another_grid(name, config)
    if larger is None:
        return
    mine, theirs = named(abstract(larger)), named(abstract(config))
    assert mine.keys() == theirs.keys()
    changed = [k for k, v in mine.items() if v.shape != theirs[k].shape and not isinstance(v, ModelState)]
    for k in changed:
        fitted = fit(theirs[k], jnp.zeros(theirs[k].shape), mine[k])
        assert fitted, f"{k}: {theirs[k].shape} to {mine[k].shape}"
        value, part, _ = fitted
        assert part.filled(jnp.full(mine[k].shape, jnp.nan), value).shape == mine[k].shape
        assert value.shape[part.axis] == len(part.rows) == len(set(part.rows))


@pytest.mark.parametrize(
    "config",
    [
        with_fields(AR(), vocabulary=16, grid=(2, 2), width=16, depth=1, heads=2, condition=ClassEmbedder(3)),
        with_fields(Masked(), grid=(2, 2), width=16, depth=1, heads=2, condition=ClassEmbedder(3), buffer=4),
        with_fields(AnyOrder(), grid=(2, 2), width=16, depth=1, heads=2, condition=ClassEmbedder(3)),
    ],
    ids=["ar", "masked", "any-order"],
)
def test_more_classes_keep_theirs_and_the_unconditional_one(tmp_path, config):
    save_artifact(Artifact(config, fresh(config)), tmp_path / "released", "a card")
    more = with_fields(config, condition=ClassEmbedder(5))
    start = begin(tmp_path / "released", more)
    assert list(start.resized) == ["condition.table.w"] and not start.new
    table = start.into(fresh(more), start.values).condition.table.w[...]
    old, new = fresh(config).condition.table.w[...], fresh(more).condition.table.w[...]
    np.testing.assert_array_equal(table, jnp.concatenate([old[:3], new[3:5], old[3:]]))


def test_positions_are_interpolated_in_their_map():
    ramp = lambda i, j: (np.arange(i)[:, None] + 0.5) / i + 10 * (np.arange(j) + 0.5) / j
    table = np.concatenate([[7.0, 8.0], ramp(4, 4).ravel()])[:, None]
    got, rows = interpolated(jnp.asarray(table), ((4, 4),), 2, ((8, 6),), 3, 3 + 48)
    assert rows == (0, 1, *range(3, 51))  # the third of the prefix stays fresh
    np.testing.assert_array_equal(got[:2, 0], [7, 8])
    inner = lambda x: np.asarray(x).reshape(8, 6)[3:-3, 2:-2]  # at the edge the cubic kernel is cut
    np.testing.assert_allclose(inner(got[2:, 0]), inner(ramp(8, 6)), rtol=1e-5)
    same, _ = interpolated(jnp.asarray(table), ((4, 4),), 2, ((4, 4),), 2, 18)
    np.testing.assert_array_equal(same, table)


def test_a_table_without_the_last_place_and_one_with_spare_rows():
    """Learned positions of inputs lack the last token; a table may be longer than its sequence."""
    theirs = position_table(jnp.arange(4.0)[:, None], (2, 2), prefix=1)  # the prefix and three of four
    short, spare = (position_table(jnp.zeros((n, 1)), (4, 4), prefix=1) for n in (16, 20))
    value, part, _ = fit(theirs, theirs.get_value(), short)
    assert part.rows == tuple(range(16)) and value.shape == (16, 1) and value[0] == 0
    value, part, _ = fit(theirs, theirs.get_value(), spare)
    assert part.rows == tuple(range(17)) and value.shape == (17, 1)


def test_a_run_begins_with_the_average_of_another(tmp_path, capsys):
    first = train(toys.experiment(ema=0.9, steps=4), tmp_path / "first")
    new = toys.experiment(ema=0.9, steps=6, start=str(tmp_path / "first"))
    trainer = Trainer(new, tmp_path / "second")
    state = trainer.start(trainer.begin())
    for k, v in state.params.items():
        np.testing.assert_array_equal(v[...], first.ema[k][...])
        np.testing.assert_array_equal(state.ema[k][...], v[...])
    assert int(state.step) == 0
    assert all(not np.any(x) for x in jax.tree.leaves(state.optimizer))
    train(new, tmp_path / "second")
    said = json.loads((tmp_path / "second/start.json").read_text())
    assert said["step"] == 4 and said["taken"] == ["layers.b", "layers.w", "seen"]
    assert "train.start: 3 of 3 arrays are those of" in capsys.readouterr().err


def test_a_run_that_goes_on_does_not_read_its_start(tmp_path):
    train(toys.experiment(steps=2), tmp_path / "first")
    train(toys.experiment(steps=2, start=str(tmp_path / "first")), tmp_path / "second")
    (tmp_path / "first").rename(tmp_path / "moved")
    state = train(toys.experiment(steps=4, start=str(tmp_path / "first")), tmp_path / "second")
    assert int(state.step) == 4


def test_a_start_on_a_mesh_is_that_of_one_device(tmp_path):
    train(toys.experiment(steps=3), tmp_path / "first")
    one, several = (
        train(toys.experiment(steps=3, start=str(tmp_path / "first"), mesh=mesh), tmp_path / name)
        for name, mesh in (("one", MeshConfig()), ("several", MeshConfig(2, 2, 2)))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one.flat(), several.flat())


def test_what_has_nothing_in_common_is_refused(tmp_path):
    config = FAMILIES["ar"]
    save_artifact(Artifact(config, fresh(config)), tmp_path / "released", "a card")
    with pytest.raises(ConfigError, match="holds a AR, none of whose arrays this Identity has"):
        train(toys.experiment(start=str(tmp_path / "released")), tmp_path / "run")
    with pytest.raises(ConfigError, match="there is no such folder"):
        train(toys.experiment(start=str(tmp_path / "nowhere")), tmp_path / "run")


def test_what_is_new_is_named(tmp_path, capsys):
    train(toys.experiment(steps=2), tmp_path / "first")
    wide = dataclasses.replace(toys.experiment(steps=1), model=toys.Identity(depth=4))
    wide = dataclasses.replace(wide, train=dataclasses.replace(wide.train, start=str(tmp_path / "first")))
    train(wide, tmp_path / "second")
    said = " ".join(capsys.readouterr().err.split())
    assert "train.start: new: layers.b (3x8 there, 4x8 here), layers.w (3x8x8 there, 4x8x8 here)" in said


def test_frozen_parameters_do_not_change_and_have_no_moments(tmp_path):
    experiment = toys.experiment(steps=3, frozen=("layers.w",))
    trainer = Trainer(experiment, tmp_path)
    before, after = trainer.start(), train(experiment, tmp_path)
    np.testing.assert_array_equal(before.params["layers.w"][...], after.params["layers.w"][...])
    assert np.any(before.params["layers.b"][...] != after.params["layers.b"][...])
    assert not [k for k in after.flat() if k.startswith("optimizer") and "layers.w" in k]
    with pytest.raises(ConfigError, match="train.frozen: the model has no parameters under 'layer'"):
        Trainer(toys.experiment(frozen=("layer",)), tmp_path)
    with pytest.raises(ConfigError, match="train.frozen: it leaves the objective"):
        Trainer(toys.experiment(frozen=("layers",)), tmp_path)


@pytest.mark.parametrize("name", ["vqgan", "gan-spatial"])
def test_the_state_of_frozen_parts_does_not_change(name):
    """A codebook of moving averages, statistics of batch norm and power iterations are fixed with what they are of."""
    config, moved = ALL[name], {}
    objectives = config.objectives()
    optimizers = {name: SGD.build(1) for name in objectives}
    state = create(lambda _: fresh(config), objectives, optimizers, jax.random.key(0))
    for fixed in ((), tuple({k.split(".")[0] for k in state.carried})):
        step = make_step(abstract(config), objectives, optimizers, forward=forward_of(config), fixed=fixed)
        after, _ = jax.jit(step)(state, {}, batch_for(config))
        moved[fixed] = {k for k, v in after.carried.items() if np.any(v[...] != state.carried[k][...])}
    free, held = moved.values()
    assert free and not held, held


def test_frozen_names_may_be_those_of_state_alone(tmp_path):
    config = ALL["vqgan"]
    assert "autoencoder.quantizer.codebook" in carried_of(abstract(config))
    begun = toys.experiment(frozen=("autoencoder.quantizer",))
    Trainer(dataclasses.replace(begun, model=config), tmp_path)


def test_rates_multiply_the_updates_of_their_paths():
    params = {name: jnp.ones(2) for name in ("a.w", "a.b", "ab")}
    optimizer = with_rates(SGD.build(1), {"a": 0.5, "a.b": 0.0})
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose([float(moved[k][0]) for k in params], [0.95, 1.0, 0.9], rtol=1e-6)


def test_rates_of_a_run(tmp_path):
    plain, slow = (
        train(toys.experiment(steps=1, optimizer=SGD, **more), tmp_path / str(len(more)))
        for more in ({}, {"rates": {"layers.w": 0.5}})
    )
    begun = Trainer(toys.experiment(), tmp_path / "x").start().params["layers.w"][...]
    moves = [state.params["layers.w"][...] - begun for state in (plain, slow)]
    np.testing.assert_allclose(moves[1], moves[0] / 2, rtol=1e-4, atol=1e-7)
    with pytest.raises(ConfigError, match="train.rates: the model has no parameters under 'head'"):
        Trainer(toys.experiment(rates={"head": 2.0}), tmp_path)


def test_no_copy_of_a_start_stays_on_the_devices(tmp_path, monkeypatch):
    train(toys.experiment(steps=1), tmp_path / "first")
    kept = []

    def read(*given):
        found = read_start(*given)
        kept.extend(weakref.ref(x) for x in found.values.values())
        return found

    monkeypatch.setattr(trainer_module, "read_start", read)
    alive = []
    experiment = toys.experiment(steps=1, start=str(tmp_path / "first"), preview_every=1)
    train(experiment, tmp_path / "second", lambda *_: alive.extend(ref() for ref in kept))
    assert len(alive) == 3 and all(x is None for x in alive)


def test_what_does_not_fit_goes_before_the_next_array_is_read(tmp_path, monkeypatch):
    train(toys.experiment(steps=1), tmp_path / "first")
    found = {}

    def opened(path):
        there = open_artifact(path)

        def read(layout, use):
            step, made = there.read(layout, use)
            found.update(made)
            return step, made

        return dataclasses.replace(there, read=read)

    monkeypatch.setattr("t2i_jax.training.start.open_artifact", opened)
    begun = begin(tmp_path / "first", toys.Identity(depth=4))
    assert set(begun.new) == {"layers.b", "layers.w"} and {k for k, v in found.items() if v is None} == set(begun.new)
