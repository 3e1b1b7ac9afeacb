"""Names of minGPT as taming-transformers trains it on codes (Esser et al. 2021), and its configuration."""

from __future__ import annotations

from typing import Any

import numpy as np

from t2i_jax.interop.names import LINEAR, Table, Tensors, source

UNUSED = r"attn\.mask$"
PART = "transformer."
"""where it lies in a checkpoint that also holds the codecs"""
HEADS = {1664: 16}
"""by width, of released models; heads of 64 elsewhere"""


def describe(tensors: Tensors, heads: int = 0) -> dict[str, Any]:
    """The fields of the family's configuration that the shapes of `tensors` (arrays or abstract) belong to."""
    if "tok_emb.weight" not in tensors or "blocks.0.attn.key.weight" not in tensors:
        raise ValueError(f"no tok_emb.weight or blocks.0.attn.key.weight among {len(tensors)} names: this is no minGPT")
    vocabulary, width = tensors["tok_emb.weight"].shape
    return {
        "vocabulary": vocabulary,
        "width": width,
        "depth": sum(name.endswith(".attn.key.weight") for name in tensors),
        "heads": heads or HEADS.get(width, max(width // 64, 1)),
        "mlp": tensors["blocks.0.mlp.0.weight"].shape[0],
        "activation": "gelu",
        "norm": "layer",
        "bias": True,
        "output_bias": "head.bias" in tensors,
        "positions": "learned",
        "position_rows": tensors["pos_emb"].shape[1],
    }


def table(config: Any) -> Table:
    """minGPT's names for a `models.ar.AR`."""
    layer, h = "blocks.{}.", config.layer.head
    projections = [f"{layer}attn.{name}" for name in ("query", "key", "value")]
    lines = {
        "tokens.w": source("tok_emb.weight"),
        "positions": source("pos_emb", layout="1 t d -> t d"),
        "norm.w": source("ln_f.weight"),
        "norm.b": source("ln_f.bias"),
        "output": source("head.weight", layout=LINEAR),
        "blocks.attention.qkv.w": source(
            *(f"{name}.weight" for name in projections), layout="a (n h) d -> d (n a h)", h=h
        ),
        "blocks.attention.qkv.b": source(*(f"{name}.bias" for name in projections), layout="a (n h) -> (n a h)", h=h),
    }
    for ours, theirs in {"attention.out": "attn.proj", "mlp.into": "mlp.0", "mlp.out": "mlp.2"}.items():
        lines[f"blocks.{ours}.w"] = source(f"{layer}{theirs}.weight", layout=LINEAR)
        lines[f"blocks.{ours}.b"] = source(f"{layer}{theirs}.bias")
    for ours, theirs in {"attention_norm": "ln1", "mlp_norm": "ln2"}.items():
        lines[f"blocks.{ours}.w"] = source(f"{layer}{theirs}.weight")
        lines[f"blocks.{ours}.b"] = source(f"{layer}{theirs}.bias")
    return lines | ({"output_bias": source("head.bias")} if config.output_bias else {})


def buffers(config: Any) -> dict[str, np.ndarray]:
    """The masks that minGPT keeps beside its weights, one a layer."""
    mask = np.tril(np.ones((config.position_rows, config.position_rows), np.float32))
    mask[: config.unmasked, : config.unmasked] = 1
    return {f"blocks.{n}.attn.mask": mask[None, None] for n in range(config.depth)}
