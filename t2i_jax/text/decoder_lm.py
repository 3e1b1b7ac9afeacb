"""Decoder language models as text encoders: Llama (Touvron et al. 2023; Dubey et al. 2024), Qwen 2 and 3.

A language model trained without images encodes captions better than encoders of its size (Xie et al. 2024, SANA; Qin et
al. 2025, Lumina-Image 2.0): its last or second-to-last hidden states replace T5's features.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from tokenizers import Tokenizer

from t2i_jax.core.sharding import shard
from t2i_jax.core.sniff import sniff_file
from t2i_jax.interop import decoder_lm as published
from t2i_jax.interop import huggingface
from t2i_jax.interop.names import Fields, to_ours
from t2i_jax.nn.attention import causal, frequencies
from t2i_jax.nn.layers import Embedding, RMSNorm
from t2i_jax.nn.transformer import Transformer, scan_stack, stack
from t2i_jax.text.cut import FolderEncoder, padded

KINDS = ("llama", "qwen2", "qwen3")
"""Supported `model_type` of a config.json."""


@dataclasses.dataclass(frozen=True)
class DecoderLM(FolderEncoder):
    """Captions as hidden states of a language model; its folder has config.json, the weights and tokenizer.json."""

    length: int = 128
    """ids per caption, including those of the template; longer captions are cut"""
    layer: int = -1
    """which hidden states: 0 the embeddings, n those after layer n, negative ones count from the end; the last are
    normalised. Later layers are not loaded."""
    template: str = "{}"
    """template of the captions, such as an instruction, with `{}` for the caption"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the weights and of the computation"""

    def __post_init__(self):
        super().__post_init__()
        if "{}" not in self.template:
            raise ValueError(f"DecoderLM.template {self.template!r} has no {{}}, the place of the caption")

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (n, s) and the mask bool (n, s) of non-padding; an empty caption is all padding.

        Errors: FileNotFoundError without tokenizer.json, ImportError without the package that reads it.
        """
        return padded([ids[: self.length] for ids in self.tokens(captions)], self.length)

    @property
    def room(self) -> int:
        return self.length

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """All ids of each caption in its template, including those that the tokenizer adds; none for an empty
        caption."""
        texts = [self.template.replace("{}", caption) for caption in captions]
        found = _tokenizer(self.folder).encode_batch(texts)
        return [one.ids if caption.strip() else [] for one, caption in zip(found, captions, strict=True)]

    @functools.cached_property
    def shape(self) -> DecoderLMShape:
        """Sizes of the loaded part. Errors: FileNotFoundError, ValueError naming a field of config.json."""
        return DecoderLMShape.read(huggingface.config(self.folder), self.layer)

    @property
    def feature_shape(self) -> tuple[int, int]:
        return self.length, self.shape.transformer.width

    def load(self) -> DecoderLMNetwork:
        """The requested layers with their weights, on the host: `sharding.put_on_mesh` puts them on a mesh.

        Errors: FileNotFoundError for a missing file, ValueError that lists every missing or wrongly shaped tensor.
        """
        shape, blocks = self.shape, self.shape.transformer
        abstract = jax.eval_shape(functools.partial(DecoderLMNetwork, shape), jax.random.key(0))
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, self.dtype), abstract)
        bias, out_bias = blocks.biases
        kinds = {"bias": bias, "out_bias": out_bias, "qk_norm": blocks.qk_norm, "last": shape.last}
        lines = published.table(blocks.heads, blocks.num_kv_heads, blocks.head_size, **kinds)
        if not blocks.depth:
            lines = {k: v for k, v in lines.items() if not k.startswith("blocks.")}
        aside = published.ignored(blocks.depth, shape.last)
        return to_ours(abstract, huggingface.Weights(self.folder, published.NEEDED), lines, aside, self.folder)

    def features(self, model: DecoderLMNetwork, ids: Array, mask: Array) -> Array:
        """One vector per token: (b, s) ids and mask -> (b, s, k) of `dtype`, arbitrary where the mask is False."""
        return model(ids)


@dataclasses.dataclass(frozen=True)
class DecoderLMShape:
    """Sizes of a decoder, up to the requested layer."""

    transformer: Transformer
    """its blocks up to the requested layer"""
    vocabulary: int
    last: bool
    """it has the norm after the last layer"""
    base: float = 10000.0
    """base of the rotary positions"""
    stretch: tuple[float, float, float, float] | None = None
    """factor, low, high and length: wavelengths above length / low are slowed by the factor, those below length / high
    are not (Llama 3.1)"""

    @classmethod
    def read(cls, config: Fields, layer: int = -1) -> DecoderLMShape:
        """From the fields of config.json. Errors: ValueError naming the field."""
        kind = config.get("model_type")
        if kind not in KINDS:
            raise ValueError(f"config.json: model_type {kind!r} is not one of {', '.join(KINDS)}")
        fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        if missing := [k for k in fields if k not in config]:
            raise ValueError(f"config.json has no {', '.join(missing)}")
        huggingface.check_supported(
            config, {"hidden_act": ("silu",), "mlp_bias": (False,), "use_sliding_window": (False,)}
        )
        depth = config["num_hidden_layers"]
        if not -depth - 1 <= layer <= depth:
            raise ValueError(f"layer {layer}: this model has hidden states 0 to {depth}, or {-depth - 1} to -1")
        heads, biased = config["num_attention_heads"], bool(config.get("attention_bias", False))
        used = layer % (depth + 1)
        transformer = Transformer(
            config["hidden_size"],
            used,
            heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            mlp=config["intermediate_size"],
            eps=config.get("rms_norm_eps", 1e-6),
            qkv_bias=kind == "qwen2" or biased,
            out_bias=kind != "qwen2" and biased,
            qk_norm=kind == "qwen3",
        )
        return cls(transformer, config["vocab_size"], used == depth, *_rotary(config))

    def angles(self, length: int) -> Array:
        """Angles (length, h/2) of positions 0 .. length - 1."""
        turns = frequencies(self.transformer.head_size // 2, self.base)
        if self.stretch is not None:
            factor, low, high, known = self.stretch
            kept = jnp.clip((known * turns / (2 * math.pi) - low) / (high - low), 0, 1)
            turns = turns * (kept + (1 - kept) / factor)
        return jnp.arange(length)[:, None] * turns


def _rotary(config: Fields) -> tuple[float, tuple[float, float, float, float] | None]:
    """Base and stretch of the rotary positions."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise ValueError(f"config.json: rotary positions of kind {kind!r}; what can be read are default and llama3")
    ends = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, length = (float(rope[k]) for k in ends)
    return base, (factor, low, high, length)


