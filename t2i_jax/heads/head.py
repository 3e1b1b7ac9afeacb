"""The protocol of heads: the distribution p(x | z) of a token's code, given the network's output z."""

from __future__ import annotations

import dataclasses
from typing import Protocol, TypeVar

from flax import nnx
from jax import Array

from t2i_jax.core.fields import Checked, Size
from t2i_jax.core.specs import CodeSpec
from t2i_jax.heads.draws import PositionKeys
from t2i_jax.nn.layers import Linear
from t2i_jax.sampling.options import ARSampler

M = TypeVar("M", bound=nnx.Module)


class TokenHead(Protocol[M]):
    """A frozen config of a head. Every head works with every order; an order by confidence needs probabilities."""

    @property
    def code(self) -> CodeSpec:
        """The code of a token."""
        ...

    @property
    def knows_probability(self) -> bool:
        """Whether `loss` is -log p(x | z) in nats of a discrete code, and `sample` gives its log-probability."""
        ...

    def init(self, key: Array, width: int) -> M:
        """A module with the head's parameters, which reads z of this width."""
        ...

    def entrance(self, key: Array, width: int) -> nnx.Module:
        """A module that embeds codes (..., *code.shape) as the network's input (..., width)."""
        ...

    def loss(self, module: M, z: Array, x: Array, key: Array, train: bool = True) -> Array:
        """The loss of each token, fp32 (b, t), for codes x (b, t, *code.shape); train is static."""
        ...

    def sample(
        self, module: M, z: Array, null: Array | None, draws: PositionKeys, guidance: Array, options: ARSampler
    ) -> tuple[Array, Array | None]:
        """Codes (b, m, *code.shape), and a score (b, m): log p(x | z) where the head has it, else None.

        z: (b, m, d). null: z of the unconditional branch. draws: random keys of the m tokens. guidance: scale (b,).
        options: traced.
        """
        ...


@dataclasses.dataclass(frozen=True)
class VectorHead(Checked):
    """What heads of vectors of real numbers have in common."""

    dim: Size = 16
    """size k of a code"""
    knows_probability = False  # no field

    @property
    def code(self) -> CodeSpec:
        return CodeSpec("float32", (self.dim,))

    def entrance(self, key: Array, width: int) -> Linear:
        return Linear(self.dim, width, key, std=None, axes=(None, "embed"))
