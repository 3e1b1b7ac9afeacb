"""Names of the Flax checkpoints of MaskGIT (Chang et al. 2022), and what their shapes say.

Names of nested dictionaries are joined by "/". Dense layers and convolutions have the layout of this library.
"""

from __future__ import annotations

import math
import re

import numpy as np

from t2i_jax.interop.names import Fields, Table, Tensors, layers, require, source

WORDS = "params/Embed_0/word_embeddings/embedding"
POSITIONS = "params/Embed_0/position_embeddings/embedding"
LAYER = "params/TransformerLayer_{}"
QUERY = f"{LAYER}/Attention_0/self_attention/query/kernel"
INNER = f"{LAYER}/Mlp_0/intermediate_output/kernel"
TRANSFORMER = (WORDS, POSITIONS, QUERY.format(0), INNER.format(0), "params/MlmLayer_0/mlm_dense/kernel")
"""Names that every Transformer has."""
DENSE, NORM = ("kernel", "bias"), ("scale", "bias")
"""Words for the parameters of a layer."""
CODES = 1024
"""Codes of the released models; their other words are 1000 classes and the mask token."""


def describe(tensors: Tensors, codes: int = CODES, grid: tuple[int, int] | None = None) -> Fields:
    """The sizes that the shapes of a Transformer's `tensors` (arrays or abstract) say.

    codes: how many of the words are codes. grid: rows and columns of tokens, where they are no square. Errors:
    ValueError where names are missing, and for numbers of codes and tokens that do not fit.
    """
    require(tensors, TRANSFORMER, "no Transformer of MaskGIT")
    shape = lambda name: tuple(tensors[name].shape)
    words, length = shape(WORDS)[0], shape(POSITIONS)[0] - 1
    if not 0 < codes < words - 1:
        raise ValueError(f"codes {codes}: the table has {words} words, which are codes, classes and the mask token")
    side = math.isqrt(length)
    if math.prod(grid or (side, side)) != length:
        how = f"grid {grid} has {math.prod(grid)}" if grid else "no square: say their rows and columns by grid="
        raise ValueError(f"the file has positions of {length} tokens: {how}")
    width, heads, head_dim = shape(QUERY.format(0))
    return {
        "grid": grid or (side, side),
        "codes": codes,
        "classes": words - codes - 1,
        "transformer": {
            "width": width,
            "depth": _count(tensors, "params/TransformerLayer_"),
            "heads": heads,
            "head_dim": 0 if heads * head_dim == width else head_dim,
            "mlp": shape(INNER.format(0))[1],
        },
    }


def table(codes: int, classes: int, heads: int) -> Table:
    """Names for a `models.masked.Masked` with one stack and a tied table: of codes, classes, and the mask token, whose
    id -1 is the last row."""
    words = codes + classes + 1
    rows = lambda start, stop: {"rows": np.arange(start, stop), "height": words}
    lines = {
        "entrance.w": source(WORDS, **rows(0, codes)),
        "condition.table.w": source(WORDS, **rows(codes, words - 1)),
        "mask_token": source(WORDS, layout="1 d -> d", **rows(words - 1, words)),
        "position": source(POSITIONS),
        "output_bias": source("params/MlmLayer_0/mlm_bias/bias"),
    }
    attention, layer = f"{LAYER}/Attention_0", f"{LAYER}/Mlp_0"
    parts = [f"{attention}/self_attention/{name}" for name in ("query", "key", "value")]
    out = f"{attention}/self_attention/out"
    lines |= {
        "blocks.attention.qkv.w": source(*(f"{p}/kernel" for p in parts), layout="a d n h -> d (n a h)", n=heads),
        "blocks.attention.qkv.b": source(*(f"{p}/bias" for p in parts), layout="a n h -> (n a h)", n=heads),
        "blocks.attention.out.w": source(f"{out}/kernel", layout="n h d -> (n h) d", n=heads),
        "blocks.attention.out.b": source(f"{out}/bias"),
    }
    norms = {
        "entrance_norm": "params/Embed_0/embeddings_ln",
        "blocks.attention_norm": f"{attention}/attention_output_ln",
        "blocks.mlp_norm": f"{layer}/layer_output_ln",
        "transform_norm": "params/MlmLayer_0/mlm_ln",
    }
    dense = {
        "blocks.mlp.into": f"{layer}/intermediate_output",
        "blocks.mlp.out": f"{layer}/layer_output",
        "transform": "params/MlmLayer_0/mlm_dense",
    }
    return lines | layers(norms, ends=NORM, between="/") | layers(dense, ends=DENSE, between="/")


def _count(tensors: Tensors, prefix: str) -> int:
    """How many layers have names that begin with `prefix` and a number."""
    return len({found[1] for name in tensors if (found := re.match(rf"{re.escape(prefix)}(\d+)/", name))})
