"""Names of CogView2's three Transformers, as SwissArmyTransformer saves them (Ding et al. 2022), and their sizes.

One vocabulary has the codes of images, then the ids of text, among them the token <start_of_image>; the same matrix is
that of the output, of which codes have the first rows.
"""

from __future__ import annotations

import math

import numpy as np

from t2i_jax.interop.names import LINEAR, Fields, Source, Table, Tensors, by_head, layers, require, source
from t2i_jax.nn.transformer import Transformer

NEEDED = ("transformer.word_embeddings.weight", "transformer.layers.0.third_layernorm.weight")
"""Names that every such file has."""
PARTS = {"coarse": "coglm.", "direct": "dsr.", "refiner": "itersr."}
"""Prefixes of the names of the three files where they are one."""
LABELS = "cluster_label"
"""The cluster of each code: a file of its own in the published program."""
LAYER = "transformer.layers.{}."
FINE = "mixins.extra_position_embedding.position_embeddings.weight"
PLUS = "mixins.attention_plus."
NORMS = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "third_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp_out_norm": "fourth_layernorm",
}


def describe(tensors: Tensors, prefix: str = "", heads: int = 0) -> Fields:
    """Sizes of one of the networks: `words` (ids of all kinds), `places`, and the fields of its `Transformer`; of a
    network of fine tokens also `grid` and `own_attention`. The file does not record the number of heads; 0 gives each
    of them 64 channels."""
    require(tensors, [prefix + name for name in NEEDED], "no Transformer of CogView2")
    words, width = tensors[f"{prefix}transformer.word_embeddings.weight"].shape
    shape = {
        "width": width,
        "depth": sum(name.startswith(prefix) and name.endswith(".third_layernorm.weight") for name in tensors),
        "heads": heads or max(width // 64, 1),
        "mlp": tensors[f"{prefix}{LAYER.format(0)}mlp.dense_h_to_4h.weight"].shape[0],
    }
    found: Fields = {"words": words, "places": tensors[f"{prefix}transformer.position_embeddings.weight"].shape[0]}
    if prefix + FINE in tensors:
        length = tensors[prefix + FINE].shape[0]
        side = math.isqrt(length)
        found["grid"] = (side, side) if side * side == length else (1, length)
        found["own_attention"] = f"{prefix}{PLUS}dense.0.weight" in tensors
    return found | {"transformer": shape}


def tables(words: int, codes: int, prefix: str) -> dict[str, Source]:
    """Lines of the tables of codes and of text, of `words` ids in all."""
    name = f"{prefix}transformer.word_embeddings.weight"
    return {
        "image_tokens.w": source(name, rows=np.arange(codes), height=words),
        "text_tokens.w": source(name, rows=np.arange(codes, words), height=words),
    }


def blocks(transformer: Transformer, prefix: str) -> dict[str, Source]:
    """Lines of the blocks and the last norm."""
    layer, h = prefix + LAYER, transformer.head_size
    linears = {"attention.out": "attention.dense", "mlp.into": "mlp.dense_h_to_4h", "mlp.out": "mlp.dense_4h_to_h"}
    norms = {f"blocks.{ours}": f"{layer}{theirs}" for ours, theirs in NORMS.items()}
    return {
        **by_head("blocks.attention.qkv", [f"{layer}attention.query_key_value."], "(a n h)", a=3, h=h),
        **layers({f"blocks.{ours}": f"{layer}{theirs}" for ours, theirs in linears.items()}, LINEAR),
        **layers(norms | {"norm": f"{prefix}transformer.final_layernorm"}),
    }


def coarse(
    transformer: Transformer, words: int, codes: int, places: tuple[int, int], prefix: str = ""
) -> dict[str, Source]:
    """The published name and layout of each variable of a `models.stream.Stream`, but for clusters of codes."""
    name, (text, image) = f"{prefix}transformer.position_embeddings.weight", places
    return {
        **tables(words, codes, prefix),
        **blocks(transformer, prefix),
        "text_places": source(name, rows=np.arange(text), height=text + image),
        "image_places": source(name, rows=np.arange(text, text + image), height=text + image),
    }


def fine(transformer: Transformer, words: int, codes: int, own_attention: bool, prefix: str) -> Table:
    """The published name and layout of each variable of a `networks.local.LocalNetwork`."""
    lines = {
        **tables(words, codes, prefix),
        **blocks(transformer, prefix),
        "places": source(f"{prefix}transformer.position_embeddings.weight"),
        "fine_places": source(prefix + FINE),
    }
    if own_attention:
        name = f"{prefix}{PLUS}query_key_value.{{}}."
        lines |= by_head("blocks.attention.fine.qkv", [name], "(a n h)", a=3, h=transformer.head_size)
        lines |= layers({"blocks.attention.fine.out": f"{prefix}{PLUS}dense.{{}}"}, LINEAR)
    return lines
