"""Low-rank adapters: W + (alpha / rank) A B in the place of a matrix W, of which only A and B are trained (Hu et al.
2021, arXiv:2106.09685)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import Checked, Count, Positive, Rate
from t2i_jax.core.params import Named, axes_of, named, within
from t2i_jax.nn.layers import Fixed, LowRank

M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class LoRA(Checked):
    """Adapters of a model's matrices, trained in their place."""

    rank: Count = 0
    """0: no adapters"""
    alpha: Positive = 8.0
    """the product A B is multiplied by alpha / rank"""
    targets: tuple[str, ...] = ()
    """regular expressions, each found somewhere in the dotted names of the matrices and kernels that it adapts; () is
    the matrices of all linear layers but those over a vocabulary"""
    dropout: Rate = 0.0
    """share of the inputs of A that are 0 in training, for linear layers"""
    whole: tuple[str, ...] = ()
    """dotted names, or prefixes of names, of parameters that are trained whole besides"""

    def __post_init__(self):
        super().__post_init__()
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"lora.targets: {pattern!r} is no regular expression: {error}") from error

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def adapts(self, params: Named) -> tuple[str, ...]:
        """Names of the parameters that get an adapter. Errors: `ConfigError` for patterns and paths that find none."""
        for path in self.whole:
            if not any(within(path, name) for name in params):
                near = ", ".join(list(params)[:4])
                raise ConfigError(f"lora.whole: no parameter is {path!r}, or under it; there are {near}, ...")
        could = {k: v for k, v in params.items() if len(axes_of(v)) in (2, 4) and not self.trains_whole(k)}
        if not could:
            raise ConfigError("lora: the model has no matrix and no kernel to adapt")
        if not self.targets:
            linear = lambda k, v: k.endswith(".w") and len(axes_of(v)) == 2 and "vocab" not in axes_of(v)
            found = tuple(k for k, v in could.items() if linear(k, v))
            if not found:
                raise ConfigError("lora.targets: the model has no linear layer; name the kernels to adapt")
            return found
        for pattern in self.targets:
            if not any(re.search(pattern, name) for name in could):
                near = ", ".join(list(could)[:4])
                raise ConfigError(f"lora.targets: {pattern!r} finds no matrix of this model; it has {near}, ...")
        return tuple(k for k in could if any(re.search(pattern, k) for pattern in self.targets))

    def trains_whole(self, name: str) -> bool:
        """Whether a parameter is trained without an adapter."""
        return any(within(path, name) for path in self.whole)


def adapted(model: M, lora: LoRA, key: Array) -> M:
    """`model` with adapters that change nothing yet, and all its other parameters but `lora.whole` as `Fixed`."""
    params: Named = {k: v for k, v in named(model).items() if isinstance(v, nnx.Param)}
    targets = lora.adapts(params)
    keys = dict(zip(targets, jax.random.split(key, len(targets)), strict=True))

    def one(path: jax.tree_util.KeyPath, v: object) -> object:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not isinstance(v, nnx.Param) or lora.trains_whole(name):
            return v
        if name in keys:
            return LowRank(v, lora.rank, lora.scale, lora.dropout, keys[name])
        return Fixed(v.get_value(), **v.get_metadata())

    return jax.tree_util.tree_map_with_path(one, model, is_leaf=lambda v: isinstance(v, nnx.Variable))


def merged(model: M) -> M:
    """A model with adapters as one without: each is added to its matrix."""

    def one(v: object) -> object:
        if isinstance(v, LowRank):
            return nnx.Param(v[...], **v.base.get_metadata())
        return nnx.Param(v.get_value(), **v.get_metadata()) if isinstance(v, Fixed) else v

    return jax.tree.map(one, model, is_leaf=lambda v: isinstance(v, LowRank | nnx.Variable))


def fixed_of(model: nnx.Module) -> Named:
    """The parameters of a model with adapters that do not change."""
    return {k: v for k, v in named(model).items() if isinstance(v, Fixed)}


def with_masks(model: M, key: Array) -> M:
    """A model with adapters that drop other inputs, for a step of training."""
    adapters = [v for v in jax.tree.leaves(model, is_leaf=lambda v: isinstance(v, LowRank)) if isinstance(v, LowRank)]
    keys = iter(jax.random.split(key, len(adapters))) if any(v.dropout for v in adapters) else iter(())
    one = lambda v: v.with_masks(next(keys)) if isinstance(v, LowRank) and v.dropout else v
    return jax.tree.map(one, model, is_leaf=lambda v: isinstance(v, LowRank))


def added(name: str, x: Array, adapter: Mapping[str, ArrayLike], scale: float, factor: float = 1.0) -> Array:
    """An array x of a model with factor x scale A B of an adapter, whose arrays are `name.a` and `name.b`; x itself
    where it has none, and that share of the way to the adapter's own array where that was trained whole."""
    if name in adapter and jnp.issubdtype(x.dtype, jnp.floating):
        return (x + factor * (jnp.asarray(adapter[name], jnp.float32) - x)).astype(x.dtype)
    if f"{name}.a" not in adapter:
        return x
    a, b = (jnp.asarray(adapter[f"{name}.{part}"], jnp.float32) for part in "ab")
    return (x + factor * scale * LowRank.product(a, b)).astype(x.dtype)
