"""Names of LlamaGen's next-token models (Sun et al. 2024), class- or caption-conditional, and their configuration."""

from __future__ import annotations

import numpy as np

from t2i_jax.interop.names import LINEAR, Fields, Table, Tensors, by_kv_head, layers, require, source
from t2i_jax.networks.condition import ClassEmbedder, TextFeatures
from t2i_jax.nn.positions import RotaryPositions
from t2i_jax.nn.transformer import Transformer

NEEDED = ("tok_embeddings.weight", "layers.0.attention.wqkv.weight")
"""Names that every such file has."""
UNUSED = r"freqs_cis|causal_mask|kv_cache"
HEAD_DIM = {3200: 100, 4096: 128}  # by width; 64 elsewhere


def describe(tensors: Tensors, head_dim: int = 0, null: bool = True) -> Fields:
    """The fields of the family's configuration that the shapes of `tensors` (arrays or abstract) belong to.

    Two do not follow: `head_dim`, 0 for that of the released model of this width; and `null`, whether the last row of
    the table of classes is the null class, as it is unless no class was dropped in training.
    """
    require(tensors, NEEDED, "no next-token model of LlamaGen")
    vocabulary, width = tensors["tok_embeddings.weight"].shape
    if "cls_embedding.embedding_table.weight" in tensors:
        condition = ClassEmbedder(tensors["cls_embedding.embedding_table.weight"].shape[0] - null, null)
    else:
        length, dim = tensors["cls_embedding.uncond_embedding"].shape
        condition = TextFeatures(dim, length, trained_null=False, left=True, null_keeps_mask=True)
    head_dim = head_dim or HEAD_DIM.get(width, 64)
    heads, rows = width // head_dim, tensors["layers.0.attention.wqkv.weight"].shape[0]
    if heads * head_dim != width:
        raise ValueError(f"head_dim={head_dim} does not divide the width {width}")
    kv_heads = (rows // head_dim - heads) // 2
    return {
        "vocabulary": vocabulary,
        "width": width,
        "depth": sum(name.endswith(".attention.wo.weight") for name in tensors),
        "heads": heads,
        "kv_heads": 0 if kv_heads == heads else kv_heads,
        "mlp": tensors["layers.0.feed_forward.w1.weight"].shape[0],
        "condition": condition,
        "zero_output": True,
        "positions": RotaryPositions(prefix="zero"),
    }


def table(transformer: Transformer, classes: bool) -> Table:
    """LlamaGen's names for a `models.ar.AR`; classes: it is conditioned on a class, else on features of a caption."""
    layer, n, m = "layers.{}.", transformer.heads, transformer.num_kv_heads
    # Their rows are all queries, then all keys, then all values.
    rows = by_kv_head(np.arange((n + 2 * m) * transformer.head_size).reshape(n + 2 * m, -1), n, m)
    norms = {"norm": "norm", "blocks.attention_norm": f"{layer}attention_norm", "blocks.mlp_norm": f"{layer}ffn_norm"}
    linears = {
        "blocks.attention.out": f"{layer}attention.wo",
        "blocks.mlp.gate": f"{layer}feed_forward.w1",
        "blocks.mlp.into": f"{layer}feed_forward.w3",
        "blocks.mlp.out": f"{layer}feed_forward.w2",
    }
    if not classes:
        linears |= {f"condition.{ours}": f"cls_embedding.cap_proj.fc{n}" for n, ours in enumerate(("into", "out"), 1)}
    table = {"condition.table.w": source("cls_embedding.embedding_table.weight")}
    null = {"condition.null": source("cls_embedding.uncond_embedding")}
    return {
        "tokens.w": source("tok_embeddings.weight"),
        "output": source("output.weight", layout=LINEAR),
        "blocks.attention.qkv.w": source(f"{layer}attention.wqkv.weight", layout=LINEAR, rows=rows, height=len(rows)),
        **layers(norms, biases=False),
        **layers(linears, LINEAR, biases=False),
        **(table if classes else null),
    }
