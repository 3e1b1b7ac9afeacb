"""Names of Image GPT (Chen et al. 2020) in transformers, and sizes by shapes, settings and clusters of colours."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from t2i_jax.interop import huggingface
from t2i_jax.interop.names import LINEAR, Fields, Table, Tensors, layers, require, source
from t2i_jax.nn.positions import LearnedPositions

NEEDED = ("transformer.wte.weight", "transformer.h.0.attn.c_attn.weight", "lm_head.weight")
"""Names that every such file has."""
UNUSED = r"\.attn\.(masked_)?bias$"
"""Causal masks, which older files hold."""
CLUSTERS = "clusters"
"""Our name of a table of clusters, which files of weights do not hold."""
HEADS = {1536: 16}
"""by width, of released models; 8 elsewhere"""
ONLY = {
    "activation_function": ("quick_gelu",),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
"""Fields of config.json for which only these values are supported."""


def describe(tensors: Tensors, heads: int = 0) -> Fields:
    """The fields of the family's configuration that the shapes of `tensors` (arrays or abstract) belong to.

    Errors: ValueError for a file without these names, and for one whose images are no squares.
    """
    require(tensors, NEEDED, "no Image GPT of transformers")
    rows, width = tensors["transformer.wte.weight"].shape
    vocabulary, places = tensors["lm_head.weight"].shape[0], tensors["transformer.wpe.weight"].shape[0]
    if rows != vocabulary + 1:
        raise ValueError(f"transformer.wte has {rows} rows and lm_head {vocabulary}: one more, the start, is wanted")
    if math.isqrt(places) ** 2 != places:
        raise ValueError(f"transformer.wpe has {places} places, which make no square image")
    return {
        "vocabulary": vocabulary,
        "grid": (math.isqrt(places), math.isqrt(places)),
        "width": width,
        "depth": sum(name.endswith(".attn.c_attn.weight") for name in tensors),
        "heads": heads or HEADS.get(width, 8),
        "mlp": tensors["transformer.h.0.mlp.c_fc.weight"].shape[1],
        "positions": LearnedPositions(places),
    }


def settings(config: Fields) -> Fields:
    """Fields that `config.json` has and the shapes have not. Errors: ValueError naming an unsupported value."""
    huggingface.check_supported(config, ONLY)
    return {"heads": config["n_head"], "eps": config.get("layer_norm_epsilon", 1e-5)}


def table(vocabulary: int, head: int) -> Table:
    """The names in transformers for a `models.ar.AR` of so many codes with heads of this size.

    Matrices are (in, out); the last row of the table of codes is the start token.
    """
    layer = "transformer.h.{}."
    wte = lambda rows: source("transformer.wte.weight", rows=rows, height=vocabulary + 1)
    qkv = {"w": ("weight", "d "), "b": ("bias", "")}
    return {
        "tokens.w": wte(np.arange(vocabulary)),
        "condition.table.w": wte(np.asarray([vocabulary])),
        "positions": source("transformer.wpe.weight"),
        "output": source("lm_head.weight", layout=LINEAR),
        **layers({"norm": "transformer.ln_f"}, biases=False),
        **layers({"blocks.attention_norm": f"{layer}ln_1", "blocks.mlp_norm": f"{layer}ln_2"}, biases=False),
        **layers({"blocks.attention.out": f"{layer}attn.c_proj"}),
        **layers({"blocks.mlp.into": f"{layer}mlp.c_fc", "blocks.mlp.out": f"{layer}mlp.c_proj"}),
        **{
            f"blocks.attention.qkv.{ours}": source(
                f"{layer}attn.c_attn.{end}", layout=f"{d}(a n h) -> {d}(n a h)", a=3, h=head
            )
            for ours, (end, d) in qkv.items()
        },
    }


def clusters(folder: Path) -> Tensors | None:
    """The clusters (n, 3) of a folder, colours in [-1, 1]: of its preprocessor_config.json, or of OpenAI's
    kmeans_centers.npy; None without both. Errors: ValueError for a table of another shape."""
    if (folder / "preprocessor_config.json").is_file():
        found = huggingface.settings(folder / "preprocessor_config.json")["clusters"]
    elif (folder / "kmeans_centers.npy").is_file():
        found = np.load(folder / "kmeans_centers.npy", allow_pickle=False)
    else:
        return None
    table = np.asarray(found, np.float32)
    if table.ndim != 2 or table.shape[1] != 3:
        raise ValueError(f"{folder}: clusters of shape {table.shape}; a row of three numbers for each colour is wanted")
    return {CLUSTERS: table}
