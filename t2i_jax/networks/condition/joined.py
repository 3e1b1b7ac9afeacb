"""A condition that joins others."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from t2i_jax.core.arrays import Bool, Float, typed
from t2i_jax.core.conditions import Batch, Condition, ConditionSpec
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.specs import BatchSpec
from t2i_jax.networks.condition.base import BaseCondition
from t2i_jax.networks.condition.encoders import LowCodes
from t2i_jax.networks.condition.features import TextFeatures


@dataclasses.dataclass(frozen=True)
class Joined(BaseCondition):
    """The tokens of several conditions, one after the other: a caption, and the codes of a small image."""

    parts: tuple[Condition, ...] = (TextFeatures(), LowCodes())

    def __post_init__(self):
        super().__post_init__()
        names = [name for part in self.parts for name in part.batch_spec()]
        if double := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"parts: two of them read '{double[0]}'")
        if not self.parts or any(part.spec.gives_ids for part in self.parts):
            raise ConfigError("parts: conditions that give vectors are joined, at least one")

    @property
    def spec(self) -> ConditionSpec:
        every = [part.spec for part in self.parts]
        return ConditionSpec(
            has_null=all(spec.has_null for spec in every), has_padding=any(spec.has_padding for spec in every)
        )

    @property
    def length(self) -> int:
        return sum(part.length for part in self.parts)

    def token_width(self, width: int) -> int:
        widths = [part.token_width(width) for part in self.parts]
        return next((other for other in widths if other != width), width)

    def batch_spec(self) -> BatchSpec:
        """Fields that its parts read of a batch."""
        return {name: field for part in self.parts for name, field in part.batch_spec().items()}

    def init(self, key: Array, width: int) -> JoinedTokens:
        return JoinedTokens(self, key, width)


class JoinedTokens(nnx.Module):
    """The tokens (b, s, d) of all parts, and which of them are visible."""

    def __init__(self, config: Joined, key: Array, width: int):
        keys = jax.random.split(key, len(config.parts))
        self.parts = nnx.List([part.init(key, width) for part, key in zip(config.parts, keys, strict=True)])

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        tokens, valid = zip(*(part(batch, drop, dtype) for part in self.parts), strict=True)
        return jnp.concatenate(tokens, 1), jnp.concatenate(valid, 1)
