"""Contrastive losses of pairs: each is compared with all others of the global batch.

The products of all pairs are computed for some rows at a time, and again in the backward pass, so that they need not be
in memory together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from t2i_jax.core.arrays import Bool, Float, Int, typed
from t2i_jax.core.sharding import RULES, shard
from t2i_jax.nn.losses import cross_entropy, in_chunks

Score = Callable[[Array, Array], tuple[Array, Array]]
"""(logits (*r, b), rows (*r)) -> two numbers of each row"""


class Pairs(NamedTuple):
    """The pairs of a batch."""

    images: Array
    """unit vectors (b, k)"""
    texts: Array
    """unit vectors (b, k)"""
    known: Array
    """bool (b,): pairs that count; others are in no loss"""
    kinds: Array | None = None
    """int (b,): other pairs of the same kind are no negatives; None: all others are"""


@typed
def against_others(
    logits: Float[Array, "*r b"],
    rows: Int[Array, "*r"],
    known: Bool[Array, " b"],
    kinds: Int[Array, " b"] | None = None,
) -> Float[Array, "*r b"]:
    """Logits of `rows`, numbers of pairs, against all b pairs, with -inf for pairs that are no negatives of theirs:
    those that are not `known` or of the same kind; all of them but itself for a row that is not known."""
    own = rows[..., None] == jnp.arange(logits.shape[-1])
    return jnp.where(own | _negatives(rows, known, kinds), logits, -jnp.inf)


def _negatives(rows: Array, known: Array, kinds: Array | None) -> Array:
    """Which of b pairs are negatives of each row: bool (*r, b). Pairs are of their own kind."""
    kinds = jnp.arange(len(known)) if kinds is None else kinds
    return known[rows][..., None] & known & (kinds[rows][..., None] != kinds)


@typed
def mean_of_known(x: Float[Array, " b"], known: Bool[Array, " b"]) -> Float[Array, ""]:
    """Mean of x over the pairs that are known, 0 without any."""
    return jnp.sum(jnp.where(known, x, 0)) / jnp.maximum(known.sum(), 1)


@typed
def softmax_loss(
    pairs: Pairs, scale: Float[Array, ""] | float, chunk: int = 0
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of the own text of each image among all texts, and of the own image of each text, by scaled
    cosines, their mean (Radford et al. 2021, CLIP, figure 3): InfoNCE in both directions.

    Returns the loss, and the shares of images whose own text is the most similar, and of texts whose own image is.
    chunk: rows of a device whose products are in memory at a time, as in `nn.losses.in_chunks`.
    """

    def direction(queries: Array, keys: Array) -> tuple[Array, Array]:
        def score(logits: Array, rows: Array) -> tuple[Array, Array]:
            loss, _, correct = cross_entropy(against_others(logits, rows, pairs.known, pairs.kinds), rows)
            return loss, correct

        loss, correct = _by_rows(queries, keys, score, scale, 0.0, chunk)
        return mean_of_known(loss, pairs.known), mean_of_known(correct, pairs.known)

    (text, of_images), (image, of_texts) = (
        direction(*both) for both in ((pairs.images, pairs.texts), (pairs.texts, pairs.images))
    )
    return (text + image) / 2, of_images, of_texts


@typed
def sigmoid_loss(
    pairs: Pairs, scale: Float[Array, ""] | float, bias: Float[Array, ""] | float, chunk: int = 0
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """-sum_ij log sigmoid(z_ij (scale <x_i, y_j> + bias)) over the number of pairs, z 1 for i = j and -1 else
    (Zhai et al. 2023, SigLIP, equation 1); the rest as of `softmax_loss`."""

    def score(logits: Array, rows: Array) -> tuple[Array, Array]:
        own = jnp.take_along_axis(logits, rows[..., None], -1)[..., 0]
        negatives = _negatives(rows, pairs.known, pairs.kinds)
        others = jnp.where(negatives, jax.nn.softplus(logits), 0).sum(-1)
        best = jnp.where(negatives, logits, -jnp.inf).max(-1)
        return jax.nn.softplus(-own) + others, (own >= best).astype(jnp.float32)

    loss, of_images = _by_rows(pairs.images, pairs.texts, score, scale, bias, chunk)
    # In the other direction only the accuracy is new.
    _, of_texts = jax.lax.stop_gradient(_by_rows(pairs.texts, pairs.images, score, scale, bias, chunk))
    mean = lambda x: mean_of_known(x, pairs.known)
    return mean(loss), mean(of_images), mean(of_texts)


def _by_rows(
    queries: Array, keys: Array, score: Score, scale: Array | float, bias: Array | float, chunk: int
) -> tuple[Array, Array]:
    """`score(logits, rows)` of each query against all keys: two arrays (b,); each device has the rows of its part of
    the batch, and all keys."""
    b, parts = len(queries), _shards(len(queries))
    keys = shard(keys, None, None)
    head = lambda z: shard(scale * (z @ keys.T) + bias, "batch", None, "vocab")
    apart = lambda x: shard(x.reshape(parts, b // parts, *x.shape[1:]), "batch", *(None,) * x.ndim)
    found = in_chunks(head, score, apart(queries), (apart(jnp.arange(b)),), chunk)
    return found[0].reshape(b), found[1].reshape(b)


def _shards(b: int) -> int:
    """Number of parts that the mesh cuts a batch of b rows into."""
    axes, sizes = RULES["batch"], dict(jax.sharding.get_abstract_mesh().shape)
    count = math.prod(sizes.get(axis, 1) for axis in axes or ())
    return count if b % count == 0 else 1


@jax.custom_vjp
def bounded(x: Array, low: float, high: float) -> Array:
    """x, cut to low .. high; at either end its gradient is that of the loss where a step along it leads back, else 0.

    So a parameter that is used in this form stays as if cut after every step (Radford et al. 2021, 2.5).
    """
    return jnp.clip(x, low, high)


def _bounded(x: Array, low: float, high: float) -> tuple[Array, tuple[Array, float, float]]:
    return jnp.clip(x, low, high), (x, low, high)


def _back(kept: tuple[Array, float, float], slope: Array) -> tuple[Array, None, None]:
    x, low, high = kept
    return jnp.where((x >= high) & (slope < 0) | (x <= low) & (slope > 0), 0, slope), None, None


bounded.defvjp(_bounded, _back)


@typed
def kinds_of(ids: Int[Array, "b s"], mask: Bool[Array, "b s"]) -> Int[Array, " b"]:
    """A number of each caption, the same for equal captions; those of others differ but for one pair in 2^32."""
    step = lambda n, x: (n * jnp.uint32(0x01000193) ^ x, None)  # FNV-1a, of ids instead of bytes
    read = jnp.where(mask, ids + 1, 0).astype(jnp.uint32).T
    n, _ = jax.lax.scan(step, jnp.full(len(ids), 0x811C9DC5, jnp.uint32), read)
    n = (n ^ (n >> 16)) * jnp.uint32(0x45D9F3B)
    return jax.lax.bitcast_convert_type(n ^ (n >> 16), jnp.int32)
