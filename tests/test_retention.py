"""Which checkpoints stay: the newest, every n-th step, the best by a metric."""

import dataclasses
import math

import jax
import pytest

from t2i_jax.core.config import ConfigError
from t2i_jax.storage.checkpoints import Best, Checkpoints
from t2i_jax.training import records
from t2i_jax.training.experiment import Train
from t2i_jax.training.loop import train
from t2i_jax.training.trainer import Trainer
from tests.fixtures import toys

VALUES = [5.0, 3.0, None, 4.0, math.nan, 2.5, 2.5, None, 7.0, 3.0, 9.0, 1.0, 2.0]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(toys.experiment(), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def state(trainer):
    return trainer.start()


def kept(steps, keep, every, sign):
    """What has to be there after the last of `steps`, of those that were there or are new."""
    there = set()
    for i, step in enumerate(steps):
        there |= {step}
        values = {s: sign * VALUES[s - 1] for s in there if math.isfinite(VALUES[s - 1] or math.nan)}
        best = {max(values, key=lambda s: (values[s], s))} if sign and values else set()
        there &= {*steps[: i + 1][-keep:], *(s for s in there if every and s % every == 0), *best}
    return sorted(there)


@pytest.mark.parametrize("keep, every, best, sign", [(3, 0, "", 0), (1, 0, "val/loss", -1), (2, 4, "max val/loss", 1)])
def test_what_stays(tmp_path, state, keep, every, best, sign):
    """Also where the run begins anew in between: what was best is read from the checkpoints."""
    open_ = lambda: Checkpoints(tmp_path, keep, 3, 10.0, every, best)
    writer, steps = open_(), list(range(1, len(VALUES) + 1))
    for step, value in zip(steps, VALUES, strict=True):
        metrics = {} if value is None else {"val/loss": value, "val/rms": -value}
        before = [VALUES[s - 1] for s in writer.steps() if math.isfinite(VALUES[s - 1] or math.nan)]
        wanted = bool(sign and metrics and math.isfinite(value) and all(sign * value > sign * v for v in before))
        assert writer.better(metrics) == wanted
        writer.save(state, step, step, metrics)
        writer.finish(state, step, step)
        assert writer.steps() == kept(steps[:step], keep, every, sign), step
        if step % 4 == 3:
            writer.close()
            writer = open_()
    writer.close()
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdecimal()) == kept(steps, keep, every, sign)


def test_a_damaged_best_checkpoint_does_not_stop_a_run(tmp_path, trainer, state):
    writer = Checkpoints(tmp_path, 1, best="val/loss")
    for step, value in ((1, 1.0), (2, 3.0)):
        writer.save(state, step, step, {"val/loss": value})
    writer.close()
    for file in (tmp_path / "1" / "meta").rglob("*"):
        if file.is_file():
            file.write_bytes(b"{")
    writer = Checkpoints(tmp_path, 1, best="val/loss")
    with jax.set_mesh(trainer.mesh):
        assert writer.restore(trainer.target)[1] == 2
    assert writer.better({"val/loss": 2.0}) and not writer.better({"val/loss": 3.0})
    writer.save(state, 3, 3, {"val/loss": 2.0})
    writer.close()
    assert 3 in writer.steps() and 2 not in writer.steps()


def test_a_write_that_failed_is_not_the_best(tmp_path, state, monkeypatch):
    writer = Checkpoints(tmp_path, 1, retries=3, backoff=0.0, best="val/loss")
    writer.save(state, 1, 1, {"val/loss": 2.0})
    writer.finish(state, 1, 1)
    with monkeypatch.context() as patch:
        patch.setattr(writer.manager, "save", lambda *a, **k: (_ for _ in ()).throw(OSError("full")))
        writer.save(state, 2, 2, {"val/loss": 1.0})
    assert writer.again(3) and writer.better({"val/loss": 1.5})
    writer.save(state, 3, 3)
    writer.close()
    assert writer.steps() == [1, 3]


# --- runs -------------------------------------------------------------------------------------------------------------


def scripted(monkeypatch, values):
    """Evaluation gives the values of the steps; the steps at which it was asked for."""
    asked = []

    def evaluate(trainer, state):
        asked.append(int(state.step))
        return {"val/loss": values[asked[-1]], "val/accuracy": -values[asked[-1]]}

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    return asked


def on_disk(folder):
    reader = Checkpoints(folder / "checkpoints")
    steps = reader.steps()
    reader.close()
    return steps


@pytest.mark.parametrize("best", ["val/loss", "min val/loss", "max val/accuracy"])
def test_a_run_saves_and_keeps_its_best(tmp_path, monkeypatch, best):
    """Also between the steps at which it saves anyhow; each evaluation is made once, and in the metrics."""
    asked = scripted(monkeypatch, {2: 5.0, 4: 3.0, 6: 4.0, 8: 6.0, 10: 3.5, 11: 3.25})
    settings = {"steps": 11, "save_every": 3, "keep": 2, "evaluate_every": 2}
    train(toys.experiment(**settings, keep_best=best), tmp_path)
    assert on_disk(tmp_path) == [4, 9, 11] and asked == [2, 4, 6, 8, 10, 11]
    lines = {line["step"]: line for line in records.read(tmp_path / "metrics.jsonl") if "val/loss" in line}
    assert lines[4]["val/loss"] == 3.0 and len(lines) == 6


def test_every_nth_step_stays(tmp_path):
    """Saved too, where `save_every` does not; and a run may go on with another rule."""
    experiment = toys.experiment(steps=9, save_every=4, keep=1, keep_every=3)
    train(experiment, tmp_path)
    assert on_disk(tmp_path) == [3, 6, 9]
    other = dataclasses.replace(experiment.train, keep_every=2, keep=2, keep_best="val/loss", evaluate_every=1)
    train(dataclasses.replace(experiment, train=other), tmp_path)


def test_the_default_keeps_three(tmp_path):
    train(toys.experiment(steps=6, save_every=1), tmp_path)
    assert on_disk(tmp_path) == [4, 5, 6]


@pytest.mark.parametrize("best", ["val/accuracy", "loss", "least val/loss", "max loss", "min  ", "val/"])
def test_a_metric_without_a_direction_is_refused(best):
    with pytest.raises(ConfigError, match=r"train\.keep_best '.*': say whether lower or higher is better"):
        Train(keep_best=best)


def test_a_best_checkpoint_needs_evaluation(tmp_path):
    with pytest.raises(ConfigError, match=r"set train\.evaluate_every"):
        Train(keep_best="val/loss", evaluate_every=0)
    experiment = toys.experiment(keep_best="max val/clip", evaluate_every=2)
    with pytest.raises(ConfigError, match=r"gives no 'val/clip', only val/loss, val/rms"):
        train(experiment, tmp_path)


def test_names_of_metrics():
    assert Best.parse("val/critic/loss").sign == -1 and Best.parse(" max val/psnr ").metric == "val/psnr"
