"""What a sampling loop says of itself while it runs, from inside the compiled program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Progress = Callable[..., None]
"""Called on the host as (done, total, codes or pictures so far, ...): steps or tokens, whatever the sampler counts.

Calls may come out of order; `jax.effects_barrier()` waits for the last. A program that calls is in no compile cache.
"""


def now_and_then(progress: Progress, done: Array, total: int, *state: Any) -> None:
    """Call `progress` after each sixteenth of `total` steps of a long loop, and at its end."""
    due = done * 16 // total > (done - 1) * 16 // total
    jax.lax.cond(due, lambda: jax.debug.callback(progress, done, jnp.int32(total), *state), lambda: None)
