"""The train step of a config on random batches, against the FLOP/s of a matrix product and the peak of the chip."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from t2i_jax.bench.baselines import baseline
from t2i_jax.bench.measure import (
    EAGER,
    LIMITS,
    Arguments,
    Measure,
    Result,
    interleaved,
    limits,
    print_results,
    read_arguments,
    seconds,
    table,
    weights,
)
from t2i_jax.core import flops
from t2i_jax.core.config import refused
from t2i_jax.core.fields import Size, values
from t2i_jax.core.memory import check_memory
from t2i_jax.core.sharding import batch_sharding
from t2i_jax.plan.ready import Batch, batch_of, without_parts
from t2i_jax.training.experiment import Experiment, load_experiment
from t2i_jax.training.optimizer import Optimizer
from t2i_jax.training.trainer import Trainer


def random_batch(experiment: Experiment, shapes: Batch) -> dict[str, np.ndarray]:
    """Arrays of these shapes such as data might give: codes and bytes at random, all text present."""
    rng = np.random.default_rng(0)
    codes = experiment.model.batch_spec().get("codes")
    most = {"codes": (codes.high or 1) + 1 if codes else 2, "label": 2, "image": 256}

    def one(name: str, x: jax.ShapeDtypeStruct) -> np.ndarray:
        if x.dtype == bool:
            return np.ones(x.shape, bool)
        if jnp.issubdtype(x.dtype, jnp.integer):
            return rng.integers(0, most.get(name, 2), x.shape).astype(x.dtype)
        return rng.standard_normal(x.shape, np.float32).astype(x.dtype)

    return {name: one(name, x) for name, x in shapes.items()}


FEW = 64
"""Rows of a batch before they repeat."""


def on_mesh(experiment: Experiment, shapes: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """A global batch of random rows, which repeat after FEW: each process makes those of its own devices alone."""
    if jax.default_backend() == "cpu" and jax.process_count() == 1:
        check_memory("the batch", sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes.values()))
    few = {k: jax.ShapeDtypeStruct((min(FEW, x.shape[0]), *x.shape[1:]), x.dtype) for k, x in shapes.items()}

    def put(x: np.ndarray, whole: jax.ShapeDtypeStruct) -> jax.Array:
        rows = np.arange(whole.shape[0])
        take = lambda index: np.take(x, rows[index[0]], axis=0, mode="wrap")
        return jax.make_array_from_callback(whole.shape, batch_sharding(mesh), take)

    return {k: put(x, shapes[k]) for k, x in random_batch(experiment, few).items()}


def bench_train(
    experiment: Experiment, shapes: Batch, repeats: int = 5, name: str = "step", eager: bool = False
) -> Result:
    """Seconds of a step, and the limits; the step donates its state, so every call is the next step.

    Returns images/s, the step's model FLOPs and FLOP/s (three times the forward pass, no recomputation), `of_limit`,
    their share of the FLOP/s of a matrix product in the model's dtype on all devices, `mfu` where the chip's peak is
    known, and compile seconds; with `eager` also the seconds of the same step in eager PyTorch on a CPU. Errors: those
    of a trainer; `ConfigError` for `eager` of a model that is not among those of `benchmarks/pytorch`.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(without_parts(experiment, shapes), folder)
    batch = on_mesh(experiment, shapes, trainer.mesh)
    state = trainer.start()

    def step() -> object:
        nonlocal state
        with jax.set_mesh(trainer.mesh):
            state, metrics = trainer.step(state, trainer.frozen, batch)
        return metrics

    first = seconds(step)
    seconds(step)
    measures = {"seconds": lambda: seconds(step)}
    if eager:
        measures["eager"] = _in_pytorch(experiment, batch)
        measures["eager"]()  # its memory is at hand too
    found, spread = interleaved({**measures, **limits(experiment.model.compute.dtype)}, repeats)
    work, devices = trainer.flops(batch), trainer.mesh.size
    peak = flops.peak(jax.devices()[0])
    result = {
        "name": name,
        "batch": experiment.data.batch_size,
        "parameters": sum(x.size for x in jax.tree.leaves(trainer.target.params)),
        **found,
        "spread": spread["seconds"],
        "compile": first - found["seconds"],
        "images_per_second": experiment.data.batch_size / found["seconds"],
        "model_flops": work,
        "flops_per_second": work / found["seconds"],
        "of_limit": work / found["seconds"] / found["flops"] / devices,
    }
    return result | ({"mfu": work / found["seconds"] / peak / devices} if peak else {})


