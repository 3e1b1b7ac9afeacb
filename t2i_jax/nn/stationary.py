"""Matrix products that move activations instead of weights, for meshes that split weights over `fsdp`.

Training gathers each matrix before its use, as a batch has many more rows than a matrix. A decoding step has few rows:
each device keeps its part of every matrix and the rows move, the weight-stationary layout of Pope et al. (2022,
"Efficiently scaling transformer inference", 3.2). Each device computes some columns of the product from all rows, so no
sum is split, and the output has the same sharding as in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from t2i_jax.core.arrays import Float, Integer, Num, typed
from t2i_jax.core.sharding import RULES, fit, shard

M = TypeVar("M")
Axes = tuple[str | None, ...]
MARK = "stationary"


def weight_stationary(model: M) -> M:
    """`model` whose products keep the weights in place; the same object on meshes that do not split weights over
    `fsdp`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return model
    mark = lambda v: v.replace(v[...], **{MARK: True}) if isinstance(v, nnx.Variable) else v
    return jax.tree.map(mark, model, is_leaf=lambda v: isinstance(v, nnx.Variable))


def stationary_axes(w: object) -> Axes | None:
    """The axis names of a variable that `weight_stationary` has marked; None for all other arrays."""
    return w.get_metadata().get("axes") if isinstance(w, nnx.Variable) and w.get_metadata().get(MARK) else None


def stays(module: nnx.Module) -> bool:
    """Whether `weight_stationary` has marked the weights of a module."""
    leaves = jax.tree.leaves(module, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return any(stationary_axes(v) is not None for v in leaves)


def pin(x: Array, *entries: object) -> Array:
    """Constrain x to these mesh axes, one entry per dimension, where they divide it; needs a mesh."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return jax.lax.with_sharding_constraint(x, fit(P(*entries), x.shape, sizes))


def layout(axes: Axes, shape: tuple[int, ...]) -> tuple[object, object]:
    """Sharding of a matrix (d, f) for such a product: columns split over `fsdp` too, or as in training where the number
    of columns is not divisible."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    rows, columns = fit(P(*(RULES.get(name) for name in axes)), shape, sizes)
    if rows == "fsdp":
        both = tuple(name for name in (columns, "fsdp") if name)
        if shape[1] % math.prod(sizes[name] for name in both) == 0:
            return None, both
    return rows, columns


@typed
def at_rest(w: Num[Array, "d f"], axes: Axes) -> Num[Array, "d f"]:
    """A matrix as `product` reads it."""
    return pin(w, *layout(axes, w.shape))


@typed
def product(
    multiply: Callable[[Array, Array], Array], x: Float[Array, "b *t d"], w: Num[Array, "d f"], axes: Axes
) -> Float[Array, "b *t f"]:
    """multiply(x, w) for x, sharded over the batch, and a matrix with these axes."""
    rows, columns = layout(axes, w.shape)
    between = (None,) * (x.ndim - 2)
    y = multiply(pin(x, "data", *between, rows), pin(w, rows, columns))
    return shard(pin(y, "data", *between, columns), "batch", *between, axes[1])


@typed
def lookup(table: nnx.Variable, ids: Integer[Array, "*b"]) -> Float[Array, "*b d"]:
    """Rows of a table (v, d)."""
    axes = stationary_axes(table)
    if axes is None:
        return table[...][ids]
    between = (None,) * (ids.ndim - 1)
    rows = table[...][pin(ids, "data", *between)]
    return shard(pin(rows, "data", *between, RULES.get(axes[1])), "batch", *between, None)
