"""Published outputs and ours: how a folder is read, and how near is near enough."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).parent
SMALL = HERE / "oracles"
MASKED = -1e29  # published outputs write this and less for minus infinity


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A folder: `meta.json`, `weights.safetensors`, `inputs.npz` and `outputs.npz` of a published program."""

    path: Path

    @cached_property
    def meta(self) -> dict[str, Any]:
        return json.loads((self.path / "meta.json").read_text())

    @property
    def config(self) -> dict[str, Any]:
        return self.meta["config"]

    def read_note(self, name: str, pattern: str, default: str = "") -> str:
        """What the line about the output `name` says where `pattern` has its group; `default` where it says nothing."""
        found = re.search(pattern, self.meta.get("outputs", {}).get(name, {}).get("what", ""))
        return found[1] if found else default

    @cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        return dict(np.load(self.path / "inputs.npz"))

    @cached_property
    def outputs(self) -> dict[str, np.ndarray]:
        return dict(np.load(self.path / "outputs.npz"))

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        return load_file(self.path / "weights.safetensors")

    @property
    def released(self) -> Path:
        """The folder of the released files that it was made with, where it has no weights of its own."""
        return (self.path / self.meta["weights_files"][0]).parent


@dataclasses.dataclass(frozen=True)
class Line:
    """One array's verdict."""

    name: str
    passed: bool
    error: float
    note: str = ""

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name:40s} {self.error:9.2e} {self.note}".rstrip()


@dataclasses.dataclass(frozen=True)
class InDouble:
    """An array computed in float64, for what fp32 itself computes inexactly, and the same computed in fp32."""

    exact: np.ndarray
    single: np.ndarray

    @property
    def noise(self) -> float:
        """What rounding to fp32 makes of it, relative in norm."""
        return float(np.linalg.norm(self.single - self.exact) / max(np.linalg.norm(self.exact), 1e-30))


def systems() -> dict[str, Any]:
    """The function of every known system, by the name that `meta.json` gives it."""
    files = sorted((HERE / "systems").glob("[a-z]*.py"))
    modules = [importlib.import_module(f"tests.published.systems.{file.stem}") for file in files]
    return {name: system for module in modules for name, system in module.SYSTEMS.items()}


def check(oracle: Oracle) -> Iterator[Line]:
    """A line for every published array: integers equal but for ties, floats to 1e-4 in norm and 1e-3 at worst,
    float64 (schedules) to 1e-6.

    The published fp32 program is no nearer to an array than fp32 comes. Where we compute one in float64 and our own
    fp32 is off by more than 1e-5 in norm, the limits grow in proportion, to ten times that, and to 1e-3 at most.
    """
    known, system = systems(), oracle.meta["system"]
    if system not in known:
        raise ValueError(f"{oracle.path}: system '{system}' is not one of {', '.join(sorted(known))}")
    ours = known[system](oracle)
    for name, theirs in oracle.outputs.items():
        if "margin" in name:
            continue
        if name not in ours:
            yield Line(name, False, np.inf, "not computed")
        else:
            mine = ours[name]
            mine, noise = (mine.exact, mine.noise) if isinstance(mine, InDouble) else (mine, 0.0)
            yield compare(name, np.asarray(mine), theirs, margin(name, theirs, oracle.outputs), noise)


def margin(name: str, array: np.ndarray, outputs: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """How near each integer of `array` was to a tie, where the folder says."""
    stem = name.replace("tokens", "margin")
    candidates = [stem, f"{name}_margin", *(k for k in outputs if "margin" in k)]
    return next(
        (outputs[k] for k in candidates if k != name and k in outputs and outputs[k].shape == array.shape), None
    )


def compare(
    name: str, ours: np.ndarray, theirs: np.ndarray, margins: np.ndarray | None = None, noise: float = 0.0
) -> Line:
    """The verdict on one array. noise: how far off fp32 is in it, see `InDouble`."""
    if ours.shape != theirs.shape:
        return Line(name, False, np.inf, f"shape {ours.shape}, published {theirs.shape}")
    if theirs.dtype.kind in "iub":
        wrong = ours != theirs
        ties = wrong & (margins < 1e-3) if margins is not None else np.zeros_like(wrong)
        if ties.any() and margins is not None and ours.ndim > 1:  # what follows a tie in a row may differ
            ties = wrong & (np.cumsum(ties.reshape(*ties.shape), -1) > 0)
        note = f"{int(ties.sum())} of {wrong.size} after ties" if ties.any() else ""
        return Line(name, not (wrong & ~ties).any(), float((wrong & ~ties).mean()), note)
    if not np.array_equal(np.isnan(ours), np.isnan(theirs)):
        return Line(name, False, np.inf, f"{int(np.isnan(ours).sum())} NaN, published {int(np.isnan(theirs).sum())}")
    gone = (theirs <= MASKED) | ~np.isfinite(theirs)
    if ((ours <= MASKED) | ~np.isfinite(ours) != gone).any():
        return Line(name, False, np.inf, "other entries are masked")
    schedule = theirs.dtype == np.float64
    ours, theirs = (np.where(gone, 0, a).astype(np.float64) for a in (ours, theirs))
    norm, worst = np.linalg.norm(theirs), np.abs(theirs).max(initial=0)
    error = float(np.linalg.norm(ours - theirs) / norm) if norm else float(np.linalg.norm(ours))
    limit = 1e-6 if schedule else min(max(1e-4, 10 * noise), 1e-3)
    apart = np.abs(ours - theirs) > 10 * max(limit, 1e-4) * (np.abs(theirs) + worst)
    note = f"{int(apart.sum())} apart" if apart.any() else f"fp32 is off by {noise:.1e}" if limit > 1e-4 else ""
    return Line(name, error <= limit and not apart.any(), error, note)
