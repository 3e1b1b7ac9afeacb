"""Two CLIPs as one text encoder: that of a prior and that of a decoder, in Stable unCLIP."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from t2i_jax.text.clip import CLIP, ClipCaption, ClipText, TextTower
from t2i_jax.text.cut import LimitedEncoder


@dataclasses.dataclass(frozen=True)
class ClipPair(LimitedEncoder):
    """Captions as the vectors of `prior`, then those of `decoder`, padded with zeros to the wider of both."""

    prior: ClipCaption
    decoder: ClipText

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (n, s) of both, concatenated, and the mask of the prior's. Errors: those of both."""
        (ids, mask), (others, _) = (text(captions) for text in (self.prior, self.decoder))
        return np.concatenate([ids, others], 1), mask

    @property
    def room(self) -> int:
        return self.prior.room

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """Ids of the prior, without special ones and without a limit."""
        return self.prior.tokens(captions)

    def cut(self, captions: Sequence[str]) -> list[int]:
        """Number of tokens of each caption that neither reads."""
        return [min(counts) for counts in zip(self.prior.cut(captions), self.decoder.cut(captions), strict=True)]

    @property
    def feature_shape(self) -> tuple[int, int]:
        shapes = self.prior.feature_shape, self.decoder.feature_shape
        return sum(length for length, _ in shapes), max(dim for _, dim in shapes)

    def load(self) -> ClipPairEncoders:
        """Both with their weights, on the host. Errors: those of both."""
        return ClipPairEncoders(self.prior.load(), self.decoder.load())

    def features(self, model: ClipPairEncoders, ids: Array, mask: Array) -> Array:
        """(b, s) ids -> (b, t + u, k) fp32: t vectors of the prior, u of the decoder."""
        n, dim = mask.shape[1], self.feature_shape[1]
        first = self.prior.features(model.prior, ids[:, :n], mask)
        second = self.decoder.features(model.decoder, ids[:, n:], mask)
        wide = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, dim - x.shape[-1])))
        return jnp.concatenate([wide(first), wide(second)], 1)


class ClipPairEncoders(nnx.Module):
    """The parameters of a `ClipPair`."""

    def __init__(self, prior: CLIP | TextTower, decoder: TextTower):
        self.prior, self.decoder = prior, decoder
