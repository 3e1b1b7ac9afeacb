"""Sampling from categorical distributions over many classes, by inverting the cumulative distribution.

Gumbel-max needs a random number per class, and its fp32 noise ends at 16: next to a class of probability near 1,
classes below 1e-7 are never drawn, however many there are (Zheng et al. 2024, arXiv:2409.02908). Here each sample takes
two random numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from t2i_jax.core.arrays import Float, Int, typed


@typed
def uniform(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Uniform numbers in [0, 1), fp32, in steps of 2^-32 near 0.

    `jax.random.uniform` has steps of 2^-23, too coarse to decide what happens with a probability of 1e-6.
    """
    return jnp.minimum(jax.random.bits(key, shape, jnp.uint32).astype(jnp.float32) * 2.0**-32, 1 - 2.0**-24)


@typed
def draw(log_p: Float[Array, "*#b v"], uniform: Float[Array, "*#b r"]) -> Int[Array, "..."]:
    """Sample a class int32 from each distribution, normalised or not, v > 1.

    uniform: two numbers of `uniform`; further ones are ignored. The first chooses between the most probable class
    and all others, the second among the others. Rare events, down to 1e-9, keep their probability: one class next to
    one near 1, or many classes together, as in a step of a masking chain that unmasks one token in a thousand.
    """
    index, most = jnp.arange(log_p.shape[-1]), log_p.max(-1, keepdims=True)
    top = jnp.where(log_p == most, index, len(index)).min(-1)  # faster on CPUs than argmax
    others = jnp.where(index == top[..., None], -jnp.inf, log_p)
    highest = jnp.maximum(others.max(-1, keepdims=True), jnp.finfo(log_p.dtype).min)
    weights = jnp.exp(others - highest)
    log_odds = (most - highest)[..., 0] - jnp.log(weights.sum(-1))
    # The rarer event is the one below the threshold, since uniform numbers are finest near 0.
    u, p_rest, p_top = uniform[..., 0], jax.nn.sigmoid(-log_odds), jax.nn.sigmoid(log_odds)
    rest = jnp.where(log_odds > 0, u < p_rest, u >= p_top)
    return jnp.where(rest, inverse_cdf(weights, uniform[..., 1]), top).astype(jnp.int32)


@typed
def inverse_cdf(weights: Float[Array, "*#b v"], uniform: Float[Array, "*#b"]) -> Int[Array, "..."]:
    """The class int32 at which the cumulative sum of the weights exceeds a fraction `uniform` of the total.

    The sum is inverted in two levels, first blocks and then within one: no scan runs over all classes, and rounding
    errors are those of sums of sqrt(v) terms. A class of weight 0 is never drawn.
    """
    v = weights.shape[-1]
    size = 1 << max(v - 1, 1).bit_length() // 2
    blocks = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, -v % size)])
    blocks = blocks.reshape(*weights.shape[:-1], -1, size)
    sums = blocks.sum(-1)
    block, rest = _invert(sums, uniform * sums.sum(-1))
    inner, _ = _invert(jnp.take_along_axis(blocks, block[..., None, None], -2)[..., 0, :], rest)
    return (block * size + inner).astype(jnp.int32)


def _invert(weights: Array, target: Array) -> tuple[Array, Array]:
    """The first index of weights (..., n) whose cumulative sum exceeds target (...), and the target minus the sum
    before it."""
    sums = jnp.cumsum(weights, -1)
    # Rounding may put the target at or past the end: then take the last index of nonzero weight, as is correct.
    passed = (weights > 0) & (sums > target[..., None])
    last = weights.shape[-1] - 1 - jnp.argmax(jnp.flip(weights, -1) > 0, -1)
    index = jnp.where(passed.any(-1), jnp.argmax(passed, -1), last)
    at = lambda x: jnp.take_along_axis(x, index[..., None], -1)[..., 0]
    return index, target - (at(sums) - at(weights))
