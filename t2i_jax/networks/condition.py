"""Conditions as prefix tokens of a network: a class, a caption read by a trained encoder, or frozen features.

A `Conditioning` says which one a network reads, and how. Each config (`ClassEmbedder`, `CaptionEncoder`,
`TextFeatures`, `PooledFeatures`, ...) is a `core.conditions.Condition`; its module maps (batch, drop, dtype) to tokens
and a mask. `PrefixTokens` are ids of the image's own vocabulary, which the network embeds itself.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.core import Tracer
from jax.typing import DTypeLike

from t2i_jax.core.arrays import Bool, Float, Int, typed
from t2i_jax.core.conditions import Batch, Condition, ConditionSpec, ConditionTokens, SummarizedTokens
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import Checked, Count, Grid, Layers, Share, Size
from t2i_jax.core.specs import BatchSpec, FieldSpec, missing
from t2i_jax.nn.layers import Embedding, Linear, ModelState, RMSNorm, normal, param, position_table
from t2i_jax.nn.transformer import Transformer, scan_stack, stack


def text_spec(vocabulary: int, length: int, mask: bool = True) -> BatchSpec:
    """Spec of token ids and their mask; `mask` False: a batch may omit the mask."""
    return {
        "text": FieldSpec((length,), "int32", 0, vocabulary - 1),
        "text_mask": FieldSpec((length,), "bool", optional=not mask),
    }


def features_spec(length: int, dim: int) -> BatchSpec:
    """Spec of features of a frozen text encoder; with one vector per caption the mask may be that of the caption's
    tokens."""
    mask = FieldSpec((None if length == 1 else length,), "bool", optional=True)
    return {"features": FieldSpec((length, dim), "float32"), "text_mask": mask}


class BaseCondition(Checked):
    """The members of conditions whose tokens have the width of the network and are all real."""

    @property
    def spec(self) -> ConditionSpec:
        return ConditionSpec()

    def token_width(self, width: int) -> int:
        return width


@dataclasses.dataclass(frozen=True)
class ClassEmbedder(BaseCondition):
    """One token, a row of a class table; the last row is the unconditional class."""

    count: Count = 1000
    """number of classes; 0: an unconditional model"""
    null: bool = True
    """whether there is a row for the unconditional class; without it `drop` has no effect"""

    length = 1

    @property
    def spec(self) -> ConditionSpec:
        return ConditionSpec(classes=self.count)

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch."""
        return {"label": FieldSpec((), "int32", 0, self.count - 1)} if self.count else {}

    def init(self, key: Array, width: int) -> ClassTokens:
        return ClassTokens(self, key, width)


class ClassTokens(nnx.Module):
    """`label` int (b,) -> one token (b, 1, d), always visible."""

    def __init__(self, config: ClassEmbedder, key: Array, width: int):
        self.config, self.table = config, Embedding(config.count + config.null, width, key, special=int(config.null))

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        count = self.config.count
        label = ids(batch, "label", count) if count else jnp.zeros(drop.shape, jnp.int32)
        tokens = self.table(jnp.where(drop, count, label) if self.config.null else label)[:, None]
        return tokens.astype(dtype), jnp.ones(tokens.shape[:2], bool)


@dataclasses.dataclass(frozen=True)
class Conditioning(Checked):
    """What an image depends on, how a network reads it, and how often training drops it."""

    what: Condition = ClassEmbedder()
    """the class, caption or features"""
    via: Literal["default", "prefix", "cross_attention", "modulation", "context", "joint"] = "default"
    """how the network reads the condition; what a network has, and its default, is documented there"""
    dropout: Share = 0.1
    """share of training examples whose condition is replaced by the unconditional one, for guidance; 0: none, and
    there is no unconditional branch"""

    def route(self, who: str, *routes: str) -> str:
        """`via`, or the first of `routes` as the default. Errors: `ConfigError` for one that `who` does not have."""
        if self.via == "default":
            return routes[0]
        if self.via not in routes:
            raise ConfigError(f"conditioning.via {self.via!r}: {who} has {', '.join(routes)}")
        return self.via