@functools.lru_cache(8)
def _tokenizer(folder: str) -> Tokenizer:
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer.json in it, the vocabulary of the language model")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises no narrower type
        what = sniff_file(path)
        fault = f"is {what}, not a tokenizer" if what != "a JSON file" else f"cannot be read as a tokenizer: {error}"
        raise ValueError(f"{path}: {fault}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class DecoderLMNetwork(nnx.Module):
    """Pre-norm blocks with causal attention."""

    def __init__(self, shape: DecoderLMShape, key: Array):
        keys = jax.random.split(key)
        self.words = Embedding(shape.vocabulary, shape.transformer.width, keys[0])
        self.blocks = stack(shape.transformer, keys[1]) if shape.transformer.depth else None
        self.norm = RMSNorm(shape.transformer.width, shape.transformer.eps) if shape.last else None
        self.shape = shape

    def __call__(self, ids: Array) -> Array:
        """ids int (b, t) -> hidden states (b, t, d) in the dtype of the weights, by causal attention."""
        x, t = shard(self.words(ids), "batch", "length", None), ids.shape[1]
        if self.blocks is not None:
            angles = self.shape.angles(t)
            x = scan_stack(self.blocks, x, rotary=(jnp.cos(angles), jnp.sin(angles)), mask=causal(t))
        return x if self.norm is None else self.norm(x)
