"""A run that goes on with another config: what may change by itself, what must be accepted, and what is kept of it."""

import dataclasses
import datetime
import json

import numpy as np
import pytest

from t2i_jax.core.config import ConfigError, to_json
from t2i_jax.core.fields import free_fields
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.training import history
from t2i_jax.training.loop import train
from t2i_jax.training.optimizer import Optimizer
from tests.fixtures import toys
from tests.fixtures.families import CODECS, FAMILIES
from tests.fixtures.runs import same, stop_after

CONSTANT = Optimizer(learning_rate=0.01, warmup=2, schedule="constant")


def lines(folder):
    path = folder / history.FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rate(optimizer, steps, step):
    return f"{float(optimizer.learning_rates(steps)(step)):.4g}"


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_longer_run_says_what_becomes_of_its_rate(tmp_path, capsys, schedule):
    optimizer = Optimizer(learning_rate=0.01, warmup=2, schedule=schedule)
    train(toys.experiment(optimizer=optimizer, steps=4), tmp_path)
    assert "learning rate" not in capsys.readouterr().err
    state = train(toys.experiment(optimizer=optimizer, steps=8), tmp_path)
    said = f"after step 4 the learning rate was {rate(optimizer, 4, 4)} and is {rate(optimizer, 8, 4)}"
    assert said in (printed := capsys.readouterr().err) and "ends at step 8" in printed, printed
    assert int(state.step) == 8 and rate(optimizer, 4, 4) != rate(optimizer, 8, 4)
    (line,) = lines(tmp_path)
    assert line["step"] == 4 and line["changes"] == {"train.steps": [4, 8]}
    assert datetime.datetime.fromisoformat(line["date"]).tzinfo
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 8


def test_a_longer_run_with_a_constant_rate_says_nothing_of_it(tmp_path, capsys):
    train(toys.experiment(optimizer=CONSTANT, steps=2), tmp_path)
    train(toys.experiment(optimizer=CONSTANT, steps=3), tmp_path)
    assert "learning rate" not in capsys.readouterr().err and lines(tmp_path)[0]["changes"] == {"train.steps": [2, 3]}


def test_what_changes_no_mathematics_changes_without_a_flag(tmp_path):
    whole = train(toys.experiment(), tmp_path / "whole")
    stop_after(toys.experiment(), tmp_path / "parts", 3)
    free = {"log_every": 2, "save_every": 5, "keep": 7, "tolerate": 1, "evaluate_every": 4, "stuck_after": 9.0}
    same(train(toys.experiment(**free, mesh=MeshConfig(2)), tmp_path / "parts"), whole, 1e-5)
    assert set(lines(tmp_path / "parts")[0]["changes"]) == {f"train.{k}" for k in free} | {"mesh.data"}


def test_a_change_is_refused_on_one_line_that_names_the_flag(tmp_path):
    train(toys.experiment(steps=2), tmp_path)
    kept = (tmp_path / "config.json").read_text()
    with pytest.raises(ConfigError) as error:
        train(toys.experiment(steps=3, seed=1, ema=0.5, log_every=7), tmp_path)
    printed = str(error.value)
    assert (
        "train.seed: 0 -> 1; train.ema: 0.9 -> 0.5. " in printed
        and "--accept-changes" in printed
        and "\n" not in printed
    )
    assert "log_every" not in printed and "train.steps" not in printed
    assert (tmp_path / "config.json").read_text() == kept and not lines(tmp_path)


def test_accepted_changes_are_kept_with_their_steps(tmp_path, capsys):
    faster = dataclasses.replace(CONSTANT, learning_rate=0.02)
    train(toys.experiment(optimizer=CONSTANT, steps=2), tmp_path)
    train(toys.experiment(optimizer=faster, steps=4), tmp_path, accept_changes=True)
    assert "after step 2 the learning rate was 0.01 and is 0.02" in capsys.readouterr().err
    train(toys.experiment(optimizer=faster, steps=4), tmp_path)  # nothing has changed
    train(toys.experiment(optimizer=faster, steps=5, seed=3), tmp_path, accept_changes=True)
    first, second = lines(tmp_path)
    assert (first["step"], second["step"]) == (2, 4)
    assert first["changes"] == {"train.steps": [2, 4], "train.optimizer.learning_rate": [0.01, 0.02]}
    assert second["changes"] == {"train.steps": [4, 5], "train.seed": [0, 3]}


def test_spikes_may_be_skipped_from_any_step_on_and_no_more(tmp_path):
    """Checkpoints with and without a running mean are read by runs with the other."""
    train(toys.experiment(optimizer=CONSTANT, steps=2), tmp_path)
    state = train(toys.experiment(optimizer=CONSTANT, steps=4, spike=9.0), tmp_path, accept_changes=True)
    assert int(state.gradient_norms["model"]["seen"]) == 2
    state = train(toys.experiment(optimizer=CONSTANT, steps=5), tmp_path, accept_changes=True)
    assert state.gradient_norms is None and int(state.step) == 5


def test_an_average_may_begin_late_and_end(tmp_path):
    """It begins at the parameters of the step where the run goes on."""
    still = dataclasses.replace(CONSTANT, learning_rate=0.0)
    train(toys.experiment(optimizer=CONSTANT, steps=2, ema=0.0), tmp_path)
    state = train(toys.experiment(optimizer=still, steps=4, ema=0.5), tmp_path, accept_changes=True)
    for name, average in state.ema.items():
        np.testing.assert_array_equal(average[...], state.params[name][...], err_msg=name)
    state = train(toys.experiment(optimizer=CONSTANT, steps=5, ema=0.0), tmp_path, accept_changes=True)
    assert state.ema is None and int(state.step) == 5


def test_a_model_of_other_shapes_is_refused_and_not_written(tmp_path):
    train(toys.experiment(steps=2), tmp_path)
    kept = (tmp_path / "config.json").read_text()
    with pytest.raises(ConfigError, match="holds another model"):
        train(toys.experiment(toys.Identity(depth=2), steps=3), tmp_path, accept_changes=True)
    assert (tmp_path / "config.json").read_text() == kept and not lines(tmp_path)


def leaves(tree, at=""):
    """The dotted names of all fields of a JSON config."""
    if not isinstance(tree, dict):
        return [at]
    return [name for k, v in tree.items() for name in leaves(v, f"{at}.{k}" if at else k)]


@pytest.mark.parametrize("name", FAMILIES | CODECS)
def test_marks_of_free_fields_say_what_changes_rounding(name):
    """Remat, chunks and how samples are drawn are free; types and kernels, which change rounding, are not."""
    experiment = toys.experiment((FAMILIES | CODECS)[name])
    free = free_fields(experiment)
    everything = leaves(to_json(experiment))
    is_free = {x: any(x == f or x.startswith(f"{f}.") for f in free) for x in everything}
    assert all(any(x == f or x.startswith(f"{f}.") for x in everything) for f in free)
    marked = {x for x, yes in is_free.items() if yes}
    assert {"mesh.fsdp", "train.steps", "train.log_every", "train.previews", "train.keep", "train.tolerate"} <= marked
    assert marked >= {x for x in everything if x.endswith((".remat", ".loss_chunk")) or ".sampling." in x}
    bound = ("dtype", "kernel", "spike", "seed", "learning_rate", "width", "ema", "accumulate", "type", "batch_size")
    outside = {x for x in marked if not x.startswith("mesh.") and ".sampling." not in x}
    assert not {x for x in outside if x.split(".")[-1] in bound}
