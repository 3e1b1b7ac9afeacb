"""Steps whose gradient is far larger than that of the steps before them."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import Array

WINDOW = 100
"""Steps that the running mean looks back; none is a spike before so many were seen."""

RunningNorms = dict[str, dict[str, Array]]
"""By objective the mean of its gradient's norm, and how many steps that is of, `WINDOW` at most."""


def start_norms(objectives: Iterable[str]) -> RunningNorms:
    return {name: {"mean": jnp.zeros((), jnp.float32), "seen": jnp.zeros((), jnp.int32)} for name in objectives}


def find_spike(
    before: dict[str, Array], norm: Array, limit: float, learns: Array | bool
) -> tuple[Array, dict[str, Array]]:
    """Whether the norm of a gradient is more than `limit` times the running mean, and the mean with it.

    A spike counts as `limit` times the mean, so that norms which are larger for good are soon no spikes any more.
    learns: whether the objective is trained in this step; else nothing is counted.
    """
    mean, seen = before["mean"], before["seen"]
    judged = learns & (seen >= WINDOW) & (mean > 0)
    bound = limit * mean
    counted = jnp.where(judged, jnp.minimum(norm, bound), norm)
    after = {
        "mean": mean + (counted - mean) / jnp.minimum(seen + 1, WINDOW),
        "seen": jnp.minimum(seen + 1, WINDOW),
    }
    return judged & (norm > bound), jax.tree.map(lambda new, old: jnp.where(learns, new, old), after, before)
