"""Sampling of GANs: the generator is evaluated once, maybe on the way between two prompts or two seeds."""

from __future__ import annotations

import abc
from functools import partial
from typing import Generic

import jax
from jax import Array

from t2i_jax.core.conditions import Batch, Condition
from t2i_jax.core.family import BaseFamily
from t2i_jax.core.specs import WEIGHT, BatchSpec, FieldSpec
from t2i_jax.core.types import Capabilities, M, Progress, Toward
from t2i_jax.sampling.options import GANSampler


class GANFamily(BaseFamily[GANSampler], Generic[M]):
    """The members that GANs have in common; a subclass says how images are generated.

    It is a convenience: `core.types.Interpolates` is what other code needs. M: its module.
    """

    condition: Condition
    matching: str
    """the DAMSM that judges images, if any"""

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        return Capabilities(family=True, shared_forward=True, frozen_networks=bool(self.matching), interpolation=True)

    def condition_spec(self) -> BatchSpec:
        """Batch fields that `sample` reads."""
        return self.condition.batch_spec()

    def batch_spec(self) -> BatchSpec:
        """Fields of a training batch: `image`, the condition, and with `matching` maybe the class of each image, whose
        others are no negatives."""
        label = {"label": FieldSpec((), "int32", 0, optional=True)} if self.matching else {}
        return {"image": self.sample_spec().field, **label, **self.condition_spec(), "weight": WEIGHT}

    @abc.abstractmethod
    def generate(
        self,
        model: M,
        condition: Batch,
        keys: Array,
        options: GANSampler,
        progress: Progress | None,
        toward: Toward | None,
    ) -> Array:
        """The images of `sample`, with traced options."""

    def sample(
        self,
        model: M,
        condition: Batch,
        keys: Array,
        options: GANSampler | None = None,
        *,
        guided: bool | None = None,
        progress: Progress | None = None,
        toward: Toward | None = None,
    ) -> Array:
        """Images float (b, i, j, 3) in [-1, 1], one for each row of the condition and each key of `keys` (b,).

        progress: its listener is called with (stages done, all stages, the image of the stage in the last one's size).
        toward: draw images on the way to another condition, its sentence and words on the line between both and the
            noise on the arc.
        """
        return _sample(self, model, condition, keys, (options or self.sampling).arrays(), progress, toward)


@partial(jax.jit, static_argnames="config")
def _sample(
    config: GANFamily[M],
    model: M,
    condition: Batch,
    keys: Array,
    options: GANSampler,
    progress: Progress | None,
    toward: Toward | None,
) -> Array:
    return config.generate(model, condition, keys, options, progress, toward)
