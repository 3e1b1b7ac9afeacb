"""`t2i plot`: the metrics of runs over their steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from t2i_jax.core.config import ConfigError, parse
from t2i_jax.core.console import stdout
from t2i_jax.core.outputs import local


@dataclasses.dataclass(frozen=True)
class PlotArguments:
    """Draw the loss and the other metrics of one or several runs into a PNG file.

    Held-out values are dashed. Example: t2i plot runs/a runs/b --metrics loss --out losses.png
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path | None = None
    """curves.png in the folder of the first run, unless given"""
    metrics: tuple[str, ...] = ()
    """names, as loss; all but rates of computing unless given"""


def run(arguments: list[str]) -> None:
    args = parse(PlotArguments, arguments, "t2i plot")
    if not args.runs:
        raise ConfigError("t2i plot: name a run, as runs/quickstart/model")
    from t2i_jax.training.curves import plot_runs

    out = local(args.out or args.runs[0] / "curves.png")
    names = plot_runs(args.runs, out, args.metrics)
    stdout().print(f"{out}: {', '.join(names)}", markup=False, highlight=False, soft_wrap=True)
