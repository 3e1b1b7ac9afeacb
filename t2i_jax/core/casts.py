"""Find the inputs of a traced program that are cast before any computation, by reading its jaxpr; and the weights of a
sampler among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.typing import DTypeLike

from t2i_jax.core.errors import ConfigError
from t2i_jax.core.jaxprs import Atom, Call, Cond, Scan, While, read
from t2i_jax.core.narrow import as_family
from t2i_jax.core.params import abstract, named
from t2i_jax.core.types import Trainable

MOVES = {
    "broadcast_in_dim", "copy", "dynamic_slice", "expand_dims", "gather", "optimization_barrier", "reshape", "rev",
    "sharding_constraint", "slice", "split", "squeeze", "transpose",
}  # fmt: skip
"""Primitives that only select and move elements of their first operand: they commute with a cast."""


def cast_first(jaxpr: core.Jaxpr, dtype: DTypeLike) -> list[bool]:
    """For each input: whether the program only casts its elements to `dtype`.

    Unknown operations count as computation. Errors: `UnknownForm` of `core.jaxprs.read`.
    """
    used = _used(jaxpr, dtype, ["else"] * len(jaxpr.outvars))
    return [used.get(v, "unused") == "cast" for v in jaxpr.invars]


def _used(jaxpr: core.Jaxpr, dtype: DTypeLike, results: list[str]) -> dict[core.Var, str]:
    """How a program uses each of its variables: "cast" or "else"; results: how its outputs are used."""
    used: dict[core.Var, str] = {}

    def note(variable: Atom, how: str) -> None:
        if not isinstance(variable, core.Literal) and how != "unused":
            used[variable] = how if used.get(variable, how) == how else "else"

    for variable, how in zip(jaxpr.outvars, results, strict=True):
        note(variable, how)
    for equation in reversed(jaxpr.eqns):
        name, operands = equation.primitive.name, equation.invars
        form = read(equation)
        if name == "convert_element_type":
            note(operands[0], "cast" if equation.params["new_dtype"] == dtype else "else")
        elif name in MOVES:
            ways = {used[v] for v in equation.outvars if v in used}
            note(operands[0], ways.pop() if len(ways) == 1 else "else" if ways else "unused")
            for other in operands[1:]:
                note(other, "else")
        elif isinstance(form, Call) and not form.kernel and len(form.body.invars) == len(operands):
            _pass(note, operands, form.body, dtype, [used.get(v, "unused") for v in equation.outvars])
        elif isinstance(form, Scan) and len(form.body.invars) == len(operands):
            _pass(note, operands, form.body, dtype)
        elif isinstance(form, Cond) and all(len(b.invars) == len(operands) - 1 for b in form.branches):
            note(operands[0], "else")
            for branch in form.branches:
                _pass(note, operands[1:], branch, dtype)
        elif isinstance(form, While):
            count = equation.params["cond_nconsts"]
            for operand in operands[:count]:
                note(operand, "else")
            _pass(note, operands[count:], form.body, dtype)
        else:
            for operand in operands:
                note(operand, "else")
    return used


def _pass(
    note: Callable[[Atom, str], None],
    operands: Sequence[Atom],
    body: core.Jaxpr,
    dtype: DTypeLike,
    results: list[str] | None = None,
) -> None:
    """Note for the operands of a nested program how it uses them."""
    inner = _used(body, dtype, results or ["else"] * len(body.outvars))
    for operand, variable in zip(operands, body.invars, strict=True):
        note(operand, inner.get(variable, "unused"))


def cast_dtypes(model_config: Trainable) -> dict[str, DTypeLike]:
    """Dtypes of the weights that a family's sampler casts to bfloat16 before use.

    They are cast once when loaded, which changes no image.
    """
    if not model_config.capabilities.family or model_config.compute.dtype != "bfloat16":
        return {}
    family = as_family(model_config)
    model = abstract(family)
    spec = {k: f for k, f in family.condition_spec().items() if not f.optional}
    condition = {k: jax.ShapeDtypeStruct((1, *(n or 1 for n in f.shape)), f.dtype) for k, f in spec.items()}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    draw = lambda model, condition, keys: family.sample(model, condition, keys, family.options())
    try:
        cast = cast_first(jax.make_jaxpr(draw)(model, condition, keys).jaxpr, jnp.bfloat16)
    except ConfigError:  # it needs optional condition fields, or its jaxpr has an unknown form
        return {}
    flags = jax.tree.unflatten(jax.tree.structure(model), cast[: len(jax.tree.leaves(model))])
    return {k: jnp.bfloat16 for k, v in named(flags).items() if v.get_value()}
