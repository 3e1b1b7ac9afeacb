"""The variables of a model by dotted name, and a model built from them."""

import functools
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from t2i_jax.core.specs import Shaped

M = TypeVar("M", bound=nnx.Module)
M_co = TypeVar("M_co", bound=nnx.Module, covariant=True)
Named = dict[str, nnx.Variable]


class HasInit(Protocol[M_co]):
    """A config that builds a module."""

    def init(self, key: Array) -> M_co: ...


def is_variable(x: object) -> bool:
    """Whether a leaf of a model is a variable."""
    return isinstance(x, nnx.Variable)


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named(model: nnx.Module) -> Named:
    """The variables of a model by dotted name, such as `blocks.attention.qkv.w`."""
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_variable)[0]
    return {_name(path): v for path, v in leaves if is_variable(v)}


def within(path: str, name: str) -> bool:
    """Whether a dotted name is `path`, or of something under it."""
    return name == path or name.startswith(f"{path}.")


def axes_of(v: nnx.Variable) -> tuple[str | None, ...]:
    """Names of a variable's dimensions without those of stacked layers; empty if it has none."""
    return v.get_metadata().get("axes", ()) if is_variable(v) else ()


def rebuild(abstract: M, variables: Mapping[str, nnx.Variable]) -> M:
    """The model with the structure of `abstract` and these `variables`."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract, is_leaf=is_variable)
    return jax.tree_util.tree_unflatten(treedef, [variables[_name(p)] if is_variable(v) else v for p, v in leaves])


def assemble(build: Callable[[Array], M], arrays: Mapping[str, np.ndarray], source: str) -> M:
    """The model that `build(key)` would make, with `arrays` assigned by the dotted names of its variables.

    Errors: `ValueError` with `source` and the names that are missing, left over, or of another shape.
    """
    abstract = jax.eval_shape(build, jax.random.key(0))
    wanted = named(abstract)
    check_fits(wanted, arrays, source)
    fill = lambda k, v: jax.tree.map(lambda leaf: jnp.asarray(arrays[k], leaf.dtype), v)
    return rebuild(abstract, {k: fill(k, v) for k, v in wanted.items()})


def check_fits(wanted: Named, arrays: Mapping[str, Shaped], source: str) -> None:
    """Errors: `ValueError` with `source` and the names that are missing, left over, or of another shape."""
    wrong = [f"missing: {k}" for k in wanted if k not in arrays] + [f"unused: {k}" for k in arrays if k not in wanted]
    wrong += [
        f"{k}: {arrays[k].shape} in the file, {v.shape} in the model"
        for k, v in wanted.items()
        if k in arrays and arrays[k].shape != v.shape
    ]
    if wrong:
        more = [f"and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        raise ValueError(f"{source} does not fit this model:\n  " + "\n  ".join([*wrong[:8], *more]))


def abstract(config: HasInit[M]) -> M:
    """The model of a config with shapes in place of arrays."""
    return jax.eval_shape(config.init, abstract_key())


@functools.cache
def abstract_key() -> jax.ShapeDtypeStruct:
    """The shape of a random key, for which nothing is computed."""
    return jax.eval_shape(lambda: jax.random.key(0))
