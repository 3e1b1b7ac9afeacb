"""Progress of a sampling loop, reported from inside the compiled program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Progress = Callable[[Any, Any, Any], None]
"""Called on the host as (done, total, sample): how many steps of this sampler are done, of how many, and the samples so
far (b, *grid, ...), as `SampleSpec` says. A step is a token for samplers that go token by token.

Calls may come out of order; `jax.effects_barrier()` waits for the last. A program that calls is in no compile cache.
"""


def report(progress: Progress | None, done: Array, total: Array | int, sample: Array) -> None:
    """Call `progress`, where there is one, after each sixteenth of the steps, or each of fewer, and after the last."""
    if progress is None:
        return
    due = done * 16 // total > (done - 1) * 16 // total
    jax.lax.cond(due, lambda: jax.debug.callback(progress, done, jnp.int32(total), sample), lambda: None)
