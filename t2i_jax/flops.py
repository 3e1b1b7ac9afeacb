"""Floating-point operations of a function, from its jaxpr: 2 for each multiply-add of a product or convolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

# Published dense bf16 peaks, FLOP/s per device as JAX counts devices.
PEAKS = {
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


Trips = float | Sequence[tuple[int, ...]]


def count(function: Callable[..., Any], *arguments: Any, trips: Trips = 1) -> float:
    """FLOPs of one call with arguments of these shapes (abstract ones will do); loops count as often as they run.

    A `while_loop`, whose length is not known, counts `trips` times, a `cond` its dearest branch, and what platforms do
    each in their way (`platform_dependent`) as the default does it. Instead of a number `trips` may say for each turn
    of the loop which branches the conds of its body take, in the program's order.
    """
    return _jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr, trips)


def peak(device: Any) -> float | None:
    """Published bf16 FLOP/s of a device, or None for one that is not in the table (a CPU)."""
    return next((v for k, v in PEAKS.items() if device.device_kind.startswith(k)), None)


def _jaxpr(jaxpr: Any, trips: Trips, taken: Iterator[int] | None = None) -> float:
    return sum(_equation(e, trips, taken) for e in jaxpr.eqns)


def _equation(e: Any, trips: Trips, taken: Iterator[int] | None = None) -> float:
    """taken: branches of the conds that are still to come."""
    name = e.primitive.name
    out = math.prod(e.outvars[0].aval.shape) if e.outvars else 0  # pyright: ignore[reportAttributeAccessIssue]
    if name == "dot_general":
        (contracted, _), _ = e.params["dimension_numbers"]
        return 2.0 * out * math.prod(e.invars[0].aval.shape[d] for d in contracted)  # pyright: ignore
    if name == "conv_general_dilated":
        kernel = e.invars[1].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
        features = kernel[e.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * out * math.prod(kernel) / features
    if name == "cond":
        branches = e.params["branches"]
        if e.params.get("branches_platforms"):  # ways of platforms to do the same: the default one, which is the last
            return _jaxpr(branches[-1].jaxpr, trips)
        chosen = next(taken, None) if taken and len(branches) > 1 else None
        return max(_jaxpr(b.jaxpr, trips) for b in (branches if chosen is None else branches[chosen : chosen + 1]))
    if name == "while" and not isinstance(trips, float | int):
        return sum(_jaxpr(e.params["body_jaxpr"].jaxpr, 1, iter(turn)) for turn in trips)
    inner = 0.0
    for value in e.params.values():
        if isinstance(value, core.ClosedJaxpr):
            inner += _jaxpr(value.jaxpr, trips, taken)
        elif isinstance(value, core.Jaxpr):
            inner += _jaxpr(value, trips, taken)
    if name == "pallas_call":  # each place of the grid does what the kernel says
        return inner * math.prod(n for n in e.params["grid_mapping"].grid if isinstance(n, int))
    times: dict[str, Any] = {"scan": e.params.get("length", 1), "while": trips}
    if name == "shard_map":  # what one device does
        times = {name: e.params["mesh"].size}
    return inner * times.get(name, 1)
