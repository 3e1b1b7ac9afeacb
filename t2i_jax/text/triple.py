"""Two CLIPs and T5 as one text encoder: that of Stable Diffusion 3 (Esser et al. 2024, section 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from t2i_jax.networks.clip import TextTower
from t2i_jax.text.clip import ClipText
from t2i_jax.text.cut import LimitedEncoder
from t2i_jax.text.t5 import T5, T5Encoder

END = 1
"""T5's end-of-text id."""


@dataclasses.dataclass(frozen=True)
class Triple(LimitedEncoder):
    """Captions as a pooled vector, then the concatenated CLIP vectors of each token, then those of T5."""

    first: ClipText
    second: ClipText
    t5: T5

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (n, s) of all three, concatenated, and a mask bool (n, s).

        The mask is all True, as all three attend to padding too, but all False for an empty caption. Errors: those of
        the three.
        """
        parts = [text(captions) for text in self.parts]
        ids = np.concatenate([part[0] for part in parts], 1)
        empty = ~parts[2][1].any(1)
        ids[empty, self.first.length + self.second.length] = END  # T5's encoding of an empty text
        return ids, np.broadcast_to(~empty[:, None], ids.shape).copy()

    @property
    def room(self) -> int:
        return self.t5.room

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """T5's ids of each caption, without special ones and without a limit: those that `room` counts."""
        return self.t5.tokens(captions)

    def cut(self, captions: Sequence[str]) -> list[int]:
        """Number of tokens of each caption that none of the three reads."""
        return [min(counts) for counts in zip(*(text.cut(captions) for text in self.parts), strict=True)]

    def full(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return ids[:, -1] != ids[:, -2]  # padding is not masked

    @property
    def parts(self) -> tuple[ClipText, ClipText, T5]:
        return self.first, self.second, self.t5

    @property
    def feature_shape(self) -> tuple[int, int]:
        return self.length, self.t5.feature_shape[1]

    @property
    def length(self) -> int:
        """Vectors per caption, including the pooled one."""
        return 1 + self.first.length + self.t5.length

    def load(self) -> TripleEncoders:
        """All three with their weights, on the host. Errors: those of the three."""
        return TripleEncoders(self.first.load(), self.second.load(), self.t5.load())

    def features(self, model: TripleEncoders, ids: Array, mask: Array) -> Array:
        """(b, s) ids -> (b, 1 + t + u, k) fp32, zero-padded to the width of T5.

        The embeddings of both CLIPs, concatenated; their second-to-last states, concatenated likewise (t of them); T5's
        features (u).
        """
        n, m = self.first.length, self.second.length
        a, b, c = ids[:, :n], ids[:, n : n + m], ids[:, n + m :]
        wide = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, self.feature_shape[1] - x.shape[-1])))
        whole = jnp.concatenate([model.first.embed(a), model.second.embed(b)], -1)[:, None]
        tokens = jnp.concatenate([model.first.before(a), model.second.before(b)], -1)
        last = model.t5(c, jnp.ones(c.shape, bool)).astype(jnp.float32)
        return jnp.concatenate([wide(whole), wide(tokens), last], 1)


class TripleEncoders(nnx.Module):
    """The parameters of a `Triple`."""

    def __init__(self, first: TextTower, second: TextTower, t5: T5Encoder):
        self.first, self.second, self.t5 = first, second, t5
