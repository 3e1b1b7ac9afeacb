"""UNets of guided-diffusion's kind as diffusers keeps them, in guided-diffusion's own names."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from einops import rearrange

from t2i_jax.interop.names import Tensors, require

NEEDED = ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight")
"""Names that every such file has."""
WHOLE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "norm_cross": "norm_encoder", "to_out.0": "proj_out"}
JOINED = {"to_q": ("to_q", "to_k", "to_v"), "add_k_proj": ("add_k_proj", "add_v_proj")}
"""Matrices that are one of theirs, by the first of them."""


def unet(tensors: Tensors, head_dim: int) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a UNet in the names of guided-diffusion; those of no UNet keep their names.

    head_dim: width of a head of attention, 0 without attention. Errors: ValueError where it is none.
    """
    require(tensors, NEEDED, "no UNet of diffusers")
    stages = {way: _stages(tensors, way) for way in ("down", "up")}
    attends = {
        m[0] for m in (re.match(r"(down|up)_blocks\.\d+\.attentions|mid_block\.attentions", k) for k in tensors) if m
    }
    for name, x in tensors.items():
        m = re.match(
            r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.*)\.(\w+)$", name
        )
        if m is None:
            part, _, end = name.rpartition(".")
            yield f"{WHOLE.get(part, part)}.{end}", x
            continue
        way, level, kind, n, part, end = m[1], int(m[2] or 0), m[3], int(m[4]), m[5], m[6]
        there = f"{way}_blocks.{level}.attentions" if way else "mid_block.attentions"
        change, attention = kind.endswith("samplers"), kind == "attentions"
        if way == "down":
            place = f"input_blocks.{1 + stages[way][level] + level + (_count(tensors, way, level) if change else n)}"
            place = f"{place}.{int(attention)}"
        elif way == "up":
            after = 1 + (there in attends) if change else int(attention)
            place = f"output_blocks.{stages[way][level] + (_count(tensors, way, level) - 1 if change else n)}.{after}"
        else:
            place = f"middle_block.{1 if attention else n and 1 + (there in attends)}"
        if not attention:
            yield f"{place}.{BLOCK.get(part, part)}.{end}", x
        elif part in JOINED:
            whole = joined(tensors, name, (x.shape[0] // head_dim) if head_dim else 1)
            yield f"{place}.{'qkv' if part == 'to_q' else 'encoder_kv'}.{end}", _pointwise(whole)
        elif not any(part in several for several in JOINED.values()):
            yield f"{place}.{ATTENTION.get(part, part)}.{end}", _pointwise(x) if part == "to_out.0" else x


def joined(tensors: Tensors, name: str, heads: int) -> np.ndarray:
    """The matrices (or biases) of queries, keys and values, or of keys and values, as one, head by head; of queries
    alone where there are no others."""
    part, end = name.rsplit(".", 1)
    place, first = part.rpartition(".")[::2]
    names = [f"{place}.{other}.{end}" for other in JOINED[first]]
    several = [np.asarray(tensors[name]) for name in (names if names[1] in tensors else names[:1])]
    return rearrange(np.stack(several), "a (n h) ... -> (n a h) ...", n=heads)


def _count(tensors: Tensors, way: str, level: int) -> int:
    """Residual blocks of a level, without those that change the size."""
    pattern = rf"{way}_blocks\.{level}\.resnets\.(\d+)\."
    return len({m[1] for m in (re.match(pattern, name) for name in tensors) if m})


def _stages(tensors: Tensors, way: str) -> list[int]:
    """Residual blocks of the levels before each."""
    levels = len({m[1] for m in (re.match(rf"{way}_blocks\.(\d+)\.", name) for name in tensors) if m})
    counts = [_count(tensors, way, level) for level in range(levels)]
    return [sum(counts[:level]) for level in range(levels)]


def _pointwise(x: np.ndarray) -> np.ndarray:
    """A matrix as a convolution along one axis of positions; biases as they are."""
    return np.asarray(x)[..., None] if np.ndim(x) == 2 else x
