"""Conditions of unCLIP (Ramesh et al. 2022, DALL-E 2): a caption for its prior, an image's embedding with it for its
decoder."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from t2i_jax.core.arrays import Bool, Float, typed
from t2i_jax.core.conditions import Batch, ConditionSpec
from t2i_jax.core.fields import Size
from t2i_jax.core.noise import NoiseProcess
from t2i_jax.core.specs import BatchSpec, FieldSpec
from t2i_jax.networks.condition import BaseCondition, CrossAttnFeatures, ids, value
from t2i_jax.nn.layers import Embedding, LayerNorm, Linear, ModelState, normal, param
from t2i_jax.nn.modulation import sinusoid
from t2i_jax.noise.processes import Discrete


@dataclasses.dataclass(frozen=True)
class CaptionAndTokens(BaseCondition):
    """Features of a frozen text encoder for the prior: the caption's embedding first, then its tokens. The network
    reads the tokens, padding masked, and then the embedding, each projected."""

    encoded: CrossAttnFeatures = CrossAttnFeatures(768, 78, trained_null=False, kept_null=True)
    """all vectors, the first included"""
    null_tokens: Size = 2
    """tokens of an empty caption: start and end of CLIP's"""

    def __post_init__(self):
        super().__post_init__()
        if not self.null_tokens < self.encoded.length:
            raise ValueError(f"null_tokens {self.null_tokens}: a caption has {self.encoded.length - 1} tokens")

    @property
    def spec(self) -> ConditionSpec:
        return ConditionSpec(has_null=self.encoded.spec.has_null, has_padding=True)

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch; the mask is that of the tokens."""
        return {**self.encoded.batch_spec(), "text_mask": FieldSpec((self.encoded.length - 1,), "bool")}

    @property
    def length(self) -> int:
        return self.encoded.length

    def init(self, key: Array, width: int) -> ProjectedCaption | ProjectedImageAndCaption:
        return ProjectedCaption(self, key, width)


class EncodedCaption(nnx.Module):
    """`features` float (b, 1 + s, k), the caption's embedding first, and `text_mask` bool (b, s)."""

    def __init__(self, config: CaptionAndTokens, key: Array):
        self.encoded = config.encoded.init(key, config.encoded.dim)
        self.null_tokens = config.null_tokens

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b k"], Float[Array, "b s k"], Bool[Array, "b s"]]:
        """Embedding, tokens, and which are not padding; of dropped rows and rows without text those of an empty
        caption."""
        x, _ = self.encoded(batch, drop, dtype)
        mask = value(batch, "text_mask")
        empty = drop | ~mask.any(1)
        mask = jnp.where(empty[:, None], jnp.arange(mask.shape[1]) < self.null_tokens, mask)
        return x[:, 0], x[:, 1:], mask


class ProjectedCaption(nnx.Module):
    """`features` float (b, 1 + s, k) -> tokens (b, s + 1, d), the caption's embedding last."""

    def __init__(self, config: CaptionAndTokens, key: Array, width: int):
        keys = jax.random.split(key, 3)
        self.caption = EncodedCaption(config, keys[0])
        self.tokens = Linear(config.encoded.dim, width, keys[1], axes=(None, "embed"))
        self.whole = Linear(config.encoded.dim, width, keys[2], axes=(None, "embed"))

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        whole, tokens, mask = self.caption(batch, drop, dtype)
        tokens = jnp.concatenate([self.tokens(tokens), self.whole(whole)[:, None]], 1)
        return tokens, jnp.pad(mask, ((0, 0), (0, 1)), constant_values=True)


@dataclasses.dataclass(frozen=True)
class Similarity(BaseCondition):
    """One token of how similar caption and image are: a row of a table for each bucket of the product of their
    embeddings (Ramesh et al. 2022, 2.2). The unconditional branch has it, too."""

    buckets: Size = 1024

    length = 1

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch."""
        return {"similarity": FieldSpec((), "int32", 0, self.buckets - 1)}

    def init(self, key: Array, width: int) -> SimilarityToken:
        return SimilarityToken(self, key, width)


class SimilarityToken(nnx.Module):
    """`similarity` int (b,) -> one token (b, 1, d), always visible; `drop` has no effect."""

    def __init__(self, config: Similarity, key: Array, width: int):
        self.config, self.table = config, Embedding(config.buckets, width, key)

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        tokens = self.table(ids(batch, "similarity", self.config.buckets))[:, None]
        return tokens.astype(dtype), jnp.ones(tokens.shape[:2], bool)


@dataclasses.dataclass(frozen=True)
class ImageAndCaption(CaptionAndTokens):
    """The same for the decoder, with the embedding of an image, `image_features`: projected to tokens before those of
    the caption, and added, with the caption's embedding, to that of the time. Its unconditional embedding is learned.
    """

    summary: Size = 1280
    """width of what is added to the embedding of the time, which has 4 times the width of a UNet"""
    image_tokens: Size = 4

    @property
    def spec(self) -> ConditionSpec:
        return dataclasses.replace(super().spec, gives_summary=True, summary_width=self.summary)

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch."""
        return {**super().batch_spec(), "image_features": FieldSpec((self.encoded.dim,), "float32")}

    @property
    def length(self) -> int:
        return self.image_tokens + self.encoded.length - 1

    def init(self, key: Array, width: int) -> ProjectedImageAndCaption:
        return ProjectedImageAndCaption(self, key, width)


