"""Floating-point operations of a function, from its jaxpr: 2 for each multiply-add of a product or convolution."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def count(function: Callable[..., Any], *arguments: Any, trips: float = 1) -> float:
    """FLOPs of one call with arguments of these shapes (abstract ones will do); loops count as often as they run.

    A `while_loop`, whose length is not known, counts `trips` times; a `cond` counts its dearest branch.
    """
    return _jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr, trips)


def peak(device: Any) -> float | None:
    """Published bf16 FLOP/s of a device, or None for one that is not in the table (a CPU)."""
    return next((v for k, v in PEAKS.items() if device.device_kind.startswith(k)), None)


def _jaxpr(jaxpr: Any, trips: float) -> float:
    return sum(_equation(e, trips) for e in jaxpr.eqns)


def _equation(e: Any, trips: float) -> float:
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
        return max(_jaxpr(b.jaxpr, trips) for b in e.params["branches"])
    inner = 0.0
    for value in e.params.values():
        if isinstance(value, core.ClosedJaxpr):
            inner += _jaxpr(value.jaxpr, trips)
        elif isinstance(value, core.Jaxpr):
            inner += _jaxpr(value, trips)
    if name == "pallas_call":  # each place of the grid does what the kernel says
        return inner * math.prod(n for n in e.params["grid_mapping"].grid if isinstance(n, int))
    times = {"scan": e.params.get("length", 1), "while": trips}
    if name == "shard_map":  # what one device does
        times = {name: e.params["mesh"].size}
    return inner * times.get(name, 1)
