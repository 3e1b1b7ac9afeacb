"""Losses over a vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def cross_entropy(
    logits: Array, targets: Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Array, Array, Array]:
    """What each target costs in nats: (loss, -log p, correct), each fp32 (...), from logits (..., v) and int (...).

    loss = (1 - a) (-log p_y) + a mean_v(-log p_v) + z (log Z)^2, with a the label smoothing (Szegedy et al. 2016) and
    z the weight that keeps the normaliser near 1 (Chowdhery et al. 2022, PaLM, 5).
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, -1)
    target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    nll = log_z - target
    loss = nll + z_loss * log_z**2
    if label_smoothing:
        loss = loss + label_smoothing * (target - logits.mean(-1))
    # An argmax costs a pass of its own; that the target is the maximum says the same.
    return loss, nll, (target >= logits.max(-1)).astype(jnp.float32)


def chunked_cross_entropy(
    head: Callable[[Array], Array], z: Array, targets: Array, chunk: int = 0, **options: float
) -> tuple[Array, Array, Array]:
    """`cross_entropy(head(z), targets)` of z (b, t, d) and targets (b, t), `chunk` tokens of each row at a time.

    The fp32 logits (b, t, v) are never held whole, in the backward pass neither: every chunk makes its own again.
    `chunk=0` makes them all at once. Raises ValueError if the chunks do not fill t.
    """
    t = z.shape[1]
    if not chunk or chunk >= t:
        return cross_entropy(head(z), targets, **options)
    if t % chunk:
        raise ValueError(f"loss_chunk={chunk} does not divide the {t} tokens of an image")
    split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)
    one = jax.checkpoint(lambda _, x: (None, cross_entropy(head(x[0]), x[1], **options)))
    _, parts = jax.lax.scan(one, None, (split(z), split(targets)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(targets.shape), parts)
