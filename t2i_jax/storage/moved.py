"""Weights that earlier versions stored under other names, or in other shapes.

Names of parameters never change, but for those here: a model that moved has a table from its older names, as if they
were published ones (`interop.names`). It serves parameters, averages and states of optimisers alike, whose names end
with that of the parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from t2i_jax.core.specs import Shaped
from t2i_jax.interop.names import Source, Table, source
from t2i_jax.networks.clip import CLIPNetwork


class Move(NamedTuple):
    """An array that is made of older ones."""

    line: Source
    names: tuple[str, ...]
    """of the older arrays"""

    def shape(self, arrays: Mapping[str, Shaped]) -> jax.ShapeDtypeStruct:
        """Of the new array, from those of the older ones."""
        parts = [np.broadcast_to(np.zeros((), arrays[name].dtype), arrays[name].shape) for name in self.names]
        made = self.line.ours(parts)
        return jax.ShapeDtypeStruct(made.shape, made.dtype)

    def array(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """The new array."""
        return self.line.ours([parts[name] for name in self.names])


def moves(table: Table, arrays: Mapping[str, Shaped]) -> dict[str, Move]:
    """What to make of arrays that a file holds under older names: {} where it has none of them.

    table: from names of parameters to older ones; in the file they may follow prefixes that end with a slash.
    """
    found = {}
    older = {name for line in table.values() for name in line.names if name}
    for prefix in {name[: -len(name.rpartition("/")[2])] for name in arrays if name.rpartition("/")[2] in older}:
        for new, line in table.items():
            names = tuple(f"{prefix}{name}" for name in line.names if name)
            if all(name in arrays for name in names):
                found[f"{prefix}{new}"] = Move(line, names)
    return found


def moved(model: nnx.Module) -> Table:
    """The table of the older names of a model; {} for one that never moved."""
    if not isinstance(model, CLIPNetwork):
        return {}
    towers = model.config
    parts = {
        "text.words.w": source("table.w"),
        "text.positions": source("text_position"),
        "image.first": source("start"),
        "image.positions": source("image_position"),
        "image.before.w": source("image_norm.w"),
        "image.before.b": source("image_norm.b"),
        "image.patches.w": source("patches.w", layout="(p q c) d -> p q c d", p=towers.patch, q=towers.patch),
    }
    for tower, h in (("text", towers.text.head_size), ("image", towers.image.head_size)):
        block = f"{tower}.blocks."
        old = lambda *names, block=block: tuple(f"{block}{name}" if name else "" for name in names)
        parts[f"{block}attention.qkv.w"] = Source(old("q.w", "k.w", "v.w"), "a l d (n h) -> l d (n a h)", {"h": h})
        parts[f"{block}attention.qkv.b"] = Source(old("q.b", "", "v.b"), "a l (n h) -> l (n a h)", {"h": h})
        for ours, theirs in (("attention.out", "out"), ("mlp.into", "into"), ("mlp.out", "back")):
            parts |= {f"{block}{ours}.{end}": source(f"{block}{theirs}.{end}") for end in "wb"}
    return parts
