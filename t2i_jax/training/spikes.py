"""Detection of steps whose gradient is far larger than that of the preceding steps."""

from __future__ import annotations

from collections.abc import Iterable

import jax.numpy as jnp
import optax
from jax import Array

WINDOW = 100
"""Steps of the running mean; no spike is detected before it is full."""

RunningNorms = dict[str, dict[str, Array]]
"""By objective: the mean norm of its gradient, and the number of steps in the mean, at most `WINDOW`."""


def start_norms(objectives: Iterable[str]) -> RunningNorms:
    """The running means of gradient norms before any step."""
    return {name: {"mean": jnp.zeros((), jnp.float32), "seen": jnp.zeros((), jnp.int32)} for name in objectives}


def find_spike(
    before: dict[str, Array], norm: Array, limit: float, learns: Array | bool
) -> tuple[Array, dict[str, Array]]:
    """Whether the norm of a gradient is more than `limit` times the running mean, and the updated mean.

    A spike enters the mean as `limit` times the mean, so that permanently larger norms soon stop being spikes. learns:
    whether the objective is trained in this step; else nothing changes.
    """
    mean, seen = before["mean"], before["seen"]
    judged = learns & (seen >= WINDOW) & (mean > 0)
    bound = limit * mean
    counted = jnp.where(judged, jnp.minimum(norm, bound), norm)
    after = {
        "mean": mean + (counted - mean) / jnp.minimum(seen + 1, WINDOW),
        "seen": jnp.minimum(seen + 1, WINDOW),
    }
    return judged & (norm > bound), optax.tree.where(learns, after, before)
