"""From logits to a choice: guidance, temperature, top-k, top-p, and the draw itself.

Everything is a function of logits (..., v) in fp32 and of traced options, so no setting recompiles. Nothing is sorted:
a cut keeps every value from some threshold up, and the bits of that threshold are found exactly, one by one, each from
a count over the vocabulary. A draw inverts the cumulative distribution at one uniform number per row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from t2i_jax.core.fields import LARGEST, Range
from t2i_jax.noise.categorical import inverse_cdf as draw
from t2i_jax.noise.schedule import expand_like
from t2i_jax.sampling.options import Options


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ARSampler(Options):
    """How tokens are drawn; every field is a number, or one per image (b,), and is traced."""

    guidance: Annotated[float | Array, Range()] = 3.0
    """Scale s of l = s (l - l') + l', with l' the logits without the condition; 1 is none."""
    guidance_start: Annotated[float | Array, Range(0, 1)] = 0.0
    """Guidance begins after this fraction of the tokens."""
    guidance_stop: Annotated[float | Array, Range(0, 1)] = 1.0
    """Guidance ends after this fraction of the tokens."""
    guidance_power: Annotated[float | Array, Range(low=0)] = 0.0
    """The scale grows as 1 + (s - 1) u^power over the sequence, u in (0, 1]: 0 is constant, 1 linear."""
    guidance_cosine: bool | Array = False
    """Shape the growth by (1 - cos(pi u^power)) / 2 (Gao et al. 2023, MDT)."""
    temperature: Annotated[float | Array, Range(low=0)] = 1.0
    """Logits are divided by it; never by less than 1e-5."""
    top_k: Annotated[int | Array, Range(0, LARGEST)] = 0
    """Keep the k largest logits, and what ties with the k-th; 0 keeps all."""
    top_p: Annotated[float | Array, Range(0, 1)] = 1.0
    """Keep the smallest set of largest probabilities whose sum is above p; 1 keeps all."""
    greedy: bool | Array = False
    """Take the largest logit instead of drawing."""


def guidance_at(options: ARSampler, position: Array | int, length: int) -> Array:
    """The guidance scale for token `position` of `length`: a scalar, or (b,) if the options are per image."""
    u = ((position + 1) / length) ** jnp.asarray(options.guidance_power, jnp.float32)
    u = jnp.where(options.guidance_cosine, (1 - jnp.cos(math.pi * u)) / 2, u)
    # Positions are whole numbers: the slack lets a stop of n / length mean n tokens whatever the rounding.
    first = jnp.asarray(options.guidance_start, jnp.float32) * length - 1e-3
    last = jnp.asarray(options.guidance_stop, jnp.float32) * length - 1e-3
    return jnp.where((position >= first) & (position < last), 1 + (options.guidance - 1) * u, 1.0)


def filter_logits(logits: Array, temperature: Array | float, top_k: Array | int, top_p: Array | float) -> Array:
    """Weights (..., v) fp32, the largest 1: exp of the logits after temperature, top-k and top-p, in that order.

    Top-p sums the probabilities that are left after top-k, and keeps a token while the ones above it sum to p at most
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


def sample_token(logits: Array, options: ARSampler, uniform: Array) -> Array:
    """Token ids (...) int32 from guided logits (..., v) and one uniform number in [0, 1) per row."""
    drawn = draw(filter_logits(logits, options.temperature, options.top_k, options.top_p), uniform)
    greedy = expand_like(options.greedy, uniform)
    best = lambda: jnp.where(greedy, jnp.argmax(logits, -1).astype(jnp.int32), drawn)
    return jax.lax.cond(greedy.any(), best, lambda: drawn)  # a CPU takes its time for an argmax


def uniforms(keys: Array, positions: Array) -> Array:
    """Uniform numbers (t, b) for positions (t,): each from `fold_in(image key, position)`, whatever batch it is in."""
    one = lambda key, position: jax.random.uniform(jax.random.fold_in(key, position))
    return jax.vmap(lambda position: jax.vmap(one, (0, None))(keys, position))(positions)


def _last(holds: Callable[[Array], Array], wanted: Array, gap: Array) -> Array:
    """The largest threshold (..., 1) for which a predicate that is true up to some point holds; infinity if not wanted.

    `holds` maps thresholds (..., m, 1) to (..., m). Floats from 0 up are ordered as their bits are, so the bits are
    found from the top: one a pass on a CPU, where each comparison costs, four elsewhere, where each pass does.
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