class ProjectedImageAndCaption(nnx.Module):
    """`features` float (b, 1 + s, k), `image_features` (b, k) -> tokens (b, n + s, d), those of the image first;
    `whole` gives (b, e) from both embeddings."""

    def __init__(self, config: ImageAndCaption, key: Array, width: int):
        keys = jax.random.split(key, 6)
        k, e, n = config.encoded.dim, config.summary, config.image_tokens
        self.caption = EncodedCaption(config, keys[0])
        self.null_image = param(normal(keys[1], (k,), 1.0), None)
        self.image_tokens = Linear(k, n * width, keys[2], std=None, axes=(None, "embed"))
        self.tokens = Linear(k, width, keys[3], std=None, axes=(None, "embed"))
        self.norm = LayerNorm(width)
        self.image_whole = Linear(k, e, keys[4], std=None, axes=(None, "embed"))
        self.caption_whole = Linear(k, e, keys[5], std=None, axes=(None, "embed"))
        self.count = n

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        _, tokens, mask = self.caption(batch, drop, dtype)
        image = rearrange(self.image_tokens(self._image(batch, drop, dtype)), "b (n d) -> b n d", n=self.count)
        tokens = jnp.concatenate([image, self.norm(self.tokens(tokens))], 1)
        return tokens, jnp.pad(mask, ((0, 0), (self.count, 0)), constant_values=True)

    @typed
    def whole(self, batch: Batch, drop: Bool[Array, " b"]) -> Float[Array, "b e"]:
        return self.image_whole(self._image(batch, drop)) + self.caption_whole(self.caption(batch, drop)[0])

    def _image(self, batch: Batch, drop: Array, dtype: DTypeLike = jnp.float32) -> Array:
        return jnp.where(drop[:, None], self.null_image[...], value(batch, "image_features")).astype(dtype)


@dataclasses.dataclass(frozen=True)
class NoisedImageAndTokens(BaseCondition):
    """Tokens of a caption for cross-attention, unprojected, and a noised embedding of an image with its noise level,
    added to the embedding of the time (Stable unCLIP). Zeros are the unconditional embedding and level."""

    encoded: CrossAttnFeatures = CrossAttnFeatures(1024, 77, trained_null=False, kept_null=True)
    """the tokens"""
    dim: Size = 768
    """size k of an embedding"""
    summary: Size = 1280
    """width of what is added to the embedding of the time, which has 4 times the width of a UNet"""
    process: NoiseProcess = Discrete("cosine")
    """noise of embeddings, in units of their standard deviation"""

    @property
    def spec(self) -> ConditionSpec:
        has_null = self.encoded.spec.has_null
        return ConditionSpec(has_null=has_null, gives_summary=True, summary_width=self.summary)

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch; without `image_noise` the embedding is read as it is, at level 0."""
        noise = FieldSpec((self.dim,), "float32", optional=True)
        level = FieldSpec((), "int32", 0, self.process.max_steps - 1, optional=True)
        embedding = {"image_features": FieldSpec((self.dim,), "float32")}
        return {**self.encoded.batch_spec(), **embedding, "image_noise": noise, "image_noise_level": level}

    @property
    def length(self) -> int:
        return self.encoded.length

    def token_width(self, width: int) -> int:
        return self.encoded.dim

    def init(self, key: Array, width: int) -> NoisedImage:
        return NoisedImage(self, key, width)


class NoisedImage(nnx.Module):
    """`features` float (b, s, d) -> the same; `whole` gives (b, e) from `image_features` (b, k), and from `image_noise`
    (b, k) at `image_noise_level` int (b,)."""

    def __init__(self, config: NoisedImageAndTokens, key: Array, width: int):
        keys = jax.random.split(key, 3)
        self.encoded = config.encoded.init(keys[0], width)
        self.into = Linear(2 * config.dim, config.summary, keys[1], std=None, axes=(None, "mlp"))
        self.out = Linear(config.summary, config.summary, keys[2], std=None, axes=("mlp", "embed"))
        self.mean = ModelState(jnp.zeros(config.dim), axes=(None,))
        self.std = ModelState(jnp.ones(config.dim), axes=(None,))
        self.process = config.process

    @typed
    def __call__(
        self, batch: Batch, drop: Bool[Array, " b"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        return self.encoded(batch, drop, dtype)

    @typed
    def whole(self, batch: Batch, drop: Bool[Array, " b"]) -> Float[Array, "b e"]:
        z, level = value(batch, "image_features"), jnp.zeros(drop.shape, jnp.int32)
        if "image_noise" in batch:
            level = value(batch, "image_noise_level")
            alpha, sigma = self.process.alpha_sigma(level, z)
            scaled = alpha * (z - self.mean[...]) / self.std[...] + sigma * value(batch, "image_noise")
            z = scaled * self.std[...] + self.mean[...]
        both = jnp.concatenate([z, sinusoid(level, z.shape[1])], 1)
        return self.out(jax.nn.silu(self.into(jnp.where(drop[:, None], 0, both))))
