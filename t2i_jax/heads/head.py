"""What a head offers: from what a network says of a token, z, to a distribution of its code, p(x | z)."""

from __future__ import annotations

from typing import Any, Protocol

from flax import nnx
from jax import Array

from t2i_jax.core.specs import CodeSpec
from t2i_jax.heads.draws import PositionKeys
from t2i_jax.sampling.options import ARSampler


class TokenHead(Protocol):
    """A frozen config. Every head works with every order; one that goes by confidence needs probabilities."""

    @property
    def code(self) -> CodeSpec:
        """Of a token."""
        ...

    @property
    def knows_probability(self) -> bool:
        """Whether `loss` is -log p(x | z) in nats of a discrete code, and `sample` gives its log-probability."""
        ...

    def init(self, key: Array, width: int) -> nnx.Module:
        """The parameters that read z of this width."""
        ...

    def entrance(self, key: Array, width: int) -> nnx.Module:
        """A module from codes (..., *code.shape) to the network's input (..., width)."""
        ...

    def loss(self, module: Any, z: Array, x: Array, key: Array, train: bool = True) -> Array:
        """What each token costs, fp32 (b, t), of codes x (b, t, *code.shape); train is static."""
        ...

    def sample(
        self, module: Any, z: Array, null: Array | None, draws: PositionKeys, guidance: Array, options: ARSampler
    ) -> tuple[Array, Array | None]:
        """Codes (b, m, *code.shape), and a score (b, m): log p(x | z) where the head knows it, else None.

        z: (b, m, d). null: that of the unconditional branch. draws: a row for each of the m tokens. guidance: scale
        (b,). options: traced.
        """
        ...
