"""Games of objectives whose answers are known: their order, steps, optimisers, shared forward pass and state."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t2i_jax.core.config import ConfigError
from t2i_jax.core.params import named
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.core.types import LossOutput, Objective
from t2i_jax.nn.layers import ModelState, replace
from t2i_jax.training import records
from t2i_jax.training.loop import train
from t2i_jax.training.objectives import stages, updates
from t2i_jax.training.optimizer import Optimizer
from t2i_jax.training.state import create
from t2i_jax.training.step import make_step
from t2i_jax.training.trainer import Trainer
from tests.fixtures import toys
from tests.fixtures.runs import same, stop_after

RATE = 0.25
SGD = Optimizer("sgd", learning_rate=RATE, schedule="constant", warmup=0, clip=0.0)


class Point(nnx.Module):
    def __init__(self):
        self.x, self.y = nnx.Param(jnp.float32(1.0)), nnx.Param(jnp.float32(0.5))
        self.seen, self.other = ModelState(jnp.zeros(())), ModelState(jnp.zeros(()))


def objective(loss, *params, **fields):
    """An objective whose loss is a function of the model."""
    return Objective(lambda m, batch, key, step, train: LossOutput(loss(m), {}), params, **fields)


product = lambda m: m.x[...] * m.y[...]
MIN, MAX = objective(product, "x"), objective(lambda m: -product(m), "y")


def play(objectives, steps, optimizers=None, forward=None, init=lambda key: Point(), batch=None, **settings):
    """The points (x, y) before the first step and after each, and the last state."""
    optimizers = optimizers or {name: SGD.build(steps) for name in objectives}
    abstract = jax.eval_shape(init, jax.random.key(0))
    state = create(init, objectives, optimizers, jax.random.key(0), ema=() if "ema" in settings else None)
    step = jax.jit(make_step(abstract, objectives, optimizers, forward=forward, **settings))
    states = [state]
    for _ in range(steps):
        states.append(step(states[-1], {}, batch or {})[0])
    return np.array([[s.params["x"][...], s.params["y"][...]] for s in states]), states[-1]


def test_a_simultaneous_game_leaves_its_centre_and_an_alternating_one_goes_round_it():
    """min_x max_y x y (Gidel et al. 2019, arXiv:1807.04740): simultaneous steps move away by 1 + rate^2."""
    together, _ = play({"min": MIN, "max": MAX}, 20)
    turned = play({"min": dataclasses.replace(MIN, after=("max",)), "max": MAX}, 20)[0]
    x, y, a, b = 1.0, 0.5, 1.0, 0.5
    for n in range(21):
        np.testing.assert_allclose(together[n], (x, y), rtol=1e-5)
        np.testing.assert_allclose(turned[n], (a, b), rtol=1e-4, atol=1e-5)
        x, y = x - RATE * y, y + RATE * x
        b = b + RATE * a
        a = a - RATE * b
    sizes = (together**2).sum(-1)
    np.testing.assert_allclose(sizes[1:] / sizes[:-1], 1 + RATE**2, rtol=1e-5)
    assert (turned**2).sum(-1).max() < 2 < sizes[-1]


@pytest.mark.parametrize("start", [0, 7])
def test_updates_are_made_in_steps_that_every_divides_by_the_optimisers_own_count(start):
    falling = Optimizer("sgd", learning_rate=1.0, schedule="linear", final=0.0, warmup=0, clip=0.0)
    objectives = {
        "slow": objective(lambda m: m.x[...], "x", every=5, start=start),
        "fast": objective(lambda m: m.y[...], "y"),
    }
    total = updates([objectives["slow"]], 20)
    assert total == (4 if start == 0 else 3)
    points, state = play(objectives, 20, {"slow": falling.build(total), "fast": SGD.build(20)})
    moved = np.flatnonzero(np.diff(points[:, 0])) + 1
    np.testing.assert_array_equal(moved, [5, 10, 15, 20][-total:])
    np.testing.assert_allclose(-np.diff(points[:, 0])[moved - 1], 1 - np.arange(total) / total, rtol=1e-5)
    np.testing.assert_allclose(np.diff(points[:, 1]), -RATE, rtol=1e-5)
    assert {int(x) for x in jax.tree.leaves(state.optimizer["slow"])} == {total}


def test_objectives_that_share_an_optimiser_share_its_momentum():
    heavy = dataclasses.replace(SGD, options={"momentum": 0.5}).build(9)
    both = {n: objective(lambda m: m.x[...], "x", optimizer="one") for n in "ab"}
    points, state = play(both, 3, {"one": heavy})
    assert list(state.optimizer) == ["one"]
    alone, _ = play({"a": both["a"]}, 6, {"one": heavy})
    np.testing.assert_allclose(points[:, 0], alone[::2, 0], rtol=1e-6)


def test_what_cannot_be_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="'a': after 'c', which is none of a, b"):
        stages({"a": dataclasses.replace(MIN, after=("c",)), "b": MAX})
    circle = {"a": dataclasses.replace(MIN, after=("b",)), "b": dataclasses.replace(MAX, after=("a",))}
    with pytest.raises(ConfigError, match="a, b: each is `after`"):
        Trainer(toys.experiment(Fixed(tuple(circle.items()))), tmp_path)
    with pytest.raises(ConfigError, match="no parameters under 'z', only under x, y"):
        Trainer(toys.experiment(Fixed((("a", objective(product, "z")),))), tmp_path)
    mixed = (("a", MIN), ("b", dataclasses.replace(MAX, optimizer="a")))
    with pytest.raises(ConfigError, match="share the optimizer 'a'"):
        Trainer(toys.experiment(Fixed(mixed)), tmp_path)
    with pytest.raises(ConfigError, match="no optimizer 'b', only a"):
        Trainer(toys.experiment(Fixed((("a", MIN),)), optimizers={"b": SGD}), tmp_path)
    with pytest.raises(ConfigError, match=r"train\.ema_params: .*'w'"):
        Trainer(toys.experiment(Fixed((("a", MIN),)), ema_params=("w",)), tmp_path)


@dataclasses.dataclass(frozen=True)
class Fixed(toys.Plain):
    """A point with these objectives."""

    named: Any = ()

    def init(self, key):
        return Point()

    def batch_spec(self):
        return {}

    def objectives(self):
        return dict(self.named)


def test_a_loss_that_is_no_single_number_is_named():
    each = Objective(lambda m, batch, key, step, train: LossOutput(jnp.stack([m.x[...], m.y[...]]), {}), ("x",))
    with pytest.raises(AssertionError, match="the loss of the objective 'a'"):
        play({"a": each}, 1)


def writing(**counts):
    """An objective that counts in these arrays."""
    count = lambda m: replace(m, **{k: named(m)[k][...] + n for k, n in counts.items()})
    return Objective(lambda m, batch, key, step, train: LossOutput(m.x[...] ** 2, {}, count(m)), ("x",))


def test_states_of_objectives_are_merged_and_one_array_has_one_writer():
    _, state = play({"a": writing(seen=1), "b": writing(other=2), "c": MAX}, 3)
    assert {k: float(v[...]) for k, v in state.carried.items()} == {"seen": 3, "other": 6}
    with pytest.raises(ConfigError, match="'a' and 'b' both write 'seen'"):
        play({"a": writing(seen=1), "b": writing(seen=2, other=1)}, 1)


def test_parts_of_a_batch_give_the_game_of_the_whole_and_its_average():
    def weighted(sign, *params, **fields):
        loss = lambda m, batch, key, step, train: LossOutput(sign * product(m) * batch["w"].mean(), {})
        return Objective(loss, params, **fields)

    game = {"min": weighted(1, "x", after=("max",)), "max": weighted(-1, "y", every=2)}
    batch = {"w": jnp.arange(8.0)}
    whole, parts = (play(game, 5, batch=batch, accumulate=n, ema=0.5) for n in (1, 4))
    same(parts[1], whole[1], 1e-6)
    average = np.float32([1, 0.5])
    for n, point in enumerate(whole[0][1:]):
        average += (1 - min(0.5, (1 + n) / (10 + n))) * (point - average)
    np.testing.assert_allclose([whole[1].ema[k][...] for k in "xy"], average, rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_go_through_the_shared_forward_pass_to_what_it_reads(accumulate):
    """Of an output that is a whole number none does."""

    def forward(model, batch, key, step, train):
        return {"z": jnp.sin(model.x[...] * batch["w"]), "rows": jnp.arange(3)}

    def plain(model, batch, key, step, train):
        return LossOutput((batch["outputs"]["z"] * model.x[...] * batch["outputs"]["rows"][1]).mean(), {})

    def against(model, batch, key, step, train):
        return LossOutput(((batch["outputs"]["z"] - model.y[...]) ** 2).mean(), {})

    inside = lambda loss: lambda m, b, *rest: loss(m, b | {"outputs": forward(m, b, *rest)}, *rest)
    batch = {"w": jnp.linspace(0.2, 1, 4)}
    for orders in ((), ("b",)):
        shared = {"a": Objective(plain, ("x",), after=orders), "b": Objective(against, ("y",))}
        alone = {k: dataclasses.replace(o, loss=inside(o.loss)) for k, o in shared.items()}
        found = play(shared, 4, forward=forward, batch=batch, accumulate=accumulate)[0]
        np.testing.assert_allclose(found, play(alone, 4, batch=batch, accumulate=accumulate)[0], rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Slow(toys.Game):
    """A game whose artist sees the critic's update, in each fourth step."""

    def objectives(self):
        found = super().objectives()
        return found | {"artist": dataclasses.replace(found["artist"], every=4, after=("critic",))}


def test_a_game_goes_on_within_a_period_and_says_what_it_did(tmp_path):
    experiment = toys.experiment(Slow(), steps=6, ema_params=("artist",))
    whole = train(experiment, tmp_path / "whole")
    stop_after(experiment, tmp_path / "parts", 3)
    same(train(experiment, tmp_path / "parts"), whole)
    assert set(whole.ema) == {"artist.w", "artist.b"}
    lines = {line["step"]: line for line in records.read(tmp_path / "whole" / "metrics.jsonl")}
    assert [step for step, line in lines.items() if "artist/loss" in line] == [4]
    assert all("critic/loss" in line for line in lines.values())


def test_a_game_is_the_same_on_a_mesh(tmp_path):
    one, several = (train(toys.experiment(Slow(), mesh=MeshConfig(*m)), tmp_path / str(m)) for m in ((1,), (2, 2, 2)))
    same(several, one, 1e-5)
