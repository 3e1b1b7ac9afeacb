"""A condition on the size of the original image, and on the part of it that is shown."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from t2i_jax.core.arrays import Bool, Float, typed
from t2i_jax.core.conditions import Batch
from t2i_jax.core.fields import Grid, Range
from t2i_jax.core.specs import BatchSpec, FieldSpec
from t2i_jax.networks.condition.base import BaseCondition
from t2i_jax.nn.layers import Linear
from t2i_jax.nn.modulation import sinusoid


@dataclasses.dataclass(frozen=True)
class SizeAndCrop(BaseCondition):
    """One token of the original image's rows and columns, and of where the crop begins (Podell et al. 2023, SDXL, 2.2):
    a model that knows them does not draw enlarged images, or halves of things, unless it is asked to.

    It is joined to another condition, `Joined((TextFeatures(...), SizeAndCrop()))`, and stays when that is dropped.
    """

    original: Grid = (1024, 1024)
    """Rows and columns of the original that samples are drawn as if they came from, uncropped."""
    frequency_dim: Annotated[int, Range(low=2)] = 64
    """Number of sines and cosines that embed each number."""

    length = 1

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch: `crop`, rows and columns of the original, then the rows above and the
        columns left of the crop, in pixels of the image as it was scaled for the batch."""
        return {"crop": FieldSpec((4,), "float32", optional=True)}

    def init(self, key: Array, width: int) -> SizeAndCropToken:
        return SizeAndCropToken(self, key, width)


class SizeAndCropToken(nnx.Module):
    """`crop` (b, 4) -> one token (b, 1, d), always visible."""

    def __init__(self, config: SizeAndCrop, key: Array, width: int):
        keys = jax.random.split(key)
        self.config = config
        self.into = Linear(4 * config.frequency_dim, width, keys[0])
        self.out = Linear(width, width, keys[1])

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        whole = jnp.asarray([*self.config.original, 0.0, 0.0])
        numbers = batch["crop"] if "crop" in batch else jnp.broadcast_to(whole, (len(drop), 4))
        waves = sinusoid(rearrange(numbers, "b n -> (b n)"), self.config.frequency_dim)
        waves = rearrange(waves, "(b n) f -> b (n f)", n=4)
        tokens = self.out(jax.nn.silu(self.into(waves)))[:, None]
        return tokens.astype(dtype), jnp.ones(tokens.shape[:2], bool)