@dataclasses.dataclass(frozen=True)
class CaptionEncoder(BaseCondition):
    """Token ids read by a bidirectional Transformer that is trained with the model."""

    vocabulary: Size = 2000
    length: Size = 32
    """tokens per caption, padding included"""
    width: Size = 256
    depth: Layers = 4
    heads: Size = 4

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch."""
        return text_spec(self.vocabulary, self.length)

    def init(self, key: Array, width: int) -> CaptionTokens:
        return CaptionTokens(self, key, width)


class EncodedIds(nnx.Module):
    """A bidirectional Transformer over embedded ids, projected to the width of the network."""

    def __init__(self, config: CaptionEncoder | LowCodes, keys: Array, width: int, *maps: tuple[int, int]):
        self.table = Embedding(config.vocabulary, config.width, keys[0])
        self.position = position_table(normal(keys[1], (config.length, config.width)), *maps)
        self.blocks = stack(Transformer(config.width, config.depth, config.heads), keys[2])
        self.norm = RMSNorm(config.width)
        self.out = Linear(config.width, width, keys[3], bias=False, axes=("embed", None))

    @typed
    def encoded(
        self, ids: Int[Array, "b s"], dtype: DTypeLike, mask: Bool[Array, "b s"] | None = None
    ) -> Float[Array, "b s d"]:
        """A vector for each id; mask: those that are read."""
        x = (self.table(ids) + self.position[...]).astype(dtype)
        return self.out(self.norm(scan_stack(self.blocks, x, mask=None if mask is None else mask[:, None, None])))


class CaptionTokens(EncodedIds):
    """`text` int (b, s) and `text_mask` bool (b, s) -> tokens (b, s, d), all visible.

    Padding positions get learned vectors (Nichol et al. 2022, GLIDE). A dropped or empty caption is all padding.
    """

    def __init__(self, config: CaptionEncoder, key: Array, width: int):
        keys = jax.random.split(key, 5)
        super().__init__(config, keys, width)
        self.config = config
        self.padding = position_table(normal(keys[4], (config.length, width)))

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        text, mask = caption(batch, drop, self.config.vocabulary, self.config.length)
        tokens = self.encoded(text, dtype, mask)
        tokens = jnp.where(mask[..., None], tokens, self.padding[...].astype(dtype))
        return tokens, jnp.ones_like(mask)


@dataclasses.dataclass(frozen=True)
class TextFeatures(BaseCondition):
    """Features of a frozen text encoder, projected by a small MLP (Sun et al. 2024, LlamaGen)."""

    dim: Size = 384
    """size k of a feature vector"""
    length: Size = 64
    """vectors per caption"""
    trained_null: bool = True
    """learn the unconditional features; False keeps their random initial values, or those of a loaded checkpoint"""
    left: bool = False
    """right-align the text and zero the remaining positions, as LlamaGen does"""
    null_keeps_mask: bool = False
    """dropped rows keep the mask of their caption, as in LlamaGen; else all their positions are visible"""
    bias: bool = False
    """whether the projection has biases"""

    @property
    def spec(self) -> ConditionSpec:
        return ConditionSpec(has_padding=True)

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch."""
        return features_spec(self.length, self.dim)

    def init(self, key: Array, width: int) -> FeatureTokens:
        return FeatureTokens(self, key, width)


class FeatureTokens(nnx.Module):
    """`features` float (b, s, k), `text_mask` bool (b, s) if there is padding -> tokens (b, s, d), text visible.

    With one vector per caption (s = 1) the mask may be that of the caption's tokens. The unconditional features (s, k)
    replace those of dropped rows and of rows without text, before the projection.
    """

    def __init__(self, config: TextFeatures, key: Array, width: int):
        keys = jax.random.split(key, 3)
        self.config = config
        null = normal(keys[0], (config.length, config.dim), config.dim**-0.5)
        self.null = param(null, None, None) if config.trained_null else ModelState(null, axes=(None, None))
        self.into = Linear(config.dim, width, keys[1], bias=config.bias, axes=(None, "mlp"))
        self.out = Linear(width, width, keys[2], bias=config.bias, axes=("mlp", "embed"))

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        x = value(batch, "features")
        same_length("features", x.shape[1], self.config.length)
        mask = jnp.asarray(batch.get("text_mask", jnp.ones(x.shape[:2], bool)))
        mask = mask.any(1, keepdims=True) if x.shape[1] == 1 else mask
        if self.config.left:
            order = jnp.argsort(mask, 1, stable=True)  # padding first, then text in its original order
            x, mask = jnp.take_along_axis(x, order[..., None], 1), jnp.take_along_axis(mask, order, 1)
        x = jnp.where(mask[..., None], x, 0)
        empty = ~mask.any(1)
        null = drop | empty
        mask = mask | (empty if self.config.null_keeps_mask else null)[:, None]
        x = jnp.where(null[:, None, None], self.null[...], x).astype(dtype)
        return self.out(jax.nn.gelu(self.into(x))), mask


