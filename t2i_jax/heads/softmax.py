"""A categorical distribution over the codes of a codebook."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from t2i_jax.core.arrays import Float, Int, typed
from t2i_jax.core.fields import FREE, Checked, Range, Size
from t2i_jax.core.specs import CodeSpec
from t2i_jax.heads.draws import PositionKeys
from t2i_jax.nn.layers import Embedding, Linear
from t2i_jax.nn.losses import chunked_cross_entropy
from t2i_jax.sampling.guidance import guide
from t2i_jax.sampling.options import ARSampler
from t2i_jax.sampling.tokens import sample_token


@dataclasses.dataclass(frozen=True)
class SoftmaxHead(Checked):
    """p(x | z) = softmax(W z + b).

    >>> str(SoftmaxHead(512).code)
    '512 codes'
    """

    vocabulary: Size = 1024
    """number of codes of the codec"""
    label_smoothing: Annotated[float, Range(low=0, below=1)] = 0.0
    loss_chunk: Annotated[int, FREE] = 0
    """tokens per image whose logits are in memory at a time in training; 0: all, or as many as `nn.losses.MOST_LOGITS`
    allows; below 0: all"""

    knows_probability = True  # no field

    @property
    def code(self) -> CodeSpec:
        return CodeSpec("int32", sizes=(self.vocabulary,))

    def init(self, key: Array, width: int) -> Linear:
        return Linear(width, self.vocabulary, key, axes=("embed", "vocab"))

    def entrance(self, key: Array, width: int) -> Embedding:
        return Embedding(self.vocabulary, width, key)

    @typed
    def loss(
        self, module: Linear, z: Float[Array, "b t d"], x: Int[Array, "b t"], key: Array, train: bool = True
    ) -> Float[Array, "b t"]:
        """Cross-entropy of codes in nats. train: False omits label smoothing."""
        logits, smoothing = lambda z: self.logits(module, z), self.label_smoothing if train else 0.0
        return chunked_cross_entropy(logits, z, x, self.loss_chunk, label_smoothing=smoothing)[0]

    @typed
    def sample(
        self,
        module: Linear,
        z: Float[Array, "b m d"],
        null: Float[Array, "b m d"] | None,
        draws: PositionKeys,
        guidance: Array,
        options: ARSampler,
    ) -> tuple[Int[Array, "b m"], Float[Array, "b m"]]:
        """Codes int32 and their log-probability before truncation and temperature."""
        logits = self.logits(module, z)
        if null is not None:
            logits = guide(logits, self.logits(module, null), guidance)
        x = sample_token(logits, options, draws.uniform(0))
        return x, jnp.take_along_axis(jax.nn.log_softmax(logits), x[..., None], -1)[..., 0]

    @typed
    def logits(self, module: Linear, z: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        return module(z).astype(jnp.float32)
