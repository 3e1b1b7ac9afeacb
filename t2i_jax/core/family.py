"""The members that most families have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from t2i_jax.core.fields import Checked
from t2i_jax.core.specs import WEIGHT, BatchSpec, SampleSpec
from t2i_jax.core.types import LossOutput, Objective, single_objective


class BaseFamily(Checked):
    """A family with one loss and a field `sampling`; a subclass overrides what differs.

    It is a convenience: `core.types.Family` is what other code needs. Its options are those of the subclass; it is not
    generic in them, as tyro, which parses configs, warns of generic bases.
    """

    sampling: Any
    loss: Callable[..., LossOutput]
    """(model, batch, key, train)"""

    def sample_spec(self) -> SampleSpec:
        raise NotImplementedError

    def condition_spec(self) -> BatchSpec:
        raise NotImplementedError

    def batch_spec(self) -> BatchSpec:
        """Fields of a training batch."""
        return {"codes": self.sample_spec().field, **self.condition_spec(), "weight": WEIGHT}

    def objectives(self) -> dict[str, Objective]:
        """The loss, which trains all parameters."""
        return single_objective(self.loss)

    def options(self) -> Any:
        """Default options of `sample`."""
        return self.sampling

    def check(self, options: Any) -> None:
        """Raises nothing: the options validate themselves."""

    def loop_trips(self, options: Any) -> int | Sequence[tuple[int, ...]]:
        """1: every loop of the sampler has a static length."""
        return 1
