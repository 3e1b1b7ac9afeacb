"""Images between two prompts or two seeds: conditions on the line between them, noise on the arc."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from t2i_jax.core.arrays import Float, typed
from t2i_jax.noise.schedule import expand_like


def lerp(x: Array, y: Array, share: Float[Array, " b"]) -> Array:
    """x + share (y - x) of arrays (b, ...) of one shape: exactly x at share 0, and y at 1."""
    u = expand_like(share, x)
    return (1 - u) * x + u * y


@typed
def slerp(x: Float[Array, "b k"], y: Float[Array, "b k"], share: Float[Array, " b"]) -> Float[Array, "b k"]:
    """sin((1 - u) a) / sin a x + sin(u a) / sin a y, a the angle between x and y (Shoemake 1985).

    Of Gaussian noise a point half-way has the length of the ends; on the straight line it is shorter by the root of 2.
    Where x and y have one direction, it is the line.
    """
    unit = lambda v: v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-12)
    angle = jnp.arccos(jnp.clip(jnp.sum(unit(x) * unit(y), -1), -1, 1))
    narrow = jnp.sin(angle) < 1e-4
    safe = jnp.where(narrow, 1.0, angle)
    of_x, of_y = (jnp.sin(u * safe) / jnp.sin(safe) for u in (1 - share, share))
    arc = of_x[:, None] * x + of_y[:, None] * y
    return jnp.where(narrow[:, None], lerp(x, y, share), arc)