@dataclasses.dataclass(frozen=True)
class PooledFeatures(BaseCondition):
    """One pooled vector of an image or a caption, such as CLIP's, normalised to length 1 and projected to one token.

    A model trains on embeddings of images and samples from embeddings of captions (Wang et al. 2022, CLIP-GEN).
    """

    dim: Size = 512

    length = 1

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch."""
        return features_spec(1, self.dim)

    def init(self, key: Array, width: int) -> PooledFeatureToken:
        return PooledFeatureToken(self, key, width)


class PooledFeatureToken(nnx.Module):
    """`features` float (b, k) or (b, 1, k) -> one token (b, 1, d), always visible; zeros are the unconditional
    features."""

    def __init__(self, config: PooledFeatures, key: Array, width: int):
        self.config = config
        self.out = Linear(config.dim, width, key, axes=(None, "embed"))

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        x = value(batch, "features").astype(jnp.float32)
        x = x if x.ndim == 3 else x[:, None]
        same_length("features", x.shape[1], 1)
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        tokens = self.out(jnp.where(drop[:, None, None], 0, x).astype(dtype))
        return tokens, jnp.ones(tokens.shape[:2], bool)


@dataclasses.dataclass(frozen=True)
class CrossAttnFeatures(BaseCondition):
    """Unprojected features of a frozen text encoder, for cross-attention, or as vectors prepended to the tokens of an
    image, like `embeddings` of taming-transformers' GPT.

    VQ-Diffusion reads all 77 vectors of CLIP's text tower, each of length 1 (Gu et al. 2022; Tang et al. 2022).
    """

    dim: Size = 512
    """size k of a feature vector"""
    length: Size = 77
    """vectors per caption"""
    trained_null: bool = True
    """learn the unconditional features; else they are `null_features` of the batch, those of an empty caption"""
    kept_null: bool = False
    """store the features of an empty caption in the model, not trained: those of a loaded checkpoint"""
    zero_null: bool = False
    """the unconditional features are zeros, as of models of retrieved features (Blattmann et al. 2022)"""

    @property
    def spec(self) -> ConditionSpec:
        return ConditionSpec(has_null=self.trained_null or self.kept_null or self.zero_null)

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch: unconditional features only where the model has none; the mask only to know
        whether there is text."""
        features = FieldSpec((self.length, self.dim), "float32", optional=True)
        null = {} if self.spec.has_null else {"null_features": features}
        mask = FieldSpec((None,), "bool", optional=True)
        return {**features_spec(self.length, self.dim), "text_mask": mask, **null}

    def __post_init__(self):
        super().__post_init__()
        if self.trained_null + self.kept_null + self.zero_null > 1:
            raise ValueError("trained_null, kept_null, zero_null: one kind of unconditional features at most")

    def token_width(self, width: int) -> int:
        return self.dim

    def init(self, key: Array, width: int) -> CrossAttnFeatureTokens:
        return CrossAttnFeatureTokens(self, key)


