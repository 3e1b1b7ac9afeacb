"""The config of a run and its changes since the run began: `config.json` and `history.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import jax
import numpy as np

from t2i_jax.core.config import ConfigError, changes, differences, to_json, write_stored
from t2i_jax.core.fields import free_fields
from t2i_jax.core.migration import VERSION, Json
from t2i_jax.core.outputs import write_text
from t2i_jax.core.params import within
from t2i_jax.storage.artifacts import bundle_files
from t2i_jax.training.experiment import Experiment, load_experiment
from t2i_jax.training.objectives import by_optimizer, updates
from t2i_jax.training.records import read

FILE = "history.jsonl"
"""A line for each time that a run went on with another config: step, date, and each field's value before and after,
by the names of the `version` of configs that wrote it."""
NAMED = 12
"""Fields that a message names."""


class History:
    """The change of config with which a run begins or goes on.

    resumed: whether the run has a checkpoint; else it begins, with any config. accept: take changes of any field, not
    only of those that do not change the mathematics (`core.fields.FREE`). Errors: `ConfigError` that names the changed
    fields.
    """

    def __init__(self, experiment: Experiment, folder: Path, resumed: bool, accept: bool = False):
        self.experiment, self.folder, self.old = experiment, folder, experiment
        self.changes: dict[str, tuple[Json, Json]] = {}
        path = folder / "config.json"
        if not resumed or not path.exists():
            return
        # A field that is newer than the run had the value that is its default now.
        self.old = load_experiment(path)
        old, new = to_json(self.old), to_json(experiment)
        self.changes = changes(old, new)
        free = free_fields(self.old) | free_fields(experiment)
        refused = [k for k in self.changes if not any(within(f, k) for f in free)]
        if refused and not accept:
            lines = [line for line in differences(old, new) if line.split(": ")[0] in refused]
            more = f"; and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
            raise ConfigError(
                f"{folder} was begun with another config: {'; '.join(lines[:NAMED])}{more}. Put the old values back, "
                "choose another --run, or go on with these by --accept-changes"
            )

    def note(self, step: int, say: Callable[[str], None]) -> None:
        """Write the config of a run that goes on from `step`, and its changes; log them, and the new learning rates."""
        if self.changes:
            for line in self._rates(step):
                say(line)
        if jax.process_index():
            return
        if self.changes:
            date = datetime.now(UTC).isoformat(timespec="seconds")
            line = {"step": step, "date": date, "version": VERSION}
            line |= {"changes": {k: list(v) for k, v in self.changes.items()}}
            lines = [*read(self.folder / FILE), line]
            write_text(self.folder / FILE, "".join(json.dumps(line) + "\n" for line in lines))
        write_stored(self.folder / "config.json", self.experiment)
        bundle_files(self.experiment.text, self.folder)

    def _rates(self, step: int) -> list[str]:
        """Messages on the learning rates after `step`, where they differ or depend on a changed length."""
        messages, old, new = [], learning_rates(self.old, step), learning_rates(self.experiment, step)
        train = self.experiment.train
        for name, rate in new.items():
            ends = train.optimizer_of(name).ends and "train.steps" in self.changes
            if name in old and (ends or rate != old[name]):
                whose = f" of {name}" if len(new) > 1 else ""
                length = f": its schedule ends at step {train.steps}" if ends else ""
                line = f"after step {step} the learning rate{whose} was {old[name]:.4g} and is {rate:.4g}{length}"
                messages.append(line)
        return messages


def learning_rates(experiment: Experiment, step: int) -> dict[str, float]:
    """The learning rate of the update that follows `step`, by optimiser."""
    train, rates = experiment.train, {}
    for name, objectives in by_optimizer(experiment.model.objectives()).items():
        schedule = train.optimizer_of(name).learning_rates(max(updates(objectives, train.steps), 1))
        rates[name] = float(np.asarray(schedule(updates(objectives, step))))
    return rates
