"""Conditions as tokens that a network reads: a class, a caption read by a trained encoder, or frozen features.

A `Conditioning` names the one that a network reads, and how. Each config (`ClassEmbedder`, `CaptionEncoder`,
`TextFeatures`, `PooledFeatures`, ...) is a `core.conditions.Condition`; its module maps (batch, drop, dtype) to tokens
and a mask. `PrefixTokens` are ids of the image's own vocabulary, which the network embeds itself. Configs of earlier
runs name all of them as members of this package.
"""

from t2i_jax.networks.condition.base import BaseCondition, caption, features_spec, ids, same_length, text_spec, value
from t2i_jax.networks.condition.classes import ClassEmbedder, ClassTokens, PrefixIds, PrefixTokens
from t2i_jax.networks.condition.conditioning import (
    Conditioning,
    Context,
    check_vectors,
    dropped_rows,
    pooled,
    read_context,
)
from t2i_jax.networks.condition.crop import SizeAndCrop, SizeAndCropToken
from t2i_jax.networks.condition.encoders import CaptionEncoder, CaptionTokens, EncodedIds, LowCodes, LowCodeTokens
from t2i_jax.networks.condition.features import (
    CrossAttnFeatures,
    CrossAttnFeatureTokens,
    FeatureTokens,
    PooledAndFeatureTokens,
    PooledAndTokenFeatures,
    PooledFeatures,
    PooledFeatureToken,
    SentenceAndWords,
    SentenceAndWordTokens,
    TextFeatures,
)
from t2i_jax.networks.condition.joined import Joined, JoinedTokens

__all__ = [
    "BaseCondition",
    "CaptionEncoder",
    "CaptionTokens",
    "ClassEmbedder",
    "ClassTokens",
    "Conditioning",
    "Context",
    "CrossAttnFeatureTokens",
    "CrossAttnFeatures",
    "EncodedIds",
    "FeatureTokens",
    "Joined",
    "JoinedTokens",
    "LowCodeTokens",
    "LowCodes",
    "PooledAndFeatureTokens",
    "PooledAndTokenFeatures",
    "PooledFeatureToken",
    "PooledFeatures",
    "PrefixIds",
    "PrefixTokens",
    "SentenceAndWordTokens",
    "SentenceAndWords",
    "SizeAndCrop",
    "SizeAndCropToken",
    "TextFeatures",
    "caption",
    "check_vectors",
    "dropped_rows",
    "features_spec",
    "ids",
    "pooled",
    "read_context",
    "same_length",
    "text_spec",
    "value",
]
