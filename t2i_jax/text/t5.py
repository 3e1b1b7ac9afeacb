"""T5's encoder, frozen (Raffel et al. 2020; FLAN-T5: Chung et al. 2022): the text encoder of LlamaGen."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Int, typed
from t2i_jax.core.fields import VOCABULARY
from t2i_jax.core.sharding import shard
from t2i_jax.interop import huggingface
from t2i_jax.interop import t5 as published
from t2i_jax.interop.names import Fields, to_ours
from t2i_jax.nn.layers import Embedding, RMSNorm, normal, param
from t2i_jax.nn.transformer import GATED, Activation, Transformer, scan_stack, stack
from t2i_jax.text.clean import clean_twice
from t2i_jax.text.cut import FolderEncoder
from t2i_jax.text.sentencepiece import SentencePiece

ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gated-gelu": "geglu",
    "gated-silu": "swiglu",
}
"""`feed_forward_proj` of a config.json, and our name."""


@dataclass(frozen=True)
class T5(FolderEncoder):
    """Captions as features of a T5 encoder; its folder has config.json, the weights and spiece.model."""

    length: int = 120
    """ids per caption, including the end; longer captions are cut"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the weights and of the computation; released LlamaGen weights were trained on bfloat16 features"""
    clean: bool = False
    """clean captions as DeepFloyd-IF, PixArt and LlamaGen do (`t2i_jax.text.clean`)"""
    vocabulary: Annotated[str, VOCABULARY] = ""
    """file of the vocabulary; empty: the folder's spiece.model"""

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (n, s) and the mask bool (n, s) of non-padding; an empty caption is all padding.

        Errors: FileNotFoundError without spiece.model, ValueError if it cannot be read.
        """
        return self._pieces([clean_twice(c) for c in captions] if self.clean else captions)

    @property
    def room(self) -> int:
        return self._pieces.room

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        return self._pieces.tokens([clean_twice(c) for c in captions] if self.clean else captions)

    @property
    def _pieces(self) -> SentencePiece:
        vocabulary = Path(self.vocabulary or Path(self.folder) / "spiece.model")
        if not vocabulary.is_file():
            raise FileNotFoundError(f"{vocabulary.parent}: no {vocabulary.name} in it, the vocabulary of T5")
        return SentencePiece(str(vocabulary), self.length)

    @functools.cached_property
    def shape(self) -> T5Shape:
        """The sizes of the encoder. Errors: FileNotFoundError, ValueError naming a field of config.json."""
        return T5Shape.read(huggingface.config(self.folder))

    @property
    def feature_shape(self) -> tuple[int, int]:
        return self.length, self.shape.transformer.width

    def load(self) -> T5Encoder:
        """The encoder with its weights, on the host: `sharding.put_on_mesh` puts it on a mesh.

        Errors: FileNotFoundError for a missing file, ValueError that lists every missing or wrongly shaped tensor.
        """
        shape, tensors = self.shape, huggingface.Weights(self.folder, published.NEEDED)
        abstract = jax.eval_shape(functools.partial(T5Encoder, shape), jax.random.key(0))
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, self.dtype), abstract)
        lines = published.table(tensors, shape.transformer.head_size, shape.transformer.activation in GATED)
        return to_ours(abstract, tensors, lines, published.IGNORED, self.folder)

    def features(self, model: T5Encoder, ids: Array, mask: Array) -> Array:
        """One vector per token: (b, s) ids and mask -> (b, s, k) of `dtype`, arbitrary where the mask is False."""
        return model(ids, mask)


@dataclass(frozen=True)
class T5Shape:
    """Sizes of a T5 encoder."""

    transformer: Transformer
    vocabulary: int
    buckets: int = 32
    """number of buckets of relative positions, half of them for positions to the right"""
    distance: int = 128
    """distance from which on all positions share the last bucket"""

    @classmethod
    def read(cls, config: Fields) -> T5Shape:
        """From the fields of config.json. Errors: ValueError naming the field."""
        missing = [k for k in ("d_model", "num_layers", "num_heads", "d_ff", "vocab_size") if k not in config]
        if missing:
            raise ValueError(f"config.json has no {', '.join(missing)}: it is not T5's")
        projection = config.get("feed_forward_proj", "relu")
        if projection not in ACTIVATIONS:
            raise ValueError(f"config.json: feed_forward_proj '{projection}' is not one of {', '.join(ACTIVATIONS)}")
        transformer = Transformer(
            config["d_model"],
            config["num_layers"],
            config["num_heads"],
            head_dim=config.get("d_kv", 64),
            mlp=config["d_ff"],
            eps=config.get("layer_norm_epsilon", 1e-6),
            activation=ACTIVATIONS[projection],
            scale=1.0,  # T5 scales down the initial weights instead
        )
        buckets, distance = (
            config.get(f"relative_attention_{k}", v) for k, v in (("num_buckets", 32), ("max_distance", 128))
        )
        return cls(transformer, config["vocab_size"], buckets, distance)


class T5Encoder(nnx.Module):
    """Pre-norm blocks without position embeddings; a relative-position bias of the attention logits is shared by all
    blocks."""

    def __init__(self, shape: T5Shape, key: Array):
        keys = jax.random.split(key, 3)
        transformer = shape.transformer
        self.words = Embedding(shape.vocabulary, transformer.width, keys[0], std=1.0)
        self.relative = param(normal(keys[1], (shape.buckets, transformer.heads)), None, "heads")
        self.blocks = stack(transformer, keys[2])
        self.norm = RMSNorm(transformer.width, transformer.eps)
        self.shape = shape

    def __call__(self, ids: Array, mask: Array) -> Array:
        """ids int (b, t), mask bool (b, t) of text -> (b, t, d) in the dtype of the weights."""
        x = shard(self.words(ids), "batch", "length", None)
        bias = self.relative[...][buckets(ids.shape[1], self.shape.buckets, self.shape.distance)]
        bias = rearrange(bias, "t s n -> 1 n t s")
        return self.norm(scan_stack(self.blocks, x, mask=mask[:, None, None], bias=bias))


@typed
def buckets(t: int, count: int, distance: int) -> Int[np.ndarray, "{t} {t}"]:
    """Bucket int (t, t) of key s relative to query t (Raffel et al. 2020, section 2.1).

    The lower half of the buckets is for keys to the left, the upper for keys to the right. In each half the first half
    are exact distances, the others grow with the logarithm up to `distance`.
    """
    offset = np.arange(t)[None] - np.arange(t)[:, None]
    half, exact = count // 2, count // 4
    far = np.maximum(np.abs(offset), 1).astype(np.float32)
    scaled = np.log(far / np.float32(exact)) / np.float32(np.log(distance / exact)) * np.float32(half - exact)
    steps = np.minimum(exact + scaled.astype(np.int32), half - 1)
    return np.where(offset > 0, half, 0) + np.where(np.abs(offset) < exact, np.abs(offset), steps)
