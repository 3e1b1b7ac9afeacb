"""Captions and images as their nearest neighbours in a database of CLIP embeddings, for models that retrieve.

RDM reads the neighbours of a training image, and in sampling the embedding of the caption and its neighbours (Blattmann
et al. 2022, arXiv:2204.11824); KNN-Diffusion reads both embedding and neighbours of the image (Sheynin et al. 2022).
"""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Float, Int, typed
from t2i_jax.core.conditions import TextSpec
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import DATABASE, Checked, Count, Size
from t2i_jax.networks.clip import CLIPNetwork
from t2i_jax.nn.layers import ModelState, unit
from t2i_jax.text.clip import ClipEmbedding
from t2i_jax.text.cut import LimitedEncoder


class Database(nnx.Module):
    """Embeddings fp32 (n, k), and one over the length of each (n,), which a search needs and no call computes again."""

    def __init__(self, rows: Array):
        self.rows = ModelState(rows, axes=(None, None))
        lengths = jnp.linalg.norm(rows, axis=-1)
        self.scale = ModelState(1 / jnp.maximum(lengths, 1e-12), axes=(None,))


@typed
def nearest(database: Database, queries: Float[Array, "b k"], count: int) -> Int[Array, "b {count}"]:
    """The rows of a database whose cosines with each query are largest, by falling cosine: int32 (b, count)."""
    products = jnp.matmul(unit(queries), database.rows[...].T, precision="highest")
    return jax.lax.top_k(products * database.scale[...], count)[1]


@typed
def retrieved(
    database: Database,
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
    rows = database.rows[...][nearest(database, queries, skipped + count)[:, skipped:]]
    rows = jnp.concatenate([queries[:, None], rows], 1) if first else rows
    return (unit(rows) if normalise else rows).astype(jnp.float32)


def read_database(path: str | Path) -> np.ndarray:
    """Embeddings fp32 (n, k): a `.npy` file, the array `embedding` of a `.npz` file, or those of all in a folder.

    Published databases of RDM are such `.npz` files. Errors: FileNotFoundError; `ConfigError` for other content.
    """
    path = Path(path)
    files = sorted(path.glob("*.npz")) or sorted(path.glob("*.npy")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path}: no .npz or .npy file of embeddings in it")
    parts = []
    for file in files:
        try:
            content = np.load(file, allow_pickle=False)
            parts.append(content if isinstance(content, np.ndarray) else content["embedding"])
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ConfigError(f"{file}: no array of embeddings, or `embedding` of a .npz file ({error})") from error
    if any(part.ndim != 2 or part.shape[1] != parts[0].shape[1] or part.dtype.kind != "f" for part in parts):
        shapes = ", ".join(f"{part.dtype} {part.shape}" for part in parts[:4])
        raise ConfigError(f"{path}: {shapes}; embeddings are floats (n, k)")
    return np.concatenate(parts).astype(np.float32)


class Retriever(nnx.Module):
    """The towers of a CLIP, and a database of its embeddings."""

    def __init__(self, clip: CLIPNetwork, database: Database):
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
    """embeddings of images by that encoder: a file or a folder that `read_database` takes"""
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
        return self.clip.spec

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
        """The encoder and the database, on the host. Errors: those of the encoder and of `read_database`, and
        `ConfigError` for embeddings of another size, or fewer than are read."""
        rows, (count, width) = read_database(self.database), self.feature_shape
        most = count + self.skipped
        if rows.shape[1] != width or len(rows) < most:
            raise ConfigError(
                f"{self.database}: embeddings {rows.shape}; the encoder has {width} numbers, and {most} rows are read"
            )
        return Retriever(self.clip.load(), Database(jnp.asarray(rows)))

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
