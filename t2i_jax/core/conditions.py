"""Interfaces of tokenizers, text encoders and conditions: what a model is conditioned on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from t2i_jax.core.specs import BatchSpec

M = TypeVar("M", bound=nnx.Module)

Batch = Mapping[str, Array]
"""Arrays by name, each with the batch dimension first."""


# -- text


class Tokenizer(Protocol):
    """Captions to token ids, on the host."""

    @property
    def spec(self) -> TextSpec: ...

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """n captions -> ids int32 (n, s) and a mask bool (n, s)."""
        ...


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """Capabilities of a tokenizer besides token ids; known without loading its files.

    Fields of a tokenizer that name files are marked in their types (`core.fields.File`).
    """

    features: bool = False
    """`TextEncoder`: computes features of ids, so models do not embed the ids"""
    image_features: bool = False
    """`ImageTextEncoder`: images have features in the same space, which replace those of captions in training"""
    image_embedding: bool = False
    """`ImageTextEncoder`: in training, the embedding of an image is `image_features` of the batch, besides the features
    of its caption"""
    retrieves: bool = False
    """`text.retrieval.Neighbours`: reads a database of embeddings, in whose place there may be another"""
    neighbours: bool = False
    """`NeighbourRetriever`: also gives images with captions that are near to a caption"""
    limited: bool = False
    """`text.cut.Limited`: counts the tokens of a caption that are cut off"""


class TextEncoder(Tokenizer, Protocol[M]):
    """A frozen text encoder with parameters M."""

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Number of vectors per caption, and their size."""
        ...

    def load(self) -> M:
        """The parameters, on the host. Errors: FileNotFoundError; ValueError for files of another kind."""
        ...

    def features(self, model: M, ids: Array, mask: Array) -> Array:
        """Token ids and mask (b, s) -> features (b, s', k)."""
        ...


class ImageTextEncoder(TextEncoder[M], Protocol):
    """A frozen encoder of captions and images into a shared space."""

    def image_features(self, model: M, images: Array) -> Array:
        """Images float (b, i, j, 3) in [-1, 1] -> features (b, s', k) that replace those of captions, or an embedding
        (b, k) besides them."""
        ...


class NumberedRecords(Protocol):
    """Records by their numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Mapping[str, object]: ...


class NeighbourRetriever(TextEncoder[M], Protocol):
    """A frozen text encoder with a database of images and their captions."""

    def neighbours_of(self, model: M, features: Array, mask: Array, record: Array | None = None) -> dict[str, Array]:
        """The neighbours of captions, by features (b, s', k) and mask of each: `neighbour_image` float (b, n, i, j, 3)
        in [-1, 1], `neighbour_features` and `neighbour_text_mask` of their captions, and `neighbour_mask` bool (b, n).

        record: numbers (b,) of the records that the captions are of, which are no neighbours of themselves; -1: of
        none.
        """
        ...

    def check_records(self, model: M, records: NumberedRecords) -> None:
        """Errors: `ConfigError` where the numbers of these training records do not name the same ones in the
        database."""
        ...


# -- conditions


@dataclasses.dataclass(frozen=True)
class ConditionSpec:
    """Properties of a condition besides its tokens."""

    has_null: bool = True
    """the unconditional tokens do not depend on the batch; else the batch has `null_features`"""
    has_padding: bool = False
    """some tokens may be padding, which is masked"""
    gives_ids: bool = False
    """tokens are ids (b, s) of the image's own vocabulary, which the network embeds itself"""
    gives_summary: bool = False
    """`SummarizedTokens`: has a vector that summarises all tokens"""
    summary_width: int = 0
    """size of that vector, if it is not that of a token"""
    classes: int | None = None
    """number of classes that `label` indexes; 0: unconditional; None: a condition other than a class"""


class ConditionTokens(Protocol):
    """The module of a condition."""

    def __call__(self, batch: Batch, drop: Array, dtype: DTypeLike) -> tuple[Array, Array]:
        """Tokens (b, s, d) of the dtype, and a mask (b, s) of those that a network may read.

        drop: bool (b,) marks rows that get the unconditional tokens instead of their own.
        """
        ...


class SummarizedTokens(ConditionTokens, Protocol):
    """The module of a condition with a summary vector."""

    def whole(self, batch: Batch, drop: Array) -> Array:
        """The summary vector (b, d)."""
        ...


class Condition(Protocol):
    """The config of a condition, as tokens of a network."""

    @property
    def spec(self) -> ConditionSpec: ...

    @property
    def length(self) -> int:
        """Number of tokens."""
        ...

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch."""
        ...

    def token_width(self, width: int) -> int:
        """Width of a token, for a network of this width."""
        ...

    def init(self, key: Array, width: int) -> ConditionTokens: ...
