"""Sampling from logits: temperature, top-k, top-p, and the draw itself.

Everything is a function of logits (..., v) in fp32 and of traced options, so no setting recompiles. There is no sort:
truncation keeps every value above a threshold, whose bits are found exactly, one by one, each by a count over the
vocabulary. A draw inverts the cumulative distribution at one uniform number per row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from t2i_jax.core.arrays import Float, Int, typed
from t2i_jax.noise.categorical import inverse_cdf as draw
from t2i_jax.noise.schedule import expand_like
from t2i_jax.sampling.options import ARSampler, StreamSampler


@typed
def filter_logits(
    logits: Float[Array, "*b v"], temperature: Array | float, top_k: Array | int, top_p: Array | float
) -> Float[Array, "*b v"]:
    """Weights fp32, the largest 1: exp of the logits after temperature, top-k and top-p, in that order.

    Top-p sums the probabilities that remain after top-k, and keeps a token while those above it sum to at most p
    (Holtzman et al. 2020); equal logits are kept or dropped together.
    """
    temperature, top_k, top_p = (expand_like(x, logits) for x in (temperature, top_k, top_p))
    x = logits.astype(jnp.float32)
    gap = (x.max(-1, keepdims=True) - x) / jnp.maximum(temperature, 1e-5)
    weights = jnp.exp(-gap)

    k = jnp.where(top_k > 0, top_k, x.shape[-1] + 1)
    nearer = lambda t: (gap[..., None, :] < t).sum(-1)
    weights = jnp.where(gap <= _last(lambda t: nearer(t) < k, top_k > 0, gap), weights, 0.0)

    p = jnp.where(top_p < 1, jnp.maximum(top_p, 0) * weights.sum(-1, keepdims=True), jnp.inf)
    above = lambda t: jnp.where(gap[..., None, :] < t, weights[..., None, :], 0.0).sum(-1)
    return jnp.where(gap <= _last(lambda t: above(t) <= p, top_p < 1, gap), weights, 0.0)


@typed
def sample_token(logits: Float[Array, "*b v"], options: ARSampler, uniform: Float[Array, "*b"]) -> Int[Array, "*b"]:
    """Token ids int32 from guided logits and one uniform number in [0, 1) per row."""
    drawn = draw(filter_logits(logits, options.temperature, options.top_k, options.top_p), uniform)
    greedy = expand_like(options.greedy, uniform)
    best = lambda: jnp.where(greedy, jnp.argmax(logits, -1).astype(jnp.int32), drawn)
    return jax.lax.cond(greedy.any(), best, lambda: drawn)  # argmax is slow on CPUs


@typed
def sample_in_clusters(
    logits: Float[Array, "*b v"],
    options: StreamSampler,
    uniform: Float[Array, " two *b"],
    clusters: Int[Array, " v"],
    count: int,
) -> Int[Array, "*b"]:
    """Token ids int32 from guided logits and two uniform numbers per row: first a cluster, then a token in it.

    The probability of a cluster is that of its tokens together; it is drawn among the `top_clusters` most probable ones
    (Ding et al. 2022, CogView2). Without these, and where `greedy`, it is `sample_token` with the first number.
    clusters: that of each token, 0 .. count - 1.
    """
    of, temper = jnp.asarray(options.top_clusters), lambda x: jnp.maximum(expand_like(x, logits), 1e-5)

    def in_two() -> Array:
        x = logits.astype(jnp.float32) / temper(options.temperature)
        p = jnp.matmul(jax.nn.softmax(x), jax.nn.one_hot(clusters, count), precision="highest")
        order = jnp.argsort(-p, -1)
        kept = jnp.where(jnp.arange(count) < expand_like(of, p), jnp.take_along_axis(p, order, -1), 0.0)
        chosen = jnp.take_along_axis(order, draw(kept, uniform[0])[..., None], -1)
        gap = jnp.where(clusters == chosen, x, -jnp.inf)
        gap = (gap - gap.max(-1, keepdims=True)) / temper(options.cluster_temperature)
        drawn = draw(jnp.exp(gap), uniform[1])
        plain = expand_like((of == 0) | jnp.asarray(options.greedy), drawn)
        return jax.lax.cond(plain.any(), lambda: jnp.where(plain, at_once(), drawn), lambda: drawn)

    at_once = lambda: sample_token(logits, options, uniform[0])
    return jax.lax.cond(jnp.any(of > 0), in_two, at_once)


@typed
def uniforms(keys: Array, positions: Int[Array, " t"]) -> Float[Array, "t b"]:
    """Uniform numbers of positions: each from `fold_in(image key, position)`, independent of the batch."""
    one = lambda key, position: jax.random.uniform(jax.random.fold_in(key, position))
    return jax.vmap(lambda position: jax.vmap(one, (0, None))(keys, position))(positions)


def _last(holds: Callable[[Array], Array], wanted: Array, gap: Array) -> Array:
    """The largest threshold (..., 1) for which a predicate that is true up to some point holds; infinity if not wanted.

    `holds` maps thresholds (..., m, 1) to (..., m). Non-negative floats are ordered like their bits, so the bits are
    found from the top: one per pass on a CPU, where each comparison is costly, four elsewhere, where each pass is.
    """

    infinity = jnp.int32(0x7F800000)
    floats = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    unlimited = jnp.full((*gap.shape[:-1], 1), infinity)

    def search(bits: int) -> Array:
        digits = jnp.arange(1, 1 << bits, dtype=jnp.int32)

        def digit(i: Array, found: Array) -> Array:
            shift = jnp.maximum(31 - bits * (i + 1), 0)
            trials = jnp.minimum(found + (digits << shift), infinity)
            passed = holds(floats(trials)[..., None]).sum(-1, keepdims=True, dtype=jnp.int32)
            return jnp.minimum(found + (passed << shift), infinity)

        return jax.lax.fori_loop(0, -(-31 // bits), digit, jnp.zeros_like(unlimited))

    by_platform = partial(jax.lax.platform_dependent, cpu=partial(search, 1), default=partial(search, 4))
    return floats(jax.lax.cond(jnp.any(wanted), by_platform, lambda: unlimited))
