"""The forms of traced programs (jaxprs) that this library reads: products, loops, branches and calls.

JAX guarantees neither the names of primitives nor those of their parameters, and both change between versions
(supported: jax 0.10 to 0.12). So only `read` inspects equations, and it raises `UnknownForm` for a form it does not
know: no count is silently too small.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, cast

import jax
from jax.extend import core

from t2i_jax.core.errors import ConfigError
from t2i_jax.core.specs import Shaped

Atom = core.Var | core.Literal


class UnknownForm(ConfigError):
    """A program has a form that this library cannot read; the message names the form and the version of JAX."""

    def __init__(self, what: str, why: str):
        super().__init__(f"{what}: {why} (jax {jax.__version__}); its costs cannot be counted")


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product, a convolution or a fused attention kernel: 2 FLOPs for each multiply-add."""

    flops: float


@dataclasses.dataclass(frozen=True)
class Scan:
    """A loop of known length; `stacked` are the results with one entry per iteration, as opposed to the carry."""

    body: core.Jaxpr
    length: int
    reverse: bool
    stacked: tuple[Shaped, ...]


@dataclasses.dataclass(frozen=True)
class While:
    """A loop whose length depends on data."""

    condition: core.Jaxpr
    body: core.Jaxpr


@dataclasses.dataclass(frozen=True)
class Cond:
    """Branches, one of which runs, in the order of the selecting index."""

    branches: tuple[core.Jaxpr, ...]


@dataclasses.dataclass(frozen=True)
class Call:
    """A program that runs `times` times, summed over all devices; `kernel`: its intermediates stay in on-chip
    memory."""

    body: core.Jaxpr
    times: int = 1
    kernel: bool = False


Form = Product | Scan | While | Cond | Call | None

CALLS = {
    "call", "closed_call", "composite", "custom_jvp_call", "custom_partitioning", "custom_vjp_call", "eval_jaxpr",
    "jit", "pallas_call", "remat2", "run_scoped", "shard_map",
}  # fmt: skip
"""Primitives that run the one program among their parameters."""

NUMBERWISE = {"reduce", "reduce_window", "select_and_scatter"}
"""Primitives, besides scatters, whose program combines scalars and contains no products."""

SUSPECT = re.compile(r"(^|_)(attention|call|conv|dot|gemm|kernel|matmul)(_|$)")
"""Names of unknown primitives that suggest products."""


def read(equation: core.JaxprEqn) -> Form:
    """The form of an equation of a jaxpr; None for one without products. Errors: `UnknownForm`."""
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = _parameter(equation, "dimension_numbers")
        left = _aval(equation.invars[0]).shape
        return Product(2.0 * _size(equation.outvars[0]) * math.prod(left[d] for d in contracted))
    if name == "conv_general_dilated":
        kernel = _aval(equation.invars[1]).shape
        features = kernel[_parameter(equation, "dimension_numbers").rhs_spec[0]]
        return Product(2.0 * _size(equation.outvars[0]) * math.prod(kernel) / features)
    if name in ("dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper"):
        return Product(_attention(equation, forward="fwd" in name))
    if name == "scan":
        return _scan(equation)
    if name == "while":
        return While(_program(equation, "cond_jaxpr"), _program(equation, "body_jaxpr"))
    if name == "cond":
        branches = tuple(_programs(_parameter(equation, "branches")))
        if more := set(equation.params) - {"branches", "branches_platforms"}:
            raise _unknown(equation, f"what its parameter '{min(more)}' says of its branches is not known")
        if platforms := equation.params.get(
            "branches_platforms"
        ):  # platform-dependent versions of the same computation
            return Call(branches[platforms.index(None) if None in platforms else -1])
        return Cond(branches)
    if name == "call_hi_primitive":
        return Call(_expanded(equation))
    programs = _programs(equation.params)
    if name in CALLS:
        if len(programs) != 1:
            raise _unknown(equation, f"it has {len(programs)} programs among its parameters, not one")
        return Call(programs[0], _times(equation), kernel=name == "pallas_call")
    if name in NUMBERWISE or name.startswith("scatter"):
        return None
    if programs or SUSPECT.search(name):
        raise _unknown(equation, "an unknown primitive " + ("with programs in it" if programs else "may be a product"))
    return None


