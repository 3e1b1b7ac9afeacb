"""The two public functions: `load` a model, `train` an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from t2i_jax.core.config import refused
from t2i_jax.core.narrow import as_family
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.pipeline import Pipeline
from t2i_jax.previews import Previews
from t2i_jax.sampling.options import validate_options
from t2i_jax.training.experiment import Experiment
from t2i_jax.training.loop import train as train_run


def load(
    model: str | Path,
    mesh: MeshConfig = MeshConfig(),
    int8: bool = False,
    lora: Mapping[str, float] = MappingProxyType({}),
    database: str | Path = "",
) -> Pipeline:
    """The pipeline of a run folder or a released model, local, by its name in the zoo, in an object store or on a hub.

    int8: matrices of 8-bit integers, for models that sample token by token. lora: folders of adapters, runs with
    `train.lora` or released ones, and the factor of each. database: of a model that retrieves, in the place of its own.
    Errors: `ConfigError`.
    """
    return Pipeline.load(model, mesh, int8, lora, database)


def train(experiment: Experiment, run: str | Path, accept_changes: bool = False) -> None:
    """Train an experiment in the folder `run`, or resume it; preview images are saved in its `samples/`.

    accept_changes: resume although the config differs from that of the run so far. Errors: `ConfigError`, `DataError`,
    `CheckpointError`, `NotFinite`.
    """
    with refused():
        experiment.mesh.build()
    if experiment.model.capabilities.family:
        family = as_family(experiment.model)
        validate_options(family, family.options())
    train_run(experiment, run, Previews(), accept_changes)
