"""Losses over a vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from t2i_jax.core.arrays import Float, Int, Shaped, typed
from t2i_jax.core.conditions import Batch

MOST_LOGITS = 2**28
"""Upper bound on the logits that a device holds at a time where `chunk` is 0: 1 GiB."""


def row_weights(batch: Batch, b: int) -> Array:
    """The `weight` fp32 (b,) of each of b rows of a batch, 0 for those to ignore; 1 if it has none."""
    return jnp.asarray(batch.get("weight", jnp.ones(b)), jnp.float32)


@typed
def weighted_mean(x: Float[Array, "*b"], weight: Float[Array, "*b"]) -> Float[Array, ""]:
    """Sum of weight x over the sum of the weights (at least 1)."""
    return jnp.sum(x * weight) / jnp.maximum(weight.sum(), 1)


def row_mean(x: Array, batch: Batch) -> Array:
    """Mean of x (b,) over the rows of a batch, by their weights."""
    return weighted_mean(x, row_weights(batch, len(x)))


@typed
def cross_entropy(
    logits: Float[Array, "*b v"], targets: Int[Array, "*b"], *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Float[Array, "*b"], Float[Array, "*b"], Float[Array, "*b"]]:
    """Cross-entropy in nats: (loss, -log p, correct), each fp32.

    loss = (1 - a) (-log p_y) + a mean_v(-log p_v) + z (log Z)^2, with label smoothing a (Szegedy et al. 2016) and
    z-loss weight z, which keeps the normaliser Z near 1 (Chowdhery et al. 2022, PaLM, 5).
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, -1)
    target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    nll = log_z - target
    loss = nll + z_loss * log_z**2
    if label_smoothing:
        loss = loss + label_smoothing * (target - logits.mean(-1))
    # Cheaper than an argmax, which takes another pass: compare the target's logit with the maximum.
    return loss, nll, (target >= logits.max(-1)).astype(jnp.float32)


@typed
def chunked_cross_entropy(
    head: Callable[[Array], Array],
    z: Float[Array, "b t d"],
    targets: Int[Array, "b t"],
    chunk: int = 0,
    **options: float,
) -> tuple[Float[Array, "b t"], ...]:
    """`cross_entropy(head(z), targets)` in chunks of tokens: see `in_chunks`."""
    return in_chunks(head, lambda logits, y: cross_entropy(logits, y, **options), z, (targets,), chunk)


@typed
def in_chunks(
    head: Callable[[Array], Array],
    score: Callable[..., tuple[Array, ...]],
    z: Float[Array, "b t d"],
    others: tuple[Shaped[Array, "b t"], ...],
    chunk: int = 0,
) -> tuple[Shaped[Array, "b t"], ...]:
    """`score(head(z), *others)`, `chunk` tokens of each row at a time.

    The fp32 logits (b, t, v) are never materialised whole, nor in the backward pass, which recomputes those of each
    chunk. chunk 0: all at once if that is at most MOST_LOGITS on a device, else as many tokens as it allows; below 0:
    all.
    """
    b, t = z.shape[:2]
    if chunk == 0:
        v = jax.eval_shape(head, z).shape[-1]
        fitting = MOST_LOGITS * max(jax.sharding.get_abstract_mesh().size, 1) // (b * v)
        chunk = t if fitting >= t else 1 << max(fitting.bit_length() - 1, 0)
    one = lambda z, *others: score(head(z), *others)
    if chunk < 0 or chunk >= t:
        return one(z, *others)
    one, whole = jax.checkpoint(one), t - t % chunk
    split = lambda x: jnp.moveaxis(x[:, :whole].reshape(b, -1, chunk, *x.shape[2:]), 1, 0)
    _, parts = jax.lax.scan(lambda _, x: (None, one(*x)), None, jax.tree.map(split, (z, *others)))
    parts = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, whole), parts)
    if whole == t:
        return parts
    rest = one(*(x[:, whole:] for x in (z, *others)))
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], 1), parts, rest)
