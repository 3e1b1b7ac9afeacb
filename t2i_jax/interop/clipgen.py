"""Names of CLIP-GEN's next-token model (Wang et al. 2022), whose layers are torch's encoder layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from t2i_jax.interop.names import LINEAR, Table, Tensors, source
from t2i_jax.nn.condition import Vector

UNUSED = r"^blocks\.\d+\.mask$"


def describe(tensors: Tensors, heads: int = 0) -> dict[str, Any]:
    """The fields of the family's configuration that the shapes of `tensors` (arrays or abstract) belong to.

    They do not tell the number of heads: 0 makes heads of 64, as released models have.
    """
    if "cond_proj.weight" not in tensors or "tok_emb.weight" not in tensors:
        raise ValueError(f"no cond_proj.weight or tok_emb.weight among {len(tensors)} names: this is no CLIP-GEN model")
    vocabulary, width = tensors["tok_emb.weight"].shape
    return {
        "vocabulary": vocabulary,
        "width": width,
        "depth": sum(name.endswith(".self_attn.in_proj_weight") for name in tensors),
        "heads": heads or max(width // 64, 1),
        "mlp": tensors["blocks.0.encoder.linear1.weight"].shape[0],
        "activation": "gelu",
        "norm": "layer",
        "bias": True,
        "output_bias": "head.bias" in tensors,
        "positions": "learned",
        "position_rows": tensors["pos_emb"].shape[1],
        "condition": Vector(tensors["cond_proj.weight"].shape[1]),
    }


def table(config: Any) -> Table:
    """CLIP-GEN's names for a `models.ar.AR`."""
    layer, sizes = "blocks.{}.encoder.", {"a": 3, "h": config.layer.head}
    lines = {
        "tokens.w": source("tok_emb.weight"),
        "positions": source("pos_emb", layout="1 t d -> t d"),
        "norm.w": source("norm.weight"),
        "norm.b": source("norm.bias"),
        "output": source("head.weight", layout=LINEAR),
        "condition.out.w": source("cond_proj.weight", layout=LINEAR),
        "condition.out.b": source("cond_proj.bias"),
        "blocks.attention.qkv.w": source(f"{layer}self_attn.in_proj_weight", layout="(a n h) d -> d (n a h)", **sizes),
        "blocks.attention.qkv.b": source(f"{layer}self_attn.in_proj_bias", layout="(a n h) -> (n a h)", **sizes),
    }
    for ours, theirs in {"attention.out": "self_attn.out_proj", "mlp.into": "linear1", "mlp.out": "linear2"}.items():
        lines[f"blocks.{ours}.w"] = source(f"{layer}{theirs}.weight", layout=LINEAR)
        lines[f"blocks.{ours}.b"] = source(f"{layer}{theirs}.bias")
    for ours, theirs in {"attention_norm": "norm1", "mlp_norm": "norm2"}.items():
        lines[f"blocks.{ours}.w"] = source(f"{layer}{theirs}.weight")
        lines[f"blocks.{ours}.b"] = source(f"{layer}{theirs}.bias")
    return lines | ({"output_bias": source("head.bias")} if config.output_bias else {})


def buffers(config: Any) -> dict[str, np.ndarray]:
    """The masks that CLIP-GEN keeps beside its weights, one a layer; True hides."""
    mask = ~np.tril(np.ones((config.position_rows, config.position_rows), bool))
    return {f"blocks.{n}.mask": mask for n in range(config.depth)}