class CrossAttnFeatureTokens(nnx.Module):
    """`features` float (b, s, k) -> the same, all visible, whatever the width of the network.

    The unconditional features replace those of dropped rows, and of rows whose `text_mask`, if given, marks no text.
    """

    def __init__(self, config: CrossAttnFeatures, key: Array):
        self.config = config
        values = normal(key, (config.length, config.dim), 1.0)
        kept = ModelState(values, axes=(None, None)) if config.kept_null else None
        self.null = param(values, None, None) if config.trained_null else kept

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        x = value(batch, "features")
        same_length("features", x.shape[1], self.config.length)
        empty = drop if "text_mask" not in batch else drop | ~value(batch, "text_mask").any(1)
        if self.null is not None:
            x = jnp.where(empty[:, None, None], self.null[...], x)
        elif self.config.zero_null:
            x = jnp.where(empty[:, None, None], 0, x)
        elif "null_features" in batch:
            x = jnp.where(drop[:, None, None], batch["null_features"], x)
        return x.astype(dtype), jnp.ones(x.shape[:2], bool)


@dataclasses.dataclass(frozen=True)
class PooledAndTokenFeatures(BaseCondition):
    """Projected features of a frozen text encoder; the first vector is the pooled embedding of the caption.

    Stable Diffusion 3 (Esser et al. 2024) reads the tokens of two CLIPs and of T5, and the concatenated pooled
    embeddings of both CLIPs.
    """

    encoded: CrossAttnFeatures = CrossAttnFeatures(4096, 334, trained_null=False, kept_null=True)
    """all vectors, the first included"""
    summary: Size = 2048
    """size of the pooled embedding, the leading part of the first vector"""

    @property
    def spec(self) -> ConditionSpec:
        return ConditionSpec(has_null=self.encoded.spec.has_null, gives_summary=True)

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch."""
        return self.encoded.batch_spec()

    @property
    def length(self) -> int:
        return self.encoded.length - 1

    def init(self, key: Array, width: int) -> PooledAndFeatureTokens:
        return PooledAndFeatureTokens(self, key, width)


class PooledAndFeatureTokens(nnx.Module):
    """`features` float (b, 1 + s, k) -> tokens (b, s, d), all visible; `whole` gives (b, d) from the first vector."""

    def __init__(self, config: PooledAndTokenFeatures, key: Array, width: int):
        keys = jax.random.split(key, 4)
        self.config, self.encoded = config, config.encoded.init(keys[0], width)
        self.tokens = Linear(config.encoded.dim, width, keys[1], axes=(None, "embed"))
        self.into = Linear(config.summary, width, keys[2], axes=(None, "mlp"))
        self.out = Linear(width, width, keys[3], axes=("mlp", "embed"))

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        x, mask = self.encoded(batch, drop, dtype)
        return self.tokens(x[:, 1:]), mask[:, 1:]

    @typed
    def whole(self, batch: Batch, drop: Bool[Array, " b"]) -> Float[Array, "b d"]:
        x = self.encoded(batch, drop)[0][:, 0, : self.config.summary]
        return self.out(jax.nn.silu(self.into(x)))


@dataclasses.dataclass(frozen=True)
class SentenceAndWords(BaseCondition):
    """Unprojected features of a frozen text encoder: a vector of the whole caption first, then one for each word (Xu et
    al. 2018, AttnGAN). Dropped rows and empty captions are zeros."""

    dim: Size = 256
    """size k of a feature vector"""
    words: Size = 18
    """words per caption, padding included"""

    @property
    def spec(self) -> ConditionSpec:
        return ConditionSpec(has_padding=True, gives_summary=True)

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch; the mask is that of the words."""
        features = FieldSpec((1 + self.words, self.dim), "float32")
        return {"features": features, "text_mask": FieldSpec((self.words,), "bool")}

    @property
    def length(self) -> int:
        return self.words

    def token_width(self, width: int) -> int:
        return self.dim

    def init(self, key: Array, width: int) -> SentenceAndWordTokens:
        return SentenceAndWordTokens(self)


class SentenceAndWordTokens(nnx.Module):
    """`features` float (b, 1 + s, k), `text_mask` bool (b, s) -> words (b, s, k), and `whole`, the sentence (b, k)."""

    def __init__(self, config: SentenceAndWords):
        self.config = config

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        x, mask = self._features(batch), value(batch, "text_mask") & ~drop[:, None]
        return jnp.where(mask[..., None], x[:, 1:], 0).astype(dtype), mask

    @typed
    def whole(self, batch: Batch, drop: Bool[Array, " b"]) -> Float[Array, "b d"]:
        return jnp.where(drop[:, None], 0, self._features(batch)[:, 0])

    def _features(self, batch: Batch) -> Array:
        x = value(batch, "features")
        same_length("features", x.shape[1], 1 + self.config.words)
        return x


