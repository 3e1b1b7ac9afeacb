"""The content of the config.json of a folder: of a run, or of a released model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NotRequired, Protocol, TypedDict, cast

from t2i_jax.core.conditions import Tokenizer
from t2i_jax.core.config import ConfigError, read_stored
from t2i_jax.core.types import Trainable
from t2i_jax.nn.lora import LoRA


class Released(TypedDict):
    """The content of the config.json of a released model."""

    model: Trainable
    text: NotRequired[Tokenizer | None]
    codec: NotRequired[str]
    step: NotRequired[int]
    image_size: NotRequired[int]


class StoredTrain(Protocol):
    """The members of a run's `training.experiment.Train` that are read here."""

    start: str
    lora: LoRA


class StoredRun(Protocol):
    """The members of a run's `training.experiment.Experiment` that are read here."""

    model: Trainable
    train: StoredTrain
    text: Tokenizer | None
    codec: str
    data: object


def released(folder: Path) -> Released:
    """The contents of a released model's config.json. Errors: `ConfigError` where it is another program's."""
    content = read_stored(folder / "config.json")
    if not isinstance(content, dict) or not dataclasses.is_dataclass(content.get("model")):
        raise ConfigError(f"{folder}: its config.json is not that of a released model of t2i_jax")
    return cast(Released, content)


def stored(folder: Path) -> StoredRun:
    """The experiment of a run. Errors: `ConfigError` where its config.json is another program's."""
    experiment = read_stored(folder / "config.json")
    if not dataclasses.is_dataclass(experiment) or "model" not in {f.name for f in dataclasses.fields(experiment)}:
        raise ConfigError(f"{folder}: its config.json is not that of a run of t2i_jax")
    return cast(StoredRun, experiment)
