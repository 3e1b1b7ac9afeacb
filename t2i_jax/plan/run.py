"""One call from a config to plans: what the `t2i plan` command does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from t2i_jax.core.config import ConfigError
from t2i_jax.core.outputs import write_json, write_markdown
from t2i_jax.plan.chips import Topology
from t2i_jax.plan.compiled import compile_plan, depth_of, plan_by_shallow_copies
from t2i_jax.plan.estimate import estimate, resolved, trace
from t2i_jax.plan.ready import batch_of
from t2i_jax.plan.report import Plan, markdown
from t2i_jax.plan.sweep import sweep
from t2i_jax.training.experiment import Experiment


def run(
    experiment: Experiment,
    topology: Topology,
    *,
    sample: bool = False,
    sweeping: bool = False,
    batch_sizes: Sequence[int] = (),
    compiles: int = 3,
    shallow: bool = False,
    counted: bool = False,
    images: float = 0.0,
    inputs: Sequence[str] = (),
    encoded: bool = False,
    on_progress: Callable[[str], None] = lambda _: None,
) -> list[Plan]:
    """The plans of an experiment: of its step (and its sampler), or of a sweep, best first.

    Errors: `ConfigError` for what cannot be planned, ImportError without the TPU compiler.
    """
    if sample and (counted or sweeping or not topology.compiled):
        raise ConfigError("--sample: a sampler is planned by the TPU compiler alone, and not in a sweep")
    if shallow:
        if counted or not topology.compiled:
            raise ConfigError("--shallow: its models are compiled, and nothing is with --estimate or for GPUs")
        depth_of(experiment.model)
    batch, whence = batch_of(experiment, inputs, encoded)
    if sweeping:
        plans = sweep(experiment, batch, topology, batch_sizes, 0 if counted else compiles, on_progress, shallow)
    elif counted or not topology.compiled:
        on_progress("counting the train step")
        plans = [estimate(experiment, trace(experiment, batch), topology, resolved(experiment.mesh, topology))]
    else:
        make = plan_by_shallow_copies if shallow else compile_plan
        on_progress("compiling the train step")
        plans = [make(experiment, batch, topology)]
        if sample:
            on_progress("compiling the sampler")
            plans.append(make(experiment, batch, topology, sample=True))
    return [dataclasses.replace(p, data=whence).finished(images if p.what == "train step" else 0.0) for p in plans]


def write(plans: Sequence[Plan], path: Path) -> None:
    """Plans as a list in JSON, or as a table in Markdown where the name ends in .md."""
    if path.suffix == ".md":
        write_markdown(path, markdown(plans))
    else:
        write_json(path, [p.json() for p in plans])
