"""The members that most families have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

from jax import Array

from t2i_jax.core.conditions import Batch
from t2i_jax.core.fields import Checked
from t2i_jax.core.specs import WEIGHT, BatchSpec, SampleSpec
from t2i_jax.core.types import LossOutput, M, O, Objective, single_objective


class BaseFamily(Checked, Generic[M, O]):
    """A family with one loss and a field `sampling`; a subclass overrides what differs.

    It is a convenience: `core.types.Family` is what other code needs.
    """

    sampling: O

    def sample_spec(self) -> SampleSpec:
        raise NotImplementedError

    def condition_spec(self) -> BatchSpec:
        raise NotImplementedError

    def loss(self, model: M, batch: Batch, key: Array, train: bool = True) -> LossOutput:
        raise NotImplementedError

    def batch_spec(self) -> BatchSpec:
        """Fields of a training batch."""
        return {"codes": self.sample_spec().field, **self.condition_spec(), "weight": WEIGHT}

    def objectives(self) -> dict[str, Objective[M, Batch]]:
        """The loss, which trains all parameters."""
        return single_objective(self.loss)

    def options(self) -> O:
        """Default options of `sample`."""
        return self.sampling

    def check(self, options: O) -> None:
        """Raises nothing: the options validate themselves."""

    def loop_trips(self, options: O) -> int | Sequence[tuple[int, ...]]:
        """1: every loop of the sampler has a static length."""
        return 1
