"""Steps that change nothing: those that are not finite, and spikes of the gradient."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.core.config import ConfigError
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.training import records, spikes
from t2i_jax.training.guard import NotFinite
from t2i_jax.training.loop import train
from t2i_jax.training.trainer import Trainer
from tests.fixtures import toys
from tests.fixtures.runs import same, stop_after


@dataclasses.dataclass(frozen=True)
class Odd(toys.Numbers):
    """Numbers that are multiplied by `factor` in the batches of some steps."""

    steps: tuple[int, ...] = ()
    factor: float = float("inf")

    def batches(self, text=None, position=0, *rest):
        for step, batch in enumerate(super().batches(text, position, *rest), position // self.batch_size + 1):
            yield {"x": batch["x"] * np.float32(self.factor if step in self.steps else 1)}


def states(experiment, folder):
    """The state before the first step and after each one, on the host, by name."""
    trainer = Trainer(experiment, folder)
    state = trainer.start()
    with jax.set_mesh(trainer.mesh):
        batches = trainer.batches(0)
        yield jax.device_get(state.flat())
        for _ in range(experiment.train.steps):
            state, _ = trainer.step(state, trainer.frozen, next(batches))
            yield jax.device_get(state.flat())


def changed(before, after):
    return {k for k, v in before.items() if not np.array_equal(v, after[k])}


@pytest.mark.parametrize(("mesh", "spike"), [((1, 1, 1), 0.0), ((1, 4, 2), 9.0)])
def test_a_step_that_is_not_finite_changes_nothing_to_the_bit(tmp_path, mesh, spike):
    experiment = toys.experiment(data=Odd(steps=(3, 4)), mesh=MeshConfig(*mesh), steps=5, spike=spike)
    all_states = list(states(experiment, tmp_path))
    moved = [changed(a, b) for a, b in itertools.pairwise(all_states)]
    assert moved[2] == moved[3] == {"step"}
    assert moved[4] >= {"step", "params/layers.w", "ema/layers.w", "carried/seen"}
    assert any(k.startswith("optimizer/") for k in moved[4]) and all_states[5]["step"] == 5


def test_a_spike_changes_nothing_but_the_running_mean(tmp_path, monkeypatch):
    monkeypatch.setattr(spikes, "WINDOW", 3)
    data = Odd(steps=(5,), factor=100.0)
    with_limit = list(states(toys.experiment(data=data, steps=6, spike=4.0), tmp_path))
    names = {"step", "gradient_norms/model/mean"}
    assert changed(with_limit[4], with_limit[5]) == names
    assert changed(with_limit[5], with_limit[6]) > names
    without = list(states(toys.experiment(data=data, steps=5), tmp_path))
    assert "params/layers.w" in changed(without[4], without[5])
    assert not [k for k in without[0] if k.startswith("gradient_norms")]


def test_skipped_steps_are_counted_and_said(tmp_path, capsys):
    experiment = toys.experiment(data=Odd(steps=(2, 4)), log_every=3, tolerate=1)
    stop_after(experiment, tmp_path, 3)
    train(experiment, tmp_path)
    lines = {line["step"]: line for line in records.read(tmp_path / "metrics.jsonl")}
    assert {step: line["skipped"] for step, line in lines.items()} == {2: 1, 3: 1, 4: 2, 6: 2}
    assert lines[4]["loss"] is None and lines[6]["loss"] > 0
    printed = capsys.readouterr().err
    assert (
        "step 4: the loss or a gradient is not finite; it changes nothing (2 such steps in all, 1 in a row" in printed
    )


@pytest.mark.parametrize("tolerate", [0, 1, 2])
def test_one_more_in_a_row_than_is_tolerated_ends_the_run(tmp_path, tolerate):
    experiment = toys.experiment(data=Odd(steps=(2, 3, 4)), tolerate=tolerate)
    with pytest.raises(NotFinite, match=f"^step {tolerate + 2}: .*first operation.*train.tolerate") as error:
        train(experiment, tmp_path)
    assert "\n" not in str(error.value)


def test_a_run_without_a_finite_step_is_no_success(tmp_path):
    with pytest.raises(NotFinite, match="step 3: "):
        train(toys.experiment(data=Odd(steps=(1, 2, 3)), steps=3), tmp_path)


def test_a_spike_is_said_with_its_norm(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(spikes, "WINDOW", 3)
    experiment = toys.experiment(data=Odd(steps=(5,), factor=100.0), spike=4.0)
    whole = train(experiment, tmp_path / "whole")
    assert (
        "step 5: gradient_norm" in (printed := capsys.readouterr().err) and "over 4 times the running mean" in printed
    )
    stop_after(experiment, tmp_path / "parts", 4)  # the mean goes with the checkpoint
    same(train(experiment, tmp_path / "parts"), whole)


def test_norms_that_are_larger_for_good_are_soon_no_spikes():
    state = {"mean": jnp.float32(1), "seen": jnp.int32(spikes.WINDOW)}
    look, found = jax.jit(lambda s, norm: spikes.find_spike(s, norm, 3.0, True)), []
    for _ in range(60):
        spike, state = look(state, 6.0)
        found.append(bool(spike))
    first = found.index(False)
    assert found[0] and 0 < first < 50 and not any(found[first:])


def test_the_first_steps_are_no_spikes_and_their_mean_is_plain():
    state = spikes.start_norms(["model"])["model"]
    norms = [8.0, 1.0, 100.0, 3.0]
    for norm in norms:
        spike, state = spikes.find_spike(state, jnp.float32(norm), 2.0, True)
        assert not spike
    assert float(state["mean"]) == pytest.approx(np.mean(norms)) and int(state["seen"]) == 4
    _, same_state = spikes.find_spike(state, jnp.float32(9), 2.0, jnp.asarray(False))
    assert same_state == state


@pytest.mark.parametrize("limit", [0.5, 1.0])
def test_a_limit_that_makes_spikes_of_usual_steps_is_refused(limit):
    with pytest.raises(ConfigError, match=r"train\.spike .* above 1"):
        toys.experiment(spike=limit)
