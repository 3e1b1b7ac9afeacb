"""Names of minGPT as taming-transformers trains it on codes (Esser et al. 2021), and its configuration."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from t2i_jax.interop.names import LINEAR, Fields, Source, Table, Tensors, by_head, layers, require, source
from t2i_jax.nn.positions import LearnedPositions

NEEDED = ("tok_emb.weight", "blocks.0.attn.key.weight")
"""Names that every such file has."""
UNUSED = r"attn\.mask$"
PART = "transformer."
"""its prefix in a checkpoint that also holds the codecs"""
HEADS = {1664: 16}
"""by width, of released models; heads of 64 elsewhere"""


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


def table(head: int, output_bias: bool) -> Table:
    """minGPT's names for a `models.ar.AR` with heads of this size."""
    layer = "blocks.{}."
    qkv = by_head("blocks.attention.qkv", [f"{layer}attn.{name}." for name in ("query", "key", "value")], h=head)
    linears = {"attention.out": f"{layer}attn.proj", "mlp.into": f"{layer}mlp.0", "mlp.out": f"{layer}mlp.2"}
    norms = {"norm": "ln_f", "blocks.attention_norm": f"{layer}ln1", "blocks.mlp_norm": f"{layer}ln2"}
    return qkv | around(linears, norms, output_bias)


def around(linears: Mapping[str, str], norms: Mapping[str, str], output_bias: bool) -> dict[str, Source]:
    """Lines of such GPTs for all but queries, keys and values; linears (of blocks), norms: their names by ours."""
    return {
        "tokens.w": source("tok_emb.weight"),
        "positions": source("pos_emb", layout="1 t d -> t d"),
        "output": source("head.weight", layout=LINEAR),
        **layers({f"blocks.{ours}": theirs for ours, theirs in linears.items()}, LINEAR),
        **layers(norms),
        **({"output_bias": source("head.bias")} if output_bias else {}),
    }


def buffers(positions: int, depth: int, bidirectional_prefix: int) -> dict[str, np.ndarray]:
    """The masks (positions, positions) that minGPT saves with its weights, one a layer."""
    mask = np.tril(np.ones((positions, positions), np.float32))
    mask[:bidirectional_prefix, :bidirectional_prefix] = 1
    return {f"blocks.{n}.attn.mask": mask[None, None] for n in range(depth)}
