"""`t2i compare`: several models with equal compute, in one report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from t2i_jax import comparison
from t2i_jax.core import config
from t2i_jax.core.config import parse
from t2i_jax.core.console import console
from t2i_jax.core.fields import LARGEST, Checked, Range
from t2i_jax.core.outputs import local


@dataclasses.dataclass(frozen=True)
class CompareArguments(Checked):
    """Train several models with equal compute, draw from each, sweep sampling options, and write one report.

    Earlier training and measurements are kept: the same command continues.
    Example: t2i compare configs/compare_discrete.py --out docs/results/discrete --count 100
    """

    config: tyro.conf.Positional[Path]
    """a file whose `experiment` is a `t2i_jax.comparison.Comparison`"""
    out: Path
    """OUT.md, OUT.json, OUT.png and a plot for each sweep"""
    runs: Path | None = None
    """folder of the runs; runs/NAME of the config file unless given"""
    count: Annotated[int | None, Range(1, LARGEST)] = None
    flops: Annotated[float | None, Range(above=0)] = None
    """training compute of each run; the config's own unless given"""


def run(arguments: list[str]) -> None:
    args = parse(CompareArguments, arguments, "t2i compare")
    local(args.out)
    wanted = config.load(args.config)
    if not isinstance(wanted, comparison.Comparison):
        raise config.ConfigError(f"{args.config}: `experiment` must be a Comparison, not a {type(wanted).__name__}")
    given = {k: v for k, v in {"count": args.count, "flops": args.flops}.items() if v is not None}
    command = f"t2i compare {' '.join(arguments)}"
    runs = args.runs or Path("runs") / args.config.stem
    comparison.run(dataclasses.replace(wanted, **given), runs, args.out, command)
    console.print(f"{args.out}.md and its images", soft_wrap=True)
