"""Drawings of the metrics of runs over their steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from t2i_jax.core.errors import ConfigError, did_you_mean
from t2i_jax.core.outputs import MAKER, check_free, whole_file
from t2i_jax.training.records import read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEFT_OUT = ("step", "skipped", "images_per_second", "flops_per_second")
"""Numbers that are not drawn unless they are asked for."""
FILE = "metrics.jsonl"
Curve = tuple[np.ndarray, np.ndarray]
"""Steps, and the values at them; NaN where one was not finite."""


def curves_of(run: Path) -> dict[str, Curve]:
    """The metrics of a run by name. Errors: `ConfigError` for what is no run, and for one that has no step yet."""
    if not (run / FILE).is_file():
        raise ConfigError(f"{run}: has no {FILE}; a run of `t2i train` is wanted")
    lines = [line for line in read(run / FILE) if isinstance(line, dict) and isinstance(line.get("step"), int)]
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if isinstance(value, int | float | None):
                found.setdefault(name, []).append((line["step"], math.nan if value is None else float(value)))
    if not found:
        raise ConfigError(f"{run / FILE}: has no line yet: the run writes one after its first steps")
    columns = {name: list(zip(*points, strict=True)) for name, points in found.items()}
    return {name: (np.array(steps), np.array(values)) for name, (steps, values) in columns.items()}


def plot_runs(runs: Sequence[Path], out: Path, metrics: Sequence[str] = ()) -> list[str]:
    """Draw metrics of runs into a PNG file, a panel for each with a line for each run, and the same metric of held-out
    data as a dashed one; returns the names of the panels.

    metrics: names, as `loss`; all but rates of computing unless given. Errors: `ConfigError` as of `curves_of`, for a
    metric that no run has, and where `out` is no PNG file or another program's.
    """
    from matplotlib.figure import Figure

    if out.suffix != ".png":
        raise ConfigError(f"{out}: a plot is a .png file")
    check_free(out)
    found = {str(run): curves_of(run) for run in runs}
    every = sorted({name.removeprefix("val/") for curves in found.values() for name in curves})
    for name in metrics:
        if name not in every:
            raise ConfigError(
                f"--metrics {name}: no run has it{did_you_mean(name, every)}; there are {', '.join(every)}"
            )
    chosen = list(metrics) or [name for name in every if name not in LEFT_OUT]
    chosen.sort(key=lambda name: name != "loss")
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure((5 * columns, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, name in zip(panels, chosen, strict=False):
        _panel(axis, name, found)
    for axis in panels[len(chosen) :]:
        axis.set_visible(False)
    with whole_file(out) as temporary:
        figure.savefig(temporary, format="png", dpi=90, metadata={"Software": MAKER})
    return chosen


def _panel(axis: Axes, name: str, found: Mapping[str, Mapping[str, Curve]]) -> None:
    """One metric of all runs. The first values, which are far from all others, do not set the range."""
    later: list[np.ndarray] = []
    for number, (run, curves) in enumerate(found.items()):
        for key, style in ((name, "-"), (f"val/{name}", "--")):
            if key in curves:
                steps, values = curves[key]
                label = (f"{run}, " if len(found) > 1 else "") + ("training" if key == name else "held out")
                axis.plot(steps, values, style, label=label, color=f"C{number}", marker="." if len(steps) == 1 else "")
                later.append(values[len(values) // 20 :])
    values = np.concatenate(later)
    if (values := values[np.isfinite(values)]).size and (high := values.max()) > (low := values.min()):
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axis.set(title=name, xlabel="step")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
