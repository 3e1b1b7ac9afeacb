"""Steering: how what a network predicts is moved towards a condition. All compose, with each other and every solver."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from t2i_jax.noise.schedule import expand_like


def guide(value: Array, null: Array, scale: Array | float, channels: int = 0) -> Array:
    """null + scale (value - null) on predictions (b, i, j, c); exactly `value` at scale 1 (Ho & Salimans 2022, eq. 6).

    `null` is what is predicted without the condition, or by a worse model (Karras et al. 2024, autoguidance). scale: a
    scalar or (b,). channels: leave those behind the first so many as they are; released samplers of DiT and GLIDE move
    three only.
    """
    moved = value + (expand_like(scale, value) - 1) * (value - null)
    return moved if not channels else jnp.where(jnp.arange(value.shape[-1]) < channels, moved, value)


def rescale(guided: Array, value: Array, share: Array | float) -> Array:
    """`guided` with a share of the standard deviation of `value` per picture (Lin et al. 2024, eqs. 15 and 16)."""
    axes = tuple(range(1, value.ndim))
    factor = value.std(axes, keepdims=True) / jnp.maximum(guided.std(axes, keepdims=True), 1e-8)
    share = expand_like(share, value)
    return guided * (share * factor + 1 - share)


def within(scale: Array | float, at: Array, start: Array | float, stop: Array | float) -> Array:
    """`scale` while `start` <= at < `stop`, else 1 (Kynkaanniemi et al. 2024); `at` is 0 in noise, 1 at the end."""
    return jnp.where((at >= jnp.asarray(start) - 1e-6) & (at < jnp.asarray(stop) - 1e-6), scale, 1.0)


def classifier_gradient(log_p: Callable[[Array], Array], x: Array, scale: Array | float) -> Array:
    """scale times the gradient of log p(condition | x) by x, for log_p: (b, ...) -> (b,).

    With a classifier of noised pictures it is classifier guidance (Dhariwal & Nichol 2021), with the similarity of
    noised picture and caption that of GLIDE (Nichol et al. 2022, section 2.3).
    """
    return expand_like(scale, x) * jax.grad(lambda x: log_p(x).sum())(x)


def of_class(logits: Array, label: Array) -> Array:
    """log p(label) (b,) from logits (b, v)."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), label[:, None], 1)[:, 0]