def _in_pytorch(experiment: Experiment, batch: dict[str, jax.Array]) -> Measure:
    family = experiment.model
    train, published = experiment.train, Optimizer()
    with refused("--eager"):
        given, wanted = values(train.optimizer), values(published)
        odd = [f for f in ("name", "b1", "b2", "clip") if given[f] != wanted[f]]
        odd = [f"optimizer.{f}" for f in odd] + ["accumulate"] * (train.accumulate != 1)
        if odd:
            raise ValueError(f"the comparison in PyTorch is of AdamW on whole batches: not train.{odd[0]}")
        if missing := {"label", "codes"} - set(batch):
            raise ValueError(f"the comparison in PyTorch learns codes of classes; the batch has no {min(missing)}")
        eager_torch = baseline("autoregressive")
        theirs = eager_torch.Training(eager_torch.Decoder(family, weights(family.init)), ema=experiment.train.ema)
    return lambda: seconds(lambda: theirs.step(batch["label"], batch["codes"]))


@dataclasses.dataclass(frozen=True)
class TrainBench(Arguments):
    """The train step of a config, on random batches of the shapes that it reads: how fast it is without its data.

    Of several processes (launchers start it as they start `train`) the first one reports the result of all.
    Fields of the config can be set as for `train`. Example: t2i bench train configs/glyphs_ar.py --encoded
    """

    config: tyro.conf.Positional[Path]
    inputs: tuple[str, ...] = ()
    """NAME:DTYPE:SHAPE of what a batch holds of each example, where neither data nor model say it"""
    encoded: bool = False
    """do not look at the data; take codes and features as computed before"""
    repeats: Size = 5
    eager: bool = False
    """measure the same step in eager PyTorch on the CPU too, which has to be installed; of an `AR` on classes"""


A = TypeVar("A", bound=TrainBench)


def prepared(kind: type[A], arguments: list[str], prog: str) -> tuple[A, Experiment, Batch]:
    """The command's arguments, the experiment with the other ones set, and the shapes of its batch."""
    args, rest = read_arguments(kind, arguments, prog, some=True)
    experiment = load_experiment(args.config, rest)
    return args, experiment, batch_of(experiment, args.inputs, args.encoded)[0]


ROWS: dict[str, Callable[[Result], str]] = {
    "images / s": lambda r: f"{r['images_per_second']:.3g}",
    "seconds a step": lambda r: f"{r['seconds']:.3f} (spread {r['spread']:.0%})",
    "model GFLOPs a step": lambda r: f"{r['model_flops'] / 1e9:.1f}",
    "GFLOP/s": lambda r: f"{r['flops_per_second'] / 1e9:.1f}",
    "share of a matrix product's": lambda r: f"{r['of_limit']:.0%}",
    **EAGER,
    "MFU": lambda r: f"{r['mfu']:.0%}",
    "compile, seconds": lambda r: f"{r['compile']:.1f}",
    **LIMITS,
}


def main(arguments: list[str]) -> None:
    """`t2i bench train CONFIG ...`"""
    args, experiment, shapes = prepared(TrainBench, arguments, "t2i bench train")
    result = bench_train(experiment, shapes, args.repeats, f"batch {experiment.data.batch_size}", args.eager)
    kind, millions = type(experiment.model).__name__, result["parameters"] / 1e6
    devices = f"{jax.devices()[0].device_kind}, {jax.device_count()} devices"
    title = f"{args.config}: {kind}, {millions:.1f} M parameters, {devices}"
    print_results("train", [{"config": str(args.config)} | result], table(title, [result], ROWS), args.out)
