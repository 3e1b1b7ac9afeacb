"""Sampling codes one by one in raster order, for any family with a prefill and a decode step.

Such a family is a frozen dataclass with `grid`, `length`, `depth`, `options()`, and

    prefill(model, condition, dropped) -> logits (b, v) of token 0, state
    decode(state, codes, i) -> logits (b, v) of token i + 1, state

whose state is a dataclass with `caches` and `grow(count)`, which makes room for `count` tokens.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.conditions import Batch
from t2i_jax.core.sharding import shard
from t2i_jax.nn.stationary import weight_stationary
from t2i_jax.sampling.guidance import Branches, guide
from t2i_jax.sampling.inpainting import known_and_keep
from t2i_jax.sampling.options import ARSampler
from t2i_jax.sampling.progress import Progress, report
from t2i_jax.sampling.tokens import sample_token, uniforms

SEGMENTS = 4
"""Number of sizes that the cache grows through."""


def segments_of(depth: int) -> int:
    """Segments of a model of `depth` layers: fewer for deep ones, as each compiles all layers again."""
    return max(1, min(SEGMENTS, 48 // depth))


def sample(
    config: Any,  # a `TokenByToken`; families pass themselves, of which pyright does not see that
    model: nnx.Module,
    condition: Batch,
    keys: Array,
    options: ARSampler | None,
    known: Array | None,
    keep: Array | None,
    guided: bool,
    segments: int,
    progress: Progress | None,
) -> Array:
    """Codes int32 (b, h, w), one image per row of the condition and per key of `keys` (b,), in one compiled program.

    An image depends on its own key and condition only, not on the rest of the batch. Guidance runs both branches as one
    batch of 2b. All options are traced: new values do not recompile.

    known, keep: codes (b, h, w), and a bool (b, h, w) of those to copy, to complete an image; they must be the first
        ones in raster order.
    guided: False skips the unconditional branch, whatever the options are, at half the cost.
    segments: the cache grows in this many steps, and attention reads no more than it holds; static. Each segment
        compiles all layers again; 0: `SEGMENTS`.
    progress: its listener is called with (tokens so far, all tokens, codes (b, h, w)).
    """
    known, keep = known_and_keep(config.capabilities, config.sample_spec(), len(keys), known, keep)
    segments = segments or SEGMENTS
    options = (options or config.options()).arrays()
    return _sample(config, model, condition, keys, options, known, keep, guided, segments, progress)


@partial(jax.jit, static_argnames=("config", "guided", "segments"))
def _sample(
    config: Any,  # a `TokenByToken`; families pass themselves, of which pyright does not see that
    model: nnx.Module,
    condition: Batch,
    keys: Array,
    options: ARSampler,
    known: Array,
    keep: Array,
    guided: bool,
    segments: int,
    progress: Progress | None,
) -> Array:
    b, length = keys.shape[0], config.length
    both = Branches(guided)
    known, keep = (rearrange(x, "b h w -> b (h w)") for x in (known, keep))
    uniform = uniforms(keys, jnp.arange(length))

    def pick(logits: Array, i: Array | int) -> Array:
        """Token i of each image, from logits of all rows."""
        logits = guide(*both.split(shard(logits, "batch", None)), options.guidance_at(i, length))
        return jnp.where(keep[:, i], known[:, i], sample_token(logits, options, uniform[i]))

    def step(carry: tuple[Array, object], i: Array) -> tuple[tuple[Array, object], None]:
        codes, caches = carry
        logits, after = config.decode(dataclasses.replace(state, caches=caches), both.rows(codes[:, i]), i)
        codes = codes.at[:, i + 1].set(pick(logits, i + 1))
        report(progress, i + 2, length, codes.reshape(b, *config.grid))
        return (codes, after.caches), None

    model = weight_stationary(model)
    logits, state = config.prefill(model, both.rows(condition), both.dropped(b))
    codes = jnp.zeros((b, length), jnp.int32).at[:, 0].set(pick(logits, 0))
    start = 0
    for stop in sorted({max(length * n // segments, 1) for n in range(1, segments + 1)}):
        state = state.grow(stop)
        carry, _ = jax.lax.scan(step, (codes, state.caches), jnp.arange(start, min(stop, length - 1)))
        codes, state, start = carry[0], dataclasses.replace(state, caches=carry[1]), stop
    return codes.reshape(b, *config.grid)
