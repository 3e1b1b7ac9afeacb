"""Conditions that are ids: a class as one token, and prefix tokens that the network embeds itself."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from t2i_jax.core.arrays import Bool, Float, Int, typed
from t2i_jax.core.conditions import Batch, ConditionSpec
from t2i_jax.core.fields import Count, Size
from t2i_jax.core.specs import BatchSpec, FieldSpec
from t2i_jax.networks.condition.base import BaseCondition, ids, same_length, value
from t2i_jax.nn.layers import Embedding


@dataclasses.dataclass(frozen=True)
class ClassEmbedder(BaseCondition):
    """One token, a row of a class table; the last row is the unconditional class.

    >>> label = ClassEmbedder(10).batch_spec()["label"]
    >>> label.low, label.high
    (0, 9)
    """

    count: Count = 1000
    """number of classes; 0: an unconditional model"""
    null: bool = True
    """whether there is a row for the unconditional class; without it `drop` has no effect"""

    length = 1

    @property
    def spec(self) -> ConditionSpec:
        return ConditionSpec(classes=self.count)

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch."""
        return {"label": FieldSpec((), "int32", 0, self.count - 1)} if self.count else {}

    def init(self, key: Array, width: int) -> ClassTokens:
        return ClassTokens(self, key, width)


class ClassTokens(nnx.Module):
    """`label` int (b,) -> one token (b, 1, d), always visible."""

    def __init__(self, config: ClassEmbedder, key: Array, width: int):
        self.config, self.table = config, Embedding(config.count + config.null, width, key, special=int(config.null))

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        count = self.config.count
        label = ids(batch, "label", count) if count else jnp.zeros(drop.shape, jnp.int32)
        tokens = self.table(jnp.where(drop, count, label) if self.config.null else label)[:, None]
        return tokens.astype(dtype), jnp.ones(tokens.shape[:2], bool)


@dataclasses.dataclass(frozen=True)
class PrefixTokens(BaseCondition):
    """Prefix tokens from the image's own vocabulary and table: a start token, a class, codes of a sketch (Esser et al.
    2021)."""

    length: Size = 1

    @property
    def spec(self) -> ConditionSpec:
        return ConditionSpec(gives_ids=True)

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch; the model that embeds the ids bounds them."""
        prefix = FieldSpec((self.length,), "int32", 0, optional=self.length == 1)
        label = FieldSpec((), "int32", 0, optional=True)
        return {"prefix": prefix, "label": label} if self.length == 1 else {"prefix": prefix}

    def init(self, key: Array, width: int) -> PrefixIds:
        return PrefixIds(self)


class PrefixIds(nnx.Module):
    """`prefix` int (b, s), or `label` int (b,) where there is one token -> ids (b, s) that the network embeds itself,
    all visible.

    Dropped rows get id 0, the start token.
    """

    def __init__(self, config: PrefixTokens):
        self.config = config

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.int32
    ) -> tuple[Int[Array, "b s"], Bool[Array, "b s"]]:
        alone = self.config.length == 1 and "prefix" not in batch
        given = value(batch, "label")[:, None] if alone else value(batch, "prefix")
        same_length("prefix", given.shape[1], self.config.length)
        return jnp.where(drop[:, None], 0, given), jnp.ones(given.shape, bool)
