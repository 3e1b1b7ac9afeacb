"""Names of LlamaGen's next-token models (Sun et al. 2024), class- or caption-conditional, and their configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

from t2i_jax.interop.names import LINEAR, Table, source, to_ours
from t2i_jax.interop.torchfile import read_torch
from t2i_jax.nn.condition import Classes, Features

WRAPPERS = ("model", "module", "state_dict", "ema")
UNUSED = r"freqs_cis|causal_mask|kv_cache"


HEAD_DIM = {3200: 100, 4096: 128}  # by width; 64 elsewhere


def load(
    family: Callable[..., Any], path: str | os.PathLike, grid: tuple[int, int], head_dim: int = 0
) -> tuple[Any, Any]:
    """The configuration, a `family` (`models.ar.AR`), and the model of a released file (.pt or .safetensors).

    The file does not know the grid of codes: (16, 16) for 256 pixels, (24, 24) for 384, (32, 32) for 512; nor the size
    of a head where the shape is not a released one. Errors: ValueError that lists what does not fit.
    """
    tensors: Any = load_file(path) if Path(path).suffix == ".safetensors" else read_torch(path, unknown="stand-in")
    tensors = next((tensors[name] for name in WRAPPERS if name in tensors), tensors)
    config = family(**describe(tensors, grid, head_dim))
    model = jax.eval_shape(config.init, jax.random.key(0))
    return config, jax.tree.map(jnp.asarray, to_ours(model, tensors, table(config), UNUSED, str(path)))


def describe(tensors: Mapping[str, Any], grid: tuple[int, int], head_dim: int = 0) -> dict[str, Any]:
    """The fields of the family's configuration that the shapes of `tensors` (arrays or abstract) belong to."""
    if "tok_embeddings.weight" not in tensors:
        raise ValueError(
            f"no tok_embeddings.weight among {len(tensors)} names: this is no next-token model of LlamaGen"
        )
    vocabulary, width = tensors["tok_embeddings.weight"].shape
    if "cls_embedding.embedding_table.weight" in tensors:
        condition = Classes(tensors["cls_embedding.embedding_table.weight"].shape[0] - 1)
    else:
        length, dim = tensors["cls_embedding.uncond_embedding"].shape
        condition = Features(dim, length, trained_null=False, left=True, null_keeps_mask=True)
    return {
        "vocabulary": vocabulary,
        "grid": grid,
        "width": width,
        "depth": sum(name.endswith(".attention.wo.weight") for name in tensors),
        "heads": width // (head_dim or HEAD_DIM.get(width, 64)),
        "mlp": tensors["layers.0.feed_forward.w1.weight"].shape[0],
        "condition": condition,
        "zero_output": True,
        "prefix_rotary": "zero",
    }


def table(config: Any) -> Table:
    """LlamaGen's names for a `models.ar.AR` with as many key-value heads as heads."""
    layer = "layers.{}."
    lines = {
        "tokens.w": source("tok_embeddings.weight"),
        "norm.w": source("norm.weight"),
        "output": source("output.weight", layout=LINEAR),
        "blocks.attention_norm.w": source(f"{layer}attention_norm.weight"),
        "blocks.attention.qkv.w": source(
            f"{layer}attention.wqkv.weight", layout="(a n h) d -> d (n a h)", a=3, h=config.layer.head
        ),
        "blocks.attention.out.w": source(f"{layer}attention.wo.weight", layout=LINEAR),
        "blocks.mlp_norm.w": source(f"{layer}ffn_norm.weight"),
    }
    for ours, theirs in {"gate": "w1", "into": "w3", "out": "w2"}.items():
        lines[f"blocks.mlp.{ours}.w"] = source(f"{layer}feed_forward.{theirs}.weight", layout=LINEAR)
    if isinstance(config.condition, Classes):
        return lines | {"condition.table.w": source("cls_embedding.embedding_table.weight")}
    return lines | {
        "condition.null": source("cls_embedding.uncond_embedding"),
        "condition.into.w": source("cls_embedding.cap_proj.fc1.weight", layout=LINEAR),
        "condition.out.w": source("cls_embedding.cap_proj.fc2.weight", layout=LINEAR),
    }
