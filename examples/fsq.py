"""A head: finite scalar quantisation and its factorised softmax (FSQ; Mentzer et al. 2023, arXiv:2309.15505).

A code is several integers, one for each channel of a bounded vector; its codebook is their product, which is never
listed. Given z the channels are independent: p(x | z) = prod_i softmax(W_i z + b_i)[x_i].

    from examples.fsq import FSQHead
    experiment = Experiment(Masked(head=FSQHead((8, 5, 5, 5)), order=Sets()), data)
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from t2i_jax.core.fields import LARGEST, Checked, Range
from t2i_jax.core.specs import CodeSpec
from t2i_jax.heads import PositionKeys
from t2i_jax.nn.layers import Embedding, Linear
from t2i_jax.sampling.guidance import guide
from t2i_jax.sampling.options import ARSampler
from t2i_jax.sampling.tokens import sample_token


class LevelEmbedding(nnx.Module):
    """One embedding for each level of each channel; a code's embedding is the sum over its channels."""

    def __init__(self, levels: tuple[int, ...], width: int, key: Array):
        self.table = Embedding(sum(levels), width, key)
        self.first = tuple(int(n) for n in np.cumsum((0, *levels[:-1])))

    def __call__(self, x: Array) -> Array:
        """Codes int (..., k) -> (..., width)."""
        return self.table(x + jnp.asarray(self.first)).sum(-2)


@dataclasses.dataclass(frozen=True)
class FSQHead(Checked):
    """p(x | z) of a code of k integers, channel i with `levels[i]` values."""

    levels: Annotated[tuple[int, ...], Range(2, LARGEST)] = (8, 5, 5, 5)

    @property
    def code(self) -> CodeSpec:
        return CodeSpec("int32", (len(self.levels),), self.levels)

    @property
    def knows_probability(self) -> bool:
        return True

    def quantize(self, y: Array) -> Array:
        """Vectors (..., k) -> codes int32 (..., k): the evenly spaced levels nearest to tanh(y) (section 3.1)."""
        steps = jnp.asarray(self.levels) - 1
        return jnp.round((jnp.tanh(y) + 1) / 2 * steps).astype(jnp.int32)

    def dequantize(self, x: Array) -> Array:
        """Codes int (..., k) -> the levels, float (..., k) in [-1, 1]."""
        return 2 * x / (jnp.asarray(self.levels) - 1) - 1

    def init(self, key: Array, width: int) -> Linear:
        return Linear(width, sum(self.levels), key, axes=("embed", "vocab"))

    def entrance(self, key: Array, width: int) -> LevelEmbedding:
        return LevelEmbedding(self.levels, width, key)

    def logits(self, module: Linear, z: Array) -> list[Array]:
        """The logits (..., levels[i]) of each channel, fp32."""
        return jnp.split(module(z).astype(jnp.float32), np.cumsum(self.levels)[:-1], -1)

    def loss(self, module: Linear, z: Array, x: Array, key: Array, train: bool = True) -> Array:
        """-log p(x | z) in nats: (b, t)."""
        return -self._log_p(self.logits(module, z), x)

    def sample(
        self, module: Linear, z: Array, null: Array | None, draws: PositionKeys, guidance: Array, options: ARSampler
    ) -> tuple[Array, Array]:
        """Codes int32 (b, m, k) and their log-probability (b, m); guidance acts on the logits of each channel."""
        logits = self.logits(module, z)
        if null is not None:
            logits = [guide(a, b, guidance) for a, b in zip(logits, self.logits(module, null), strict=True)]
        x = jnp.stack([sample_token(each, options, draws.uniform(i)) for i, each in enumerate(logits)], -1)
        return x, self._log_p(logits, x)

    def _log_p(self, logits: list[Array], x: Array) -> Array:
        at = lambda each, i: jnp.take_along_axis(jax.nn.log_softmax(each), x[..., i, None], -1)[..., 0]
        return jnp.stack([at(each, i) for i, each in enumerate(logits)]).sum(0)
