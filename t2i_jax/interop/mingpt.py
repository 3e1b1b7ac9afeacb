"""Names of minGPT as taming-transformers trains it on codes (Esser et al. 2021), and its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from t2i_jax.interop.names import LINEAR, Fields, Source, Table, Tensors, require, source
from t2i_jax.nn.positions import LearnedPositions

NEEDED = ("tok_emb.weight", "blocks.0.attn.key.weight")
"""Names that every such file has."""
UNUSED = r"attn\.mask$"
PART = "transformer."
"""its prefix in a checkpoint that also holds the codecs"""
HEADS = {1664: 16}
"""by width, of released models; heads of 64 elsewhere"""
KINDS = {"weight": " d", "bias": ""}
"""suffix of a name, and its dimensions besides the output's"""


def describe(tensors: Tensors, heads: int = 0) -> Fields:
    """The fields of the family's configuration that the shapes of `tensors` (arrays or abstract) belong to."""
    require(tensors, NEEDED, "no minGPT")
    return sizes(tensors, "attn.key.weight", "mlp.0.weight", heads)


def sizes(tensors: Tensors, once: str, into: str, heads: int) -> Fields:
    """Fields of a GPT of that kind. once: a name that each block has; into: that of the first matrix of its MLP."""
    vocabulary, width = tensors["tok_emb.weight"].shape
    return {
        "vocabulary": vocabulary,
        "width": width,
        "depth": sum(name.endswith(f".{once}") for name in tensors),
        "heads": heads or HEADS.get(width, max(width // 64, 1)),
        "mlp": next(tensor for name, tensor in tensors.items() if name.endswith(f"0.{into}")).shape[0],
        "output_bias": "head.bias" in tensors,
        "positions": LearnedPositions(tensors["pos_emb"].shape[1]),
    }


def table(config: Any) -> Table:
    """minGPT's names for a `models.ar.AR`."""
    layer, three = "blocks.{}.", [f"blocks.{{}}.attn.{name}." for name in ("query", "key", "value")]
    linears = {"attention.out": "attn.proj", "mlp.into": "mlp.0", "mlp.out": "mlp.2"}
    norms = {"norm": "ln_f", "blocks.attention_norm": f"{layer}ln1", "blocks.mlp_norm": f"{layer}ln2"}
    return around(config, layer, linears, norms) | {
        f"blocks.attention.qkv.{kind[0]}": source(
            *(f"{name}{kind}" for name in three), layout=f"a (n h){d} ->{d} (n a h)", h=config.transformer.head_size
        )
        for kind, d in KINDS.items()
    }


def around(config: Any, layer: str, linears: Mapping[str, str], norms: Mapping[str, str]) -> dict[str, Source]:
    """Lines of such GPTs for all but queries, keys and values; linears, norms: their names by ours."""
    lines = {
        "tokens.w": source("tok_emb.weight"),
        "positions": source("pos_emb", layout="1 t d -> t d"),
        "output": source("head.weight", layout=LINEAR),
    }
    for ours, theirs in linears.items():
        lines[f"blocks.{ours}.w"] = source(f"{layer}{theirs}.weight", layout=LINEAR)
        lines[f"blocks.{ours}.b"] = source(f"{layer}{theirs}.bias")
    for ours, theirs in norms.items():
        lines |= {f"{ours}.w": source(f"{theirs}.weight"), f"{ours}.b": source(f"{theirs}.bias")}
    return lines | ({"output_bias": source("head.bias")} if config.output_bias else {})


def buffers(config: Any) -> dict[str, np.ndarray]:
    """The masks that minGPT saves with its weights, one a layer."""
    mask = np.tril(np.ones((config.positions.count,) * 2, np.float32))
    mask[: config.bidirectional_prefix, : config.bidirectional_prefix] = 1
    return {f"blocks.{n}.attn.mask": mask[None, None] for n in range(config.transformer.depth)}
