"""Conditions that are features of a frozen encoder, of captions or of images."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from t2i_jax.core.arrays import Bool, Float, typed
from t2i_jax.core.conditions import Batch, ConditionSpec
from t2i_jax.core.fields import Size
from t2i_jax.core.specs import BatchSpec, FieldSpec
from t2i_jax.networks.condition.base import BaseCondition, features_spec, same_length, value
from t2i_jax.nn.layers import Linear, ModelState, normal, param


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
        """Fields that it reads of a batch: unconditional features only where the model has none; the mask only to find
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
    """`features` float (b, s, k) -> the same, all visible, for a network of any width.

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
