"""How a family reads its condition: `Conditioning`, dropped rows, and tokens with their summary."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from t2i_jax.core.arrays import Bool, Float, typed
from t2i_jax.core.conditions import Batch, Condition, ConditionTokens, SummarizedTokens
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import Checked, Share
from t2i_jax.networks.condition.classes import ClassEmbedder


@dataclasses.dataclass(frozen=True)
class Conditioning(Checked):
    """What an image depends on, how a network reads it, and how often training drops it."""

    what: Condition = ClassEmbedder()
    """the class, caption or features"""
    via: Literal["default", "prefix", "cross_attention", "modulation", "context", "joint"] = "default"
    """how the network reads the condition; what a network has, and its default, is documented there"""
    dropout: Share = 0.1
    """share of training examples whose condition is replaced by the unconditional one, for guidance; 0: none, and
    there is no unconditional branch"""

    def route(self, who: str, *routes: str) -> str:
        """`via`, or the first of `routes` as the default. Errors: `ConfigError` for one that `who` does not have."""
        if self.via == "default":
            return routes[0]
        if self.via not in routes:
            raise ConfigError(f"conditioning.via {self.via!r}: {who} has {', '.join(routes)}")
        return self.via


class Context(NamedTuple):
    """An encoded condition."""

    pooled: Array
    """(b, d), one vector of the whole condition"""
    tokens: Array
    """(b, s, d)"""
    mask: Array
    """(b, s): which tokens may be read"""
    maps: Array | None = None
    """(b, n, 2 c), keys and values of the positions of the feature maps of all neighbours, if a network reads any"""
    maps_mask: Array | None = None
    """(b, n): which of them may be read"""


@typed
def read_context(
    condition: Condition, module: ConditionTokens, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike
) -> Context:
    """The condition of a batch by its module: `pooled` is its summary vector, or the mean of its tokens.

    drop: bool (b,) marks rows that get the unconditional one.
    """
    tokens, mask = module(batch, drop, dtype)
    if condition.spec.gives_summary:
        return Context(cast(SummarizedTokens, module).whole(batch, drop), tokens, mask)
    return Context(pooled(tokens, mask), tokens, mask)


@typed
def pooled(tokens: Float[Array, "b s d"], mask: Bool[Array, "b s"]) -> Float[Array, "b d"]:
    """The mean of the unmasked tokens of (b, s, d): (b, d) fp32."""
    seen = mask[..., None].astype(jnp.float32)
    return (tokens * seen).sum(1) / jnp.maximum(seen.sum(1), 1)


def check_vectors(condition: Condition, width: int = 0) -> None:
    """Check that a condition gives vectors, of this width unless it is 0.

    Errors: `ConfigError` if it gives ids, or vectors or a summary vector of another width.
    """
    if condition.spec.gives_ids:
        name = type(condition).__name__
        raise ConfigError(f"condition {name} gives no vectors; ClassEmbedder, CaptionEncoder and TextFeatures do")
    for given in (condition.token_width(width), condition.spec.summary_width or width):
        if width and given != width:
            raise ConfigError(f"condition: vectors of {given} numbers; width={width} is needed")


@typed
def dropped_rows(key: Array, share: float, b: int, train: bool) -> Bool[Array, " {b}"]:
    """Rows bool (b,) of a batch whose condition is dropped: each with probability `share` in training, else none."""
    return jax.random.bernoulli(key, share, (b,)) if train else jnp.zeros(b, bool)