@dataclasses.dataclass(frozen=True)
class PrefixTokens(BaseCondition):
    """Prefix tokens from the image's own vocabulary and table: a start token, a class, codes of a sketch (Esser et al.
    2021)."""

    length: Size = 1

    @property
    def spec(self) -> ConditionSpec:
        return ConditionSpec(gives_ids=True)

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch; the model that embeds these ids knows the number of ids."""
        prefix = FieldSpec((self.length,), "int32", 0, optional=self.length == 1)
        label = FieldSpec((), "int32", 0, optional=True)
        return {"prefix": prefix, "label": label} if self.length == 1 else {"prefix": prefix}

    def init(self, key: Array, width: int) -> PrefixIds:
        return PrefixIds(self)


class PrefixIds(nnx.Module):
    """`prefix` int (b, s), or `label` int (b,) where there is one token -> ids (b, s) that the network embeds itself,
    all visible.

    Dropped rows get id 0, the start token.
    """

    def __init__(self, config: PrefixTokens):
        self.config = config

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.int32
    ) -> tuple[Int[Array, "b s"], Bool[Array, "b s"]]:
        alone = self.config.length == 1 and "prefix" not in batch
        given = value(batch, "label")[:, None] if alone else value(batch, "prefix")
        same_length("prefix", given.shape[1], self.config.length)
        return jnp.where(drop[:, None], 0, given), jnp.ones(given.shape, bool)


@dataclasses.dataclass(frozen=True)
class LowCodes(BaseCondition):
    """Codes of a small image, a token each, read by a bidirectional Transformer: the condition of the second stage of
    Muse (Chang et al. 2023, 2.4).

    They are codes by the codec of the image itself. The unconditional branch has them, too.
    """

    vocabulary: Size = 8192
    """number of codes of the codec"""
    grid: Grid = (16, 16)
    """rows and columns of codes"""
    width: Size = 1024
    depth: Layers = 16
    heads: Size = 16

    @property
    def length(self) -> int:
        return math.prod(self.grid)

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch."""
        return {"low_codes": FieldSpec(self.grid, "int32", 0, self.vocabulary - 1)}

    def init(self, key: Array, width: int) -> LowCodeTokens:
        return LowCodeTokens(self, key, width)


class LowCodeTokens(EncodedIds):
    """`low_codes` int (b, h, w) -> tokens (b, h w, d), all visible; `drop` has no effect."""

    def __init__(self, config: LowCodes, key: Array, width: int):
        super().__init__(config, jax.random.split(key, 4), width, config.grid)
        self.config = config

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        codes = ids(batch, "low_codes", self.config.vocabulary).reshape(len(drop), -1)
        same_length("low_codes", codes.shape[1], self.config.length)
        return self.encoded(codes, dtype), jnp.ones(codes.shape, bool)


@dataclasses.dataclass(frozen=True)
class Joined(BaseCondition):
    """The tokens of several conditions, one after the other: a caption, and the codes of a small image."""

    parts: tuple[Condition, ...] = (TextFeatures(), LowCodes())

    def __post_init__(self):
        super().__post_init__()
        names = [name for part in self.parts for name in part.batch_spec()]
        if double := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"parts: two of them read '{double[0]}'")
        if not self.parts or any(part.spec.gives_ids for part in self.parts):
            raise ConfigError("parts: conditions that give vectors are joined, at least one")

    @property
    def spec(self) -> ConditionSpec:
        every = [part.spec for part in self.parts]
        return ConditionSpec(
            has_null=all(spec.has_null for spec in every), has_padding=any(spec.has_padding for spec in every)
        )

    @property
    def length(self) -> int:
        return sum(part.length for part in self.parts)

    def token_width(self, width: int) -> int:
        widths = [part.token_width(width) for part in self.parts]
        return next((other for other in widths if other != width), width)

    def batch_spec(self) -> BatchSpec:
        """Fields that its parts read of a batch."""
        return {name: field for part in self.parts for name, field in part.batch_spec().items()}

    def init(self, key: Array, width: int) -> JoinedTokens:
        return JoinedTokens(self, key, width)


