"""What conditions share: members that most have, fields of a batch, and how they are read."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from t2i_jax.core.arrays import Bool, Int, typed
from t2i_jax.core.conditions import Batch, ConditionSpec
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import Checked
from t2i_jax.core.specs import BatchSpec, FieldSpec, missing


def text_spec(vocabulary: int, length: int, mask: bool = True) -> BatchSpec:
    """Spec of token ids and their mask; `mask` False: a batch may omit the mask."""
    return {
        "text": FieldSpec((length,), "int32", 0, vocabulary - 1),
        "text_mask": FieldSpec((length,), "bool", optional=not mask),
    }


def features_spec(length: int, dim: int) -> BatchSpec:
    """Spec of features of a frozen text encoder; with one vector per caption the mask may be that of the caption's
    tokens."""
    mask = FieldSpec((None if length == 1 else length,), "bool", optional=True)
    return {"features": FieldSpec((length, dim), "float32"), "text_mask": mask}


class BaseCondition(Checked):
    """The members of conditions whose tokens have the width of the network and are all real."""

    @property
    def spec(self) -> ConditionSpec:
        return ConditionSpec()

    def token_width(self, width: int) -> int:
        return width


def value(batch: Batch, name: str) -> Array:
    """The field `name` of the batch. Errors: `ConfigError` if it is missing: data and model do not match."""
    if name not in batch:
        raise ConfigError(missing(name, batch))
    return jnp.asarray(batch[name])


def ids(batch: Batch, name: str, count: int) -> Array:
    """Ids of the batch, checked to be in 0 .. count - 1 where their values are known (outside of `jit`)."""
    x = value(batch, name)
    if not isinstance(x, Tracer):
        known = np.asarray(x)
        if known.size and (known.min() < 0 or known.max() >= count):
            raise ConfigError(f"'{name}' holds ids {known.min()} .. {known.max()}; the model has 0 .. {count - 1}")
    return x


@typed
def caption(
    batch: Batch, drop: Bool[Array, " b"], vocabulary: int, length: int
) -> tuple[Int[Array, "b s"], Bool[Array, "b s"]]:
    """`text` int (b, s), and a mask (b, s) of what is read of it: nothing of the rows `drop` (b,)."""
    text, mask = ids(batch, "text", vocabulary), value(batch, "text_mask")
    same_length("text", text.shape[1], length)
    return text, mask & ~drop[:, None]


def same_length(name: str, found: int, length: int) -> None:
    """Errors: `ConfigError` for a field of another length than the condition has."""
    if found != length:
        raise ConfigError(f"'{name}' has {found} slots a row; the condition of the model has length {length}")
