"""Captions and images as their nearest neighbours in a database of CLIP embeddings, for models that retrieve.

RDM reads the neighbours of a training image, and in sampling the embedding of the caption and its neighbours (Blattmann
et al. 2022, arXiv:2204.11824); KNN-Diffusion reads both embedding and neighbours of the image (Sheynin et al. 2022).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Float, typed
from t2i_jax.core.conditions import TextSpec, Tokenizer
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import DATABASE, Checked, Count, Size
from t2i_jax.networks.clip import CLIPNetwork
from t2i_jax.nn.layers import unit
from t2i_jax.nn.search import EmbeddingTable, search
from t2i_jax.text.clip import ClipEmbedding
from t2i_jax.text.cut import LimitedEncoder
from t2i_jax.text.index import read_index


@typed
def retrieved(
    database: EmbeddingTable,
    queries: Float[Array, "b k"],
    count: int,
    *,
    first: bool = True,
    normalise: bool = False,
    skipped: int = 0,
) -> Float[Array, "b s k"]:
    """Embeddings (b, k) and their `count` nearest ones of a database: fp32 (b, 1 + count, k), as they are stored.

    first: the query comes first, else it is left out. normalise: to length 1. skipped: nearest ones that are left out.
    """
    rows = search(database, queries, skipped + count).vectors[:, skipped:]
    rows = jnp.concatenate([queries[:, None], rows], 1) if first else rows
    return (unit(rows) if normalise else rows).astype(jnp.float32)


class Retriever(nnx.Module):
    """The towers of a CLIP, and a database of its embeddings."""

    def __init__(self, clip: CLIPNetwork, database: EmbeddingTable):
        self.clip, self.database = clip, database


@dataclasses.dataclass(frozen=True)
class Neighbours(Checked, LimitedEncoder):
    """Embeddings of a database nearest to that of a caption or of an image.

    In sampling they follow the embedding of the caption where `query` is set. In training they are those of the image,
    nearest first, as many features as in sampling; with `own` the first is the embedding of the image.
    """

    clip: ClipEmbedding
    """encoder of captions and images"""
    database: Annotated[str, DATABASE]
    """embeddings of images by that encoder: an index that `t2i data neighbours` made, or arrays that `read_index`
    takes; in sampling it may be another one than in training"""
    neighbours: Size = 3
    """neighbours of a caption"""
    query: bool = True
    """the embedding of the caption comes first"""
    own: bool = False
    """in training the embedding of the image comes first, where `query` is set; else there is one neighbour more"""
    skipped: Count = 0
    """nearest neighbours of an image that are left out in training: 1 where the training images are in the database"""
    normalise: bool = False
    """scale all vectors to length 1; the search does in any case"""

    @property
    def spec(self) -> TextSpec:
        return dataclasses.replace(self.clip.spec, retrieves=True)

    @property
    def room(self) -> int:
        return self.clip.room

    @property
    def feature_shape(self) -> tuple[int, int]:
        return self.query + self.neighbours, self.clip.feature_shape[1]

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (n, s) and the mask bool (n, 1) of non-empty captions."""
        return self.clip(captions)

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        return self.clip.tokens(captions)

    def full(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return self.clip.full(ids, mask)

    def load(self) -> Retriever:
        """The encoder and the database, on the host. Errors: those of the encoder and of `read_index`, and
        `ConfigError` for embeddings of another size or by another encoder, or fewer than are read."""
        index, (count, width) = read_index(self.database), self.feature_shape
        clip = self.clip.load()
        index.check(self.database, width, count + self.skipped, clip)
        return Retriever(clip, EmbeddingTable(jnp.asarray(index.rows)))

    def features(self, model: Retriever, ids: Array, mask: Array) -> Array:
        """Of each caption: (b, s) ids -> (b, query + neighbours, k) fp32."""
        return self._of(model, self.clip.embed_captions(model.clip, ids), self.query)

    def image_features(self, model: Retriever, images: Array) -> Array:
        """Of each image: (b, i, j, c) in [-1, 1] -> (b, query + neighbours, k) fp32."""
        own = self.clip.embed_images(model.clip, images)
        return self._of(model, own, self.query and self.own, self.skipped)

    def _of(self, model: Retriever, own: Array, first: bool, skipped: int = 0) -> Array:
        count = self.feature_shape[0] - first
        return retrieved(model.database, own, count, first=first, normalise=self.normalise, skipped=skipped)


def with_database(text: Tokenizer | None, database: str) -> Neighbours:
    """The text of a model with another database. Errors: `ConfigError` for a model that reads none."""
    if not isinstance(text, Neighbours):
        kind = "no text" if text is None else f"a {type(text).__name__}"
        raise ConfigError(f"database: this model reads no neighbours, its text is {kind}")
    return dataclasses.replace(text, database=database)


def of_any_database(text: Tokenizer | None) -> Tokenizer | None:
    """The text without the name of its database, which no program depends on: those of two databases are equal."""
    return dataclasses.replace(text, database="") if isinstance(text, Neighbours) else text