class JoinedTokens(nnx.Module):
    """The tokens (b, s, d) of all parts, and which of them are visible."""

    def __init__(self, config: Joined, key: Array, width: int):
        keys = jax.random.split(key, len(config.parts))
        self.parts = nnx.List([part.init(key, width) for part, key in zip(config.parts, keys, strict=True)])

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        tokens, valid = zip(*(part(batch, drop, dtype) for part in self.parts), strict=True)
        return jnp.concatenate(tokens, 1), jnp.concatenate(valid, 1)


class Context(NamedTuple):
    """An encoded condition."""

    pooled: Array
    """(b, d), one vector of the whole condition"""
    tokens: Array
    """(b, s, d)"""
    mask: Array
    """(b, s): which tokens may be read"""


@typed
def read_context(
    condition: Condition, module: ConditionTokens, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike
) -> Context:
    """The condition of a batch by its module: `pooled` is its summary vector, or the mean of its tokens.

    drop: bool (b,) marks rows that get the unconditional one.
    """
    tokens, mask = module(batch, drop, dtype)
    if condition.spec.gives_summary:
        return Context(cast(SummarizedTokens, module).whole(batch, drop), tokens, mask)
    return Context(pooled(tokens, mask), tokens, mask)


@typed
def pooled(tokens: Float[Array, "b s d"], mask: Bool[Array, "b s"]) -> Float[Array, "b d"]:
    """The mean of the unmasked tokens of (b, s, d): (b, d) fp32."""
    seen = mask[..., None].astype(jnp.float32)
    return (tokens * seen).sum(1) / jnp.maximum(seen.sum(1), 1)


def check_vectors(condition: Condition, width: int = 0) -> None:
    """Check that a condition gives vectors, of this width unless it is 0.

    Errors: `ConfigError` if it gives ids, or vectors or a summary vector of another width.
    """
    if condition.spec.gives_ids:
        name = type(condition).__name__
        raise ConfigError(f"condition {name} gives no vectors; ClassEmbedder, CaptionEncoder and TextFeatures do")
    for given in (condition.token_width(width), condition.spec.summary_width or width):
        if width and given != width:
            raise ConfigError(f"condition: vectors of {given} numbers; width={width} is needed")


@typed
def dropped_rows(key: Array, share: float, b: int, train: bool) -> Bool[Array, " {b}"]:
    """Rows bool (b,) of a batch whose condition is dropped: each with probability `share` in training, else none."""
    return jax.random.bernoulli(key, share, (b,)) if train else jnp.zeros(b, bool)


def value(batch: Batch, name: str) -> Array:
    """The field `name` of the batch. Errors: `ConfigError` if it is missing: data and model do not match."""
    if name not in batch:
        raise ConfigError(missing(name, batch))
    return jnp.asarray(batch[name])


def ids(batch: Batch, name: str, count: int) -> Array:
    """Ids of the batch, checked to be in 0 .. count - 1 where their values are known (outside of `jit`)."""
    x = value(batch, name)
    if not isinstance(x, Tracer):
        known = np.asarray(x)
        if known.size and (known.min() < 0 or known.max() >= count):
            raise ConfigError(f"'{name}' holds ids {known.min()} .. {known.max()}; the model knows 0 .. {count - 1}")
    return x


@typed
def caption(
    batch: Batch, drop: Bool[Array, " b"], vocabulary: int, length: int
) -> tuple[Int[Array, "b s"], Bool[Array, "b s"]]:
    """`text` int (b, s), and a mask (b, s) of what is read of it: nothing of the rows `drop` (b,)."""
    text, mask = ids(batch, "text", vocabulary), value(batch, "text_mask")
    same_length("text", text.shape[1], length)
    return text, mask & ~drop[:, None]


def same_length(name: str, found: int, length: int) -> None:
    if found != length:
        raise ConfigError(f"'{name}' has {found} slots a row; the condition of the model has length {length}")
