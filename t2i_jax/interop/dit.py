"""Names of DiT's diffusion Transformers (Peebles & Xie 2023), and sizes by their shapes."""

from __future__ import annotations

import math

from t2i_jax.interop.names import LINEAR, Fields, Table, Tensors, by_head, layers, require, source
from t2i_jax.networks.dit import DiT

NEEDED = ("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.mlp.fc1.weight")
"""Names that every such file has."""


def describe(tensors: Tensors, heads: int = 0) -> Fields:
    """The sizes given by the shapes of `tensors` (arrays or abstract), as fields of the network.

    The number of heads does not follow: `heads`, 0 for that of the released model of this width.
    Errors: ValueError where a name that every such file has is not there.
    """
    require(tensors, NEEDED, "no model of DiT")
    shape = lambda name: tuple(tensors[name].shape)
    width, channels, patch, _ = shape("x_embedder.proj.weight")
    places = shape("pos_embed")[1]
    side = patch * math.isqrt(places)
    return {
        "size": (side, side),
        "channels": channels,
        "patch": patch,
        "width": width,
        "depth": sum(name.endswith(".attn.proj.weight") for name in tensors),
        "heads": heads or (16 if width == 1152 else width // 64),
        "mlp": shape("blocks.0.mlp.fc1.weight")[0],
        "frequency_dim": shape("t_embedder.mlp.0.weight")[1],
        "classes": shape("y_embedder.embedding_table.weight")[0],
        "learn_variance": shape("final_layer.linear.weight")[0] == 2 * channels * patch**2,
    }


def table(network: DiT) -> Table:
    """DiT's names for a `networks.dit.DiT` that classes modulate."""
    linears = {
        "time.into": "t_embedder.mlp.0",
        "time.out": "t_embedder.mlp.2",
        "blocks.image.attention.out": "blocks.{}.attn.proj",
        "blocks.image.mlp.into": "blocks.{}.mlp.fc1",
        "blocks.image.mlp.out": "blocks.{}.mlp.fc2",
        "blocks.image.modulation": "blocks.{}.adaLN_modulation.1",
        "modulation": "final_layer.adaLN_modulation.1",
        "out": "final_layer.linear",
    }
    heads = network.transformer.heads
    return {
        "embed.w": source("x_embedder.proj.weight", layout="d c p q -> (p q c) d", p=network.patch, q=network.patch),
        "embed.b": source("x_embedder.proj.bias"),
        "positions": source("pos_embed", layout="1 t d -> t d"),
        "condition.table.w": source("y_embedder.embedding_table.weight"),
        **by_head("blocks.image.attention.qkv", ["blocks.{}.attn.qkv."], "(a n h)", a=3, n=heads),
        **layers(linears, LINEAR),
    }
