"""Captions and images as their nearest neighbours in a database, for models that retrieve.

RDM reads the neighbours of a training image, and in sampling the embedding of the caption and its neighbours (Blattmann
et al. 2022, arXiv:2204.11824); KNN-Diffusion reads both embedding and neighbours of the image (Sheynin et al. 2022).
Re-Imagen reads the images and captions of the neighbours of a caption (Chen et al. 2022).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, cast

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Bool, Float, typed
from t2i_jax.core.conditions import NumberedRecords, TextSpec, Tokenizer
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import DATABASE, Checked, Count, Size
from t2i_jax.core.narrow import text_encoder
from t2i_jax.networks.clip import CLIPNetwork
from t2i_jax.nn.layers import ModelState, unit
from t2i_jax.nn.search import SPLIT, EmbeddingTable, search
from t2i_jax.text.clip import ClipEmbedding
from t2i_jax.text.cut import LimitedEncoder
from t2i_jax.text.index import Index, read_facts, read_index, read_pairs


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


class PairTable(nnx.Module):
    """An encoder of captions, and a database: embeddings, and the images and captions of their records.

    Rows that fill the tables up are never found.
    """

    def __init__(self, text: nnx.Module, index: Index, images: np.ndarray, ids: np.ndarray, mask: np.ndarray):
        self.text, self.table = text, EmbeddingTable(jnp.asarray(index.rows))
        more = -len(index.rows) % SPLIT
        rows = lambda x: jnp.asarray(np.pad(x, ((0, more), *((0, 0),) * (x.ndim - 1))))
        kept = lambda x: ModelState(rows(x), axes=("rows", *(None,) * (x.ndim - 1)))
        self.images, self.ids, self.mask = kept(images), kept(ids), kept(mask)
        self.records = kept(index.records.astype(np.int32))


@dataclasses.dataclass(frozen=True)
class NeighbourPairs(Checked, LimitedEncoder):
    """Captions as features of a frozen encoder, with the images and captions of a database that are nearest to them
    (Chen et al. 2022, Re-Imagen).

    The vector that is searched for is the mean of a caption's features, by the same encoder as those of the database,
    which are of captions, or of images where the encoder has one space of both. An empty caption has no neighbours.
    """

    text: LimitedEncoder
    """encoder of captions, and of those of neighbours"""
    database: Annotated[str, DATABASE]
    """an index by that encoder with images and captions, as `t2i data neighbours --pairs` makes it; in sampling it may
    be another one than in training"""
    neighbours: Size = 2
    """neighbours of a caption"""
    image_size: Size = 64
    """side of the images of the database, in pixels"""
    own: bool = True
    """the database is of the training records: in training none is a neighbour of itself"""

    @property
    def spec(self) -> TextSpec:
        has = self.text.spec
        return TextSpec(features=has.features, limited=has.limited, retrieves=True, neighbours=True)

    @property
    def room(self) -> int:
        return self.text.room

    @property
    def feature_shape(self) -> tuple[int, int]:
        return text_encoder(self.text).feature_shape

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask, those of the encoder."""
        return self.text(captions)

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        return self.text.tokens(captions)

    def full(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return self.text.full(ids, mask)

    def load(self) -> PairTable:
        """The encoder and the database, on the host. Errors: those of the encoder, of `read_index` and of `read_pairs`,
        and `ConfigError` for a database that is by another encoder, too small, or has images of another size."""
        index, encoder = read_index(self.database), text_encoder(self.text)
        if self.feature_shape[0] not in (1, encoder([""])[1].shape[1]):
            kind = type(self.text).__name__
            raise ConfigError(f"text {kind}: neighbours are found by a vector for each token, or by one for a caption")
        pairs, model = read_pairs(self.database, index), encoder.load()
        index.check(self.database, self.feature_shape[1], self.neighbours + self.own, model)
        if index.facts.get("of") == "images" and not isinstance(self.text, ClipEmbedding):
            kind = type(self.text).__name__
            raise ConfigError(f"{self.database}: is of images, to which a {kind} compares no captions; --of captions")
        if pairs.images.shape[1:3] != (self.image_size, self.image_size):
            rows, columns = pairs.images.shape[1:3]
            wanted = f"the model reads {self.image_size}: make it with --data.image_size={self.image_size}"
            raise ConfigError(f"{self.database}: its images have {rows}x{columns} pixels, {wanted}")
        return PairTable(model, index, pairs.images, *encoder(pairs.captions))

    def check_records(self, model: PairTable, records: NumberedRecords) -> None:
        """Errors: `ConfigError` where `own` is set and the database is not of these training records: it is of as many,
        and sixteen of them have the captions that it has."""
        if not self.own:
            return
        facts = read_facts(self.database)
        work, data = facts.get("work"), {"split": "train", "records": len(records)}
        there = {k: work.get(k) for k in data} if isinstance(work, dict) else {}
        wrong = "" if there == data else f"it is of {there}, the data are {data}"
        if not wrong:
            rows = np.linspace(0, cast(int, facts["count"]) - 1, 16).round().astype(int)
            numbers = np.asarray(model.records[...])[rows]
            captions = [first_caption(records[int(n)]) for n in numbers]
            same = (self.text(captions)[0] == np.asarray(model.ids[...])[rows]).all(1)
            if not same.all():
                first = int(np.argmin(same))
                wrong = f"record {numbers[first]} has the caption {captions[first]!r} in the data, and another there"
        if wrong:
            raise ConfigError(
                f"{self.database}: is not of the training records, which are left out of it by their number: {wrong}; "
                "make it anew of these, or set own=False for other records"
            )

    def features(self, model: PairTable, ids: Array, mask: Array) -> Array:
        """Features of each caption: (b, s) ids and mask -> (b, s', k)."""
        return text_encoder(self.text).features(model.text, ids, mask)

    def neighbours_of(
        self, model: PairTable, features: Array, mask: Array, record: Array | None = None
    ) -> dict[str, Array]:
        """The neighbours of captions, nearest first; see `core.conditions.NeighbourRetriever`."""
        among, count = self.own and record is not None, self.neighbours
        found = search(model.table, mean_vector(features, mask), count + among).rows
        if among and record is not None:
            itself = model.records[found] == record[:, None]
            found = jnp.take_along_axis(found, jnp.argsort(itself, 1, stable=True), 1)[:, :count]
        each = lambda x: rearrange(x, "b n ... -> (b n) ...")
        back = lambda x: rearrange(x, "(b n) ... -> b n ...", n=count)
        captions, captions_mask = each(model.ids[found]), each(model.mask[found])
        return {
            "neighbour_image": model.images[found].astype(jnp.float32) / 127.5 - 1,
            "neighbour_features": back(self.features(model, captions, captions_mask)),
            "neighbour_text_mask": back(captions_mask),
            "neighbour_mask": jnp.repeat(mask.any(1, keepdims=True), count, 1),
        }


def first_caption(record: Mapping[str, object]) -> str:
    """The caption of a record that a database has: its first, or none."""
    return str(next(iter(cast(Sequence[str], record.get("captions") or ())), ""))


@typed
def mean_vector(features: Float[Array, "b s k"], mask: Bool[Array, "b t"]) -> Float[Array, "b k"]:
    """The mean of the features of each caption: of those that a mask of as many marks, else of all."""
    counts = (mask if mask.shape[1] == features.shape[1] else jnp.ones(features.shape[:2]))[..., None]
    return (features * counts).sum(1) / jnp.maximum(counts.sum(1), 1)


def with_database(text: Tokenizer | None, database: str) -> Neighbours | NeighbourPairs:
    """The text of a model with another database. Errors: `ConfigError` for a model that reads none."""
    if not isinstance(text, Neighbours | NeighbourPairs):
        kind = "no text" if text is None else f"a {type(text).__name__}"
        raise ConfigError(f"database: this model reads no neighbours, its text is {kind}")
    return dataclasses.replace(text, database=database)


def of_any_database(text: Tokenizer | None) -> Tokenizer | None:
    """The text without the name of its database, which no program depends on: those of two databases are equal."""
    return dataclasses.replace(text, database="") if isinstance(text, Neighbours | NeighbourPairs) else text