def used_inputs(jaxpr: core.Jaxpr) -> list[bool]:
    """For each input of a program, whether its outputs depend on it; an equation depends on all of its inputs."""
    needed = {id(v) for v in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if any(id(v) in needed for v in equation.outvars):
            needed |= {id(v) for v in equation.invars}
    return [id(v) in needed for v in jaxpr.invars]


def _unknown(equation: core.JaxprEqn, why: str) -> UnknownForm:
    return UnknownForm(f"'{equation.primitive.name}' in a traced program", why)


def _parameter(equation: core.JaxprEqn, name: str) -> Any:  # the type of a parameter depends on its primitive
    if name not in equation.params:
        raise _unknown(equation, f"it has no parameter '{name}' but {', '.join(sorted(equation.params)) or 'none'}")
    return equation.params[name]


def _programs(value: object) -> list[core.Jaxpr]:
    """The jaxprs in a parameter, including those in tuples and dictionaries."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return [program for part in value for program in _programs(part)]
    return list(core.jaxprs_in_params({"": value}))


def _program(equation: core.JaxprEqn, name: str) -> core.Jaxpr:
    found = _programs(_parameter(equation, name))
    if len(found) != 1:
        raise _unknown(equation, f"its parameter '{name}' is not a program")
    return found[0]


def _size(variable: Atom) -> int:
    return math.prod(_aval(variable).shape)


def _aval(variable: Atom) -> Shaped:
    # Arrays and references to them have a shape and a dtype, which their common base does not declare.
    return cast(Shaped, variable.aval)


def _scan(equation: core.JaxprEqn) -> Scan:
    """A scan; a result is stacked if it has one more axis than the body's, of the loop's length, else it is the carry.

    Shapes show this in every version of JAX; the parameters that do so have changed their names.
    """
    body, length = _program(equation, "jaxpr"), _parameter(equation, "length")
    whole, each = [_aval(v) for v in equation.outvars], [_aval(v) for v in body.outvars]
    stacked = tuple(a for a, b in zip(whole, each, strict=False) if a.shape == (length, *b.shape))
    carried = [a for a, b in zip(whole, each, strict=False) if a.shape == b.shape]
    if len(whole) != len(each) or len(stacked) + len(carried) != len(whole):
        raise _unknown(equation, "its results are neither carried nor stacked results of its body")
    return Scan(body, length, bool(_parameter(equation, "reverse")), stacked)


def _times(equation: core.JaxprEqn) -> int:
    """How often the program of a call runs: once per cell of a kernel's grid, or once per device of a mesh."""
    if equation.primitive.name == "pallas_call":
        grid = _parameter(equation, "grid_mapping").grid
        if not all(isinstance(n, int) for n in grid):
            raise _unknown(equation, f"the size of its grid {grid} depends on data")
        return math.prod(grid)
    if equation.primitive.name == "shard_map":
        mesh = _parameter(equation, "mesh")
        return math.prod(mesh.shape[axis] for axis in _parameter(equation, "newly_manual_axes"))
    return 1


def _attention(equation: core.JaxprEqn, forward: bool) -> float:
    """FLOPs of cuDNN's attention over all pairs of queries and keys: q k^T and p v; backward q k^T again, and the
    gradients of p, q, k and v."""
    q, k, v = (_aval(x).shape for x in equation.invars[:3])
    keys = k[2] if _parameter(equation, "layout") else k[1]  # 0: (b, t, n, h), 1: (b, n, t, h)
    return 2.0 * math.prod(q[:-1]) * keys * (q[-1] + v[-1] if forward else 3 * q[-1] + 2 * v[-1])


def _expanded(equation: core.JaxprEqn) -> core.Jaxpr:
    """The program of a primitive that holds a Python object instead of a jaxpr, such as `jnp.searchsorted` in jax
    0.12."""
    primitive = _parameter(equation, "_prim")
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in map(_aval, equation.invars)]
    try:
        run = lambda *flat: primitive.expand(*jax.tree.unflatten(primitive.in_tree, flat))
        return jax.make_jaxpr(run)(*shapes).jaxpr
    except Exception as error:  # other versions of JAX may raise anything
        why = " ".join(str(error).split())[:200]
        raise _unknown(equation, f"{type(primitive).__name__} does not expand: {why}") from error
