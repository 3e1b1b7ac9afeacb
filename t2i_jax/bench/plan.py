"""What a plan counts for the train step of a config, at the limits measured here, against the step itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from t2i_jax.bench.measure import LIMITS, Result, print_results, seconds, table
from t2i_jax.bench.train import TrainBench, bench_train, prepared
from t2i_jax.plan.chips import REACHED
from t2i_jax.plan.estimate import trace
from t2i_jax.plan.ready import Batch
from t2i_jax.training.experiment import Experiment


def bench_plan(experiment: Experiment, shapes: Batch, repeats: int = 5) -> Result:
    """`bench_train`, and what `plan.estimate` counts: FLOPs (recomputation included), bytes of products and of state.

    `planned` seconds are the larger of FLOPs over FLOP/s and bytes over bytes/s as measured in the same run, each
    divided by the share that plans take programs to reach; `of_planned` is measured over planned. One device.
    """
    result = bench_train(experiment, shapes, repeats, "step")
    counting = seconds(lambda: trace(experiment, shapes) and None)
    traced = trace(experiment, shapes)
    # A step reads the parameters and the state around them, and writes the state anew.
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(traced.target))
    moved = traced.moved + 2 * state
    compute = traced.flops / result["flops"] / REACHED["flops"]
    memory = moved / result["copy"] / REACHED["memory"]
    planned = max(compute, memory)
    more = {"counted_flops": traced.flops, "counted_bytes": moved, "compute": compute, "memory": memory}
    return result | more | {"planned": planned, "of_planned": result["seconds"] / planned, "counting": counting}


@dataclasses.dataclass(frozen=True)
class PlanBench(TrainBench):
    """How far what a plan counts is from the train step of a config on this machine.

    Fields of the config can be set as for `train`. Example: t2i bench plan configs/glyphs_ar.py --encoded
    """


ROWS: dict[str, Callable[[Result], str]] = {
    "seconds a step, measured": lambda r: f"{r['seconds']:.3f} (spread {r['spread']:.0%})",
    "planned": lambda r: f"{r['planned']:.3f}",
    "measured / planned": lambda r: f"{r['of_planned']:.2f}",
    "products alone": lambda r: f"{r['compute']:.3f}",
    "memory alone": lambda r: f"{r['memory']:.3f}",
    "GFLOPs counted": lambda r: f"{r['counted_flops'] / 1e9:.1f}",
    "GB counted": lambda r: f"{r['counted_bytes'] / 1e9:.2f}",
    "seconds to count them": lambda r: f"{r['counting']:.1f}",
    "compile, seconds": lambda r: f"{r['compile']:.1f}",
    **LIMITS,
}


def main(arguments: list[str]) -> None:
    """`t2i bench plan CONFIG ...`"""
    args, experiment, shapes = prepared(PlanBench, arguments, "t2i bench plan")
    result = bench_plan(experiment, shapes, args.repeats)
    title = f"{args.config}: {type(experiment.model).__name__}, {jax.devices()[0].device_kind}"
    print_results("plan", [{"config": str(args.config)} | result], table(title, [result], ROWS), args.out)
