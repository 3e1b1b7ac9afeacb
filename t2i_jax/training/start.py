"""Begin a run from the weights of another model: what fits is taken, tables of positions and of ids are resized."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t2i_jax.core.errors import ConfigError
from t2i_jax.core.params import axes_of, named, rebuild
from t2i_jax.nn.layers import ModelState
from t2i_jax.storage.artifacts import Artifact, open_artifact
from t2i_jax.training.experiment import Experiment

M = TypeVar("M", bound=nnx.Module)
Maps = tuple[tuple[int, int], ...]
NAMED = 8
"""Arrays of each kind that a message names."""


class Part(NamedTuple):
    """The part of an array that a resized one fills."""

    axis: int
    rows: tuple[int, ...]
    """places along `axis`"""

    def filled(self, fresh: Array, value: Array) -> Array:
        """`fresh` with `value` in its place."""
        return fresh.at[(slice(None),) * self.axis + (jnp.asarray(self.rows, jnp.int32),)].set(value)


Fitted = tuple[Array, Part, str]
"""What an array of another shape gives, where, and how it was resized."""


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run takes of another model, by the names of its arrays, and what it does not."""

    source: str
    step: int
    taken: tuple[str, ...]
    """names of the arrays that are as in the other model"""
    values: Mapping[str, Array]
    """those and the resized ones"""
    parts: Mapping[str, Part]
    """where those of `values` that were resized go"""
    resized: Mapping[str, str]
    """how they were resized"""
    new: Mapping[str, str]
    """arrays that begin as in a run from nothing, and why"""
    unused: tuple[str, ...]
    """arrays of the other model that this one has no place for"""
    notes: tuple[str, ...] = ()
    """differences that no shape shows"""

    def into(self, model: M, values: Mapping[str, Array]) -> M:
        """A fresh model with `values`, those of this start, in their places."""

        def one(name: str, v: nnx.Variable) -> nnx.Variable:
            if name not in values:
                return v
            fresh, value = v.get_value(), values[name].astype(v.dtype)
            return v.replace(self.parts[name].filled(fresh, value) if name in self.parts else value)

        return rebuild(model, {name: one(name, v) for name, v in named(model).items()})

    def without(self, names: Iterable[str]) -> Start:
        """The same without the values of these arrays, which are held elsewhere."""
        gone = set(names)
        return dataclasses.replace(self, values={k: v for k, v in self.values.items() if k not in gone})

    def report(self) -> dict[str, object]:
        """The content of the run's `start.json`."""
        return {
            "from": self.source,
            "step": self.step,
            "taken": list(self.taken),
            "resized": dict(self.resized),
            "new": dict(self.new),
            "unused": list(self.unused),
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """The same in few lines."""
        count, total = len(self.taken), len(self.taken) + len(self.resized) + len(self.new)
        of = f"{self.source}, step {self.step}" if self.step else self.source
        found = [f"train.start: {count} of {total} arrays are those of {of}", *self.notes]
        for what, several in (("resized", self.resized), ("new", self.new)):
            if several:
                found.append(f"train.start: {what}: " + _some([f"{k} ({why})" for k, why in several.items()]))
        if self.unused:
            found.append(f"train.start: not used: {_some(list(self.unused))}")
        return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more, all in start.json" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def read_start(experiment: Experiment, model: nnx.Module, layout: Mapping[str, NamedSharding]) -> Start:
    """The weights with which `train.start` lets a run of `experiment` begin.

    model: with shapes in place of arrays. layout: the shardings of its arrays, by name. An array of the same name and
    shape is read onto the devices that hold it. Tables of positions are resized to the grid, those of ids and classes
    keep their rows, and the averaged weights of a run are taken where it has an average.

    Errors: `ConfigError` for a folder without a model, or with one that has nothing in common with this one.
    """
    source = experiment.train.start
    there = open_artifact(source)
    mine, theirs = named(model), named(there.artifact.model)
    common = mine.keys() & theirs.keys()
    same = {k for k in common if mine[k].shape == theirs[k].shape}
    on_all = NamedSharding(next(iter(layout.values())).mesh, P())
    laid = {k: layout[k] if k in same else on_all for k in theirs}

    def taken_of(name: str, value: Array) -> Array | Fitted | None:
        # What does not fit is whole on every device, and goes before the next array is read.
        return None if name not in common else value if name in same else fit(theirs[name], value, mine[name])

    step, arrays = there.read(laid, taken_of)

    values: dict[str, Array] = {}
    parts: dict[str, Part] = {}
    resized, new = {}, {}
    for name, v in mine.items():
        found = arrays.get(name)
        if isinstance(found, Array):
            values[name] = found
        elif found is not None:
            values[name], parts[name], resized[name] = found
        else:
            new[name] = f"{_shape(theirs[name])} there, {_shape(v)} here" if name in common else "not there"
    if not values:
        kinds = type(there.artifact.config).__name__, type(experiment.model).__name__
        raise ConfigError(f"train.start: {source} holds a {kinds[0]}, none of whose arrays this {kinds[1]} has")
    unused = tuple(k for k in theirs if k not in mine)
    taken = tuple(k for k in values if k not in parts)
    return Start(str(source), step, taken, values, parts, resized, new, unused, _notes(experiment, there.artifact))


def _shape(v: nnx.Variable) -> str:
    return "x".join(map(str, v.shape)) or "a number"


def _notes(experiment: Experiment, there: Artifact) -> tuple[str, ...]:
    found = []
    if there.text is not None and experiment.text is not None and type(there.text) is not type(experiment.text):
        kinds = type(there.text).__name__, type(experiment.text).__name__
        found.append(f"train.start: it read captions by {kinds[0]}, this run reads them by {kinds[1]}")
    if bool(there.codec) != bool(experiment.codec):
        kinds = ("codes of a codec", "pixels") if there.codec else ("pixels", "codes of a codec")
        found.append(f"train.start: it was trained on {kinds[0]}, this run is on {kinds[1]}")
    return tuple(found)


def fit(theirs: nnx.Variable, value: Array, mine: nnx.Variable) -> Fitted | None:
    """What an array of another shape gives to one of this model, where, and how; None where no rule is known.

    A table of positions is interpolated in its grid; a sequence, or a table of ids, gives the rows that both have.
    """
    if isinstance(mine, ModelState) or len(theirs.shape) != len(mine.shape):
        return None
    different = [n for n, (a, b) in enumerate(zip(theirs.shape, mine.shape, strict=True)) if a != b]
    ours, others = mine.get_metadata(), theirs.get_metadata()
    axis, axes = different[0], (None,) * (len(mine.shape) - len(axes_of(mine))) + axes_of(mine)
    if len(different) > 1 or axes[axis] not in ("length", "vocab"):
        return None
    n, m = theirs.shape[axis], mine.shape[axis]
    here, was = ours.get("maps", ()), others.get("maps", ())
    if here and len(here) == len(was):
        table, rows = interpolated(value, was, others["prefix"], here, ours["prefix"], m)
        return table, Part(axis, rows), f"{_sides(was)} interpolated to {_sides(here)}"
    special = ours.get("special", 0)
    if special != others.get("special", 0):
        return None
    count, last = min(n, m) - special, range(n - special, n)
    what = "rows" if axis == 0 else "columns"
    part = Part(axis, (*range(count), *range(m - special, m)))
    return jnp.take(value, np.r_[:count, last], axis), part, f"{count + special} {what} of {n}, for {m}"


def _sides(maps: Maps) -> str:
    return ", ".join(f"{rows}x{columns}" for rows, columns in maps)


def interpolated(
    table: Array, maps: Maps, prefix: int, to: Maps, to_prefix: int, count: int
) -> tuple[Array, tuple[int, ...]]:
    """Rows (n, d) of positions, `prefix` and then `maps` in raster order, for a table of `count` rows with other maps;
    and the rows that they fill there.

    Each map is resized by cubic interpolation. Of the prefix the rows that both have are kept.
    """
    head = min(prefix, to_prefix)
    parts, rows, begin, end = [table[:head]], [*range(head)], prefix, to_prefix
    for (i, j), (k, l) in zip(maps, to, strict=True):
        found = table[begin : begin + i * j]
        # A table of the inputs of a sequence has no row for the last token, which is no input.
        found = jnp.pad(found, ((0, i * j - len(found)), (0, 0)), mode="edge")
        if (i, j) != (k, l):
            found = jax.image.resize(found.reshape(i, j, -1), (k, l, table.shape[-1]), "cubic").reshape(k * l, -1)
        there = max(min(k * l, count - end), 0)
        parts.append(found[:there])
        rows += range(end, end + there)
        begin, end = begin + i * j, end + k * l
    return jnp.concatenate(parts), tuple(rows)
