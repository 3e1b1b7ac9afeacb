"""Names of Stable Diffusion 3's Transformers in diffusers (Esser et al. 2024), and sizes by shapes and settings."""

from __future__ import annotations

import math
from typing import TypeVar

import jax
import numpy as np

from t2i_jax.interop.names import LINEAR, Fields, Table, Tensors, by_head, layers, require, source
from t2i_jax.networks.condition import PooledAndTokenFeatures
from t2i_jax.networks.dit import DiT

PLACES = "pos_embed.pos_embed"
NEEDED = (PLACES, "context_embedder.weight", "transformer_blocks.0.attn.add_k_proj.weight")
"""Names that every such file has."""
BLOCK = "transformer_blocks.{}."
PARTS = {
    "time.into": "time_text_embed.timestep_embedder.linear_1",
    "time.out": "time_text_embed.timestep_embedder.linear_2",
    "condition.into": "time_text_embed.text_embedder.linear_1",
    "condition.out": "time_text_embed.text_embedder.linear_2",
    "condition.tokens": "context_embedder",
    "out": "proj_out",
}
STREAMS = {
    "image": {"modulation": "norm1.linear", "attention.out": "attn.to_out.0", "mlp": "ff"},
    "text": {"modulation": "norm1_context.linear", "attention.out": "attn.to_add_out", "mlp": "ff_context"},
}
QKV = {"image": "attn.to_{}", "text": "attn.add_{}_proj"}
NORMS = {"image": "attn.norm_{}", "text": "attn.norm_added_{}"}
A = TypeVar("A", np.ndarray, jax.ShapeDtypeStruct)


def describe(tensors: Tensors) -> Fields:
    """The sizes given by the shapes of `tensors` (arrays or abstract), as fields of the network, and `dim` and
    `summary` of the text. Errors: ValueError where the names are not those of such a model."""
    require(tensors, NEEDED, "no Transformer of Stable Diffusion 3")
    if any(".attn2." in name for name in tensors):
        raise ValueError("transformer_blocks.*.attn2: blocks that attend twice (dual_attention_layers) cannot be read")
    shape = lambda name: tuple(tensors[name].shape)
    width, channels, patch, _ = shape("pos_embed.proj.weight")
    return {
        "channels": channels,
        "patch": patch,
        "width": width,
        "depth": sum(name.endswith(".attn.to_q.weight") for name in tensors),
        "mlp": shape("transformer_blocks.0.ff.net.0.proj.weight")[0],
        "frequency_dim": shape("time_text_embed.timestep_embedder.linear_1.weight")[1],
        "qk_norm": "transformer_blocks.0.attn.norm_q.weight" in tensors,
        "dim": shape("context_embedder.weight")[1],
        "summary": shape("time_text_embed.text_embedder.linear_1.weight")[1],
    }


def settings(config: Fields) -> Fields:
    """Fields that `transformer/config.json` has and the shapes have not: `heads`, `size`."""
    side = config.get("sample_size", 128)
    return {"heads": config["num_attention_heads"], "size": (side, side)}


def completed(tensors: Tensors, grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """The tensors with positions of this grid alone, cut out of the middle, and a last block like the others.

    The text output of the last block is unused, so files leave it out, and have its scale before its shift.
    """
    side = math.isqrt(tensors[PLACES].shape[1])
    if max(grid) > side:
        raise ValueError(f"a grid of {grid} tokens, where {PLACES} has positions for {side} x {side}")
    whole = dict(tensors)
    depth = sum(name.endswith(".attn.to_q.weight") for name in tensors)
    last, first = BLOCK.format(depth - 1), BLOCK.format(0)
    top, left = ((side - n) // 2 for n in grid)
    rows = (np.arange(grid[0])[:, None] + top) * side + np.arange(grid[1]) + left
    whole[PLACES] = _rows(tensors[PLACES], 1, rows.reshape(-1))
    width = tensors["proj_out.weight"].shape[1]
    swapped = np.concatenate([np.arange(width, 2 * width), np.arange(width), np.full(4 * width, -1)])
    for end in ("weight", "bias"):
        name = f"{last}norm1_context.linear.{end}"
        if tensors[name].shape[0] == 2 * width:
            whole[name] = _rows(tensors[name], 0, swapped)
    for name in tensors:
        if name.startswith((f"{first}ff_context.", f"{first}attn.to_add_out.")):
            whole.setdefault(name.replace(first, last), _rows(tensors[name], 0, np.full(tensors[name].shape[0], -1)))
    return whole


def _rows(x: A, axis: int, rows: np.ndarray) -> A:
    """Rows of x along an axis, zeros where they are -1; x may be abstract."""
    shape = (*x.shape[:axis], len(rows), *x.shape[axis + 1 :])
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, x.dtype)
    known = (rows >= 0).reshape(-1, *(1,) * (x.ndim - axis - 1))
    return np.where(known, np.take(x, np.maximum(rows, 0), axis), np.zeros((), x.dtype))


def table(network: DiT) -> Table:
    """Stable Diffusion 3's names for a `networks.dit.DiT` with joint attention."""
    p, h, d = network.patch, network.transformer.head_size, network.transformer.width
    swapped = np.roll(np.arange(2 * d), d)  # their last norm has the scale first
    lines = {
        "embed.w": source("pos_embed.proj.weight", layout="d c p q -> (p q c) d", p=p, q=p),
        "embed.b": source("pos_embed.proj.bias"),
        "positions": source(PLACES, layout="1 t d -> t d"),
        "modulation.w": source("norm_out.linear.weight", layout=LINEAR, rows=swapped, height=2 * d),
        "modulation.b": source("norm_out.linear.bias", rows=swapped, height=2 * d),
    }
    if isinstance(text := network.conditioning.what, PooledAndTokenFeatures) and text.encoded.kept_null:
        lines["condition.encoded.null"] = source("null_features")
    parts = dict(PARTS)
    for stream, names in STREAMS.items():
        ours = f"blocks.{stream}."
        for part in ("modulation", "attention.out"):
            parts[ours + part] = BLOCK + names[part]
        parts |= {
            f"{ours}mlp.into": f"{BLOCK}{names['mlp']}.net.0.proj",
            f"{ours}mlp.out": f"{BLOCK}{names['mlp']}.net.2",
        }
        lines |= by_head(f"{ours}attention.qkv", [f"{BLOCK}{QKV[stream].format(x)}." for x in "qkv"], h=h)
        norms = {f"{ours}attention.{x}_norm": BLOCK + NORMS[stream].format(x) for x in "qk"}
        lines |= layers(norms, biases=False) if network.transformer.qk_norm else {}
    return lines | layers(parts, LINEAR)
