"""Progress of a sampling loop, reported from inside the compiled program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Progress = Callable[[Any, Any, Any], None]
"""Called on the host as (done, total, sample): steps done by this sampler, all steps, and the samples so far (b, *grid,
...), as in `SampleSpec`. A step is a token for samplers that go token by token.

Calls may come out of order; `jax.effects_barrier()` waits for the last. A program with such calls is not stored in the
compilation cache.
"""


def report(progress: Progress | None, done: Array, total: Array | int, sample: Array) -> None:
    """Call `progress`, if given, after every sixteenth of the steps (every step if there are fewer), and after the
    last."""
    if progress is None:
        return
    due = done * 16 // total > (done - 1) * 16 // total
    jax.lax.cond(due, lambda: jax.debug.callback(progress, done, jnp.int32(total), sample), lambda: None)
