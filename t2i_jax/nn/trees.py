"""The variables of a model by dotted name, and a model from them."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

Named = dict[str, nnx.Variable]


def is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named(model: Any) -> Named:
    """The variables of a model by dotted name, `blocks.attention.qkv.w` say."""
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_variable)[0]
    return {_name(path): v for path, v in leaves if is_variable(v)}


def rebuild(abstract: Any, variables: Mapping[str, nnx.Variable]) -> Any:
    """The model of the shape of `abstract` that holds `variables`."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract, is_leaf=is_variable)
    return jax.tree_util.tree_unflatten(treedef, [variables[_name(p)] if is_variable(v) else v for p, v in leaves])
