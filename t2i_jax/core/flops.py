"""Floating-point operations of a function, from its jaxpr: 2 for each multiply-add of a product or convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, repeat, tee

import jax
from jax.extend import core

from t2i_jax.core import jaxprs
from t2i_jax.core.sharding import Device
from t2i_jax.core.types import Once, Trips, loops_of

# Published dense bf16 peaks, FLOP/s per device as JAX counts devices.
PEAKS = {
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # two devices a chip
}


def count(function: Callable[..., object], *arguments: object, trips: Trips = 1) -> float:
    """FLOPs of one call with arguments of these shapes (abstract ones will do); loops count as often as they run.

    A `while_loop`, whose length is not known, counts `trips` times, a `cond` its dearest branch, and what platforms do
    each in their way (`platform_dependent`) as the default does it. With `InTurn` the first loop that has products
    counts by the first of its trips, and so on; further ones by the last. Errors: `jaxprs.UnknownForm` for a primitive
    that may compute products and is not known.
    """
    several = loops_of(trips)
    return _jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr, chain(several, repeat(several[-1])))


def peak(device: Device) -> float | None:
    """Published bf16 FLOP/s of a device, or None for one that is not in the table (a CPU)."""
    return next((v for k, v in PEAKS.items() if device.device_kind.startswith(k)), None)


def _jaxpr(jaxpr: core.Jaxpr, trips: Iterator[Once], taken: Iterator[int] | None = None) -> float:
    return sum(_form(jaxprs.read(e), trips, taken) for e in jaxpr.eqns)


def _form(form: jaxprs.Form, trips: Iterator[Once], taken: Iterator[int] | None = None) -> float:
    """trips: of the loops that are still to come; taken: branches of the conds that are."""
    match form:
        case None:
            return 0.0
        case jaxprs.Product(flops):
            return flops
        case jaxprs.Scan(body, length):
            return length * _jaxpr(body, trips, taken)
        case jaxprs.While(condition, body):
            if not _jaxpr(condition, repeat(1)) + _jaxpr(body, repeat(1)):
                return 0.0
            own = next(trips)
            if isinstance(own, float | int):
                return own * (_jaxpr(condition, repeat(own), taken) + _jaxpr(body, repeat(own), taken))
            return sum(_jaxpr(condition, repeat(1)) + _jaxpr(body, repeat(1), iter(turn)) for turn in own)
        case jaxprs.Cond(branches):
            chosen = next(taken, None) if taken and len(branches) > 1 else None
            several = branches if chosen is None else branches[chosen : chosen + 1]
            return max(_jaxpr(b, own) for b, own in zip(several, tee(trips, len(several)), strict=True))
        case jaxprs.Call(body, times):
            return times * _jaxpr(body, trips, taken)
