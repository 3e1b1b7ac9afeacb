"""Sampling codes one by one in raster order, for any family whose network has a prefill and a decode step.

The network is a `core.types.CachedNetwork`:

    prefill(condition, dropped) -> logits (b, v) of token 0, state
    decode(state, codes, i) -> logits (b, v) of token i + 1, state

whose state is a dataclass with `caches` and `grow(count)`, which makes room for `count` tokens.
"""

from __future__ import annotations

import abc
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.conditions import Batch
from t2i_jax.core.family import BaseFamily
from t2i_jax.core.sharding import shard
from t2i_jax.core.specs import CodeSpec, SampleSpec
from t2i_jax.core.types import CachedNetwork, Capabilities, S
from t2i_jax.nn.stationary import weight_stationary
from t2i_jax.nn.transformer import REMATS, Transformer
from t2i_jax.sampling.guidance import Branches, guide, is_guided
from t2i_jax.sampling.inpainting import known_and_keep
from t2i_jax.sampling.options import ARSampler
from t2i_jax.sampling.progress import Progress, known_so_far, report
from t2i_jax.sampling.tokens import sample_token, uniforms

SEGMENTS = 4
"""Number of sizes that the cache grows through."""


def segments_of(depth: int) -> int:
    """Segments of a model of `depth` layers: fewer for deep ones, as each compiles all layers again."""
    return max(1, min(SEGMENTS, 48 // depth))


class Autoregressive(BaseFamily[ARSampler]):
    """The members of a family that samples its codes in raster order."""

    vocabulary: int
    """number of codes"""
    grid: tuple[int, int]
    """rows and columns of codes"""
    transformer: Transformer

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training, but an unconditional branch."""
        return Capabilities(
            family=True,
            guidance=True,
            token_by_token=True,
            likelihood=True,
            inpaint=True,
            inpaint_prefix=True,
            super_resolution=self.reads_low_codes,
            int8=True,
            remat=REMATS,
            attention=True,
            loss_chunk=True,
        )

    @abc.abstractmethod
    def init(self, key: Array) -> CachedNetwork: ...

    @property
    def draws(self) -> int:
        """Uniform numbers that a code is drawn with."""
        return 1

    def draw(self, model: nnx.Module, logits: Array, options: ARSampler, uniform: Array) -> Array:
        """Codes int32 (b,) from guided logits (b, v) and uniform numbers (draws, b); traced."""
        return sample_token(logits, options, uniform[0])

    def with_options(self, condition: Batch, options: ARSampler, b: int) -> Batch:
        """The condition of b images, with what the network reads of the options."""
        return condition

    def sample_spec(self) -> SampleSpec:
        """Shape and dtype of a sample."""
        return SampleSpec(self.grid, CodeSpec("int32", sizes=(self.vocabulary,)))

    def sample(
        self,
        model: CachedNetwork[S],
        condition: Batch,
        keys: Array,
        options: ARSampler | None = None,
        *,
        known: Array | None = None,
        keep: Array | None = None,
        guided: bool | None = None,
        segments: int = 0,
        progress: Progress | None = None,
    ) -> Array:
        """Codes int32 (b, h, w), one image per row of the condition and per key of `keys` (b,).

        An image depends only on its own key and condition, not on its batch. Guidance runs both branches as one batch
        of 2b. All options are traced: new values do not recompile.

        known, keep: codes (b, h, w), and a bool (b, h, w) of those to copy, to complete an image; they are the first
            ones in raster order.
        guided: False skips the unconditional branch, whatever the options say, which halves the cost. None skips it if
            training drops no conditions, since no unconditional branch was trained.
        segments: number of steps in which the cache grows; attention reads no more than the current size; static. Each
            segment compiles all layers again, so 0 means 4 for shallow models and fewer for deep ones.
        progress: its listener is called with (tokens so far, all tokens, codes (b, h, w), -1 where one is not drawn).
        """
        known, keep = known_and_keep(self.capabilities, self.sample_spec(), len(keys), known, keep)
        options, guided = (options or self.options()).arrays(), is_guided(self.capabilities, guided)
        segments = segments or segments_of(self.transformer.depth)
        return _sample(self, model, condition, keys, options, known, keep, guided, segments, progress)


@partial(jax.jit, static_argnames=("config", "guided", "segments"))
def _sample(
    config: Autoregressive,
    model: CachedNetwork[S],
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
    uniform = rearrange(uniforms(keys, jnp.arange(config.draws * length)), "(n l) b -> n l b", l=length)
    condition = config.with_options(condition, options, b)

    def pick(logits: Array, i: Array | int) -> Array:
        """Token i of each image, from logits of all rows."""
        logits = guide(*both.split(shard(logits, "batch", None)), options.guidance_at(i, length))
        return jnp.where(keep[:, i], known[:, i], config.draw(model, logits, options, uniform[:, i]))

    def step(carry: tuple[Array, object], i: Array) -> tuple[tuple[Array, object], None]:
        codes, caches = carry
        logits, after = model.decode(dataclasses.replace(state, caches=caches), both.rows(codes[:, i]), i)
        codes = codes.at[:, i + 1].set(pick(logits, i + 1))
        shown = known_so_far(codes, jnp.arange(length) < i + 2)
        report(progress, i + 2, length, shown.reshape(b, *config.grid))
        return (codes, after.caches), None

    model = weight_stationary(model)
    logits, state = model.prefill(both.rows(condition), both.dropped(b))
    codes = jnp.zeros((b, length), jnp.int32).at[:, 0].set(pick(logits, 0))
    start = 0
    for stop in sorted({max(length * n // segments, 1) for n in range(1, segments + 1)}):
        state = state.grow(stop)
        carry, _ = jax.lax.scan(step, (codes, state.caches), jnp.arange(start, min(stop, length - 1)))
        codes, state, start = carry[0], dataclasses.replace(state, caches=carry[1]), stop
    return codes.reshape(b, *config.grid)
