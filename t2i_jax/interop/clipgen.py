"""Names of CLIP-GEN's next-token model (Wang et al. 2022), whose layers are torch's encoder layers."""

from __future__ import annotations

import numpy as np

from t2i_jax.interop import mingpt
from t2i_jax.interop.names import LINEAR, Fields, Table, Tensors, by_head, layers, require
from t2i_jax.networks.condition import PooledFeatures

NEEDED = ("cond_proj.weight", "tok_emb.weight", "blocks.0.encoder.self_attn.in_proj_weight")
"""Names that every such file has."""
UNUSED = r"^blocks\.\d+\.mask$"


def describe(tensors: Tensors, heads: int = 0) -> Fields:
    """The fields of the family's configuration that the shapes of `tensors` (arrays or abstract) belong to.

    The number of heads does not follow: 0 makes heads of 64, as in released models.
    """
    require(tensors, NEEDED, "no CLIP-GEN model")
    found = mingpt.sizes(tensors, "self_attn.in_proj_weight", "encoder.linear1.weight", heads)
    return found | {"condition": PooledFeatures(tensors["cond_proj.weight"].shape[1])}


def table(head: int, output_bias: bool) -> Table:
    """CLIP-GEN's names for a `models.ar.AR` with heads of this size."""
    layer = "blocks.{}.encoder."
    linears = {"attention.out": "self_attn.out_proj", "mlp.into": "linear1", "mlp.out": "linear2"}
    norms = {"norm": "norm", "blocks.attention_norm": f"{layer}norm1", "blocks.mlp_norm": f"{layer}norm2"}
    lines = mingpt.around({ours: layer + theirs for ours, theirs in linears.items()}, norms, output_bias)
    qkv = by_head("blocks.attention.qkv", [f"{layer}self_attn.in_proj_"], "(a n h)", a=3, h=head)
    return lines | qkv | layers({"condition.out": "cond_proj"}, LINEAR)


def buffers(positions: int, depth: int) -> dict[str, np.ndarray]:
    """The masks (positions, positions) that CLIP-GEN saves with its weights, one a layer; True hides."""
    mask = ~np.tril(np.ones((positions, positions), bool))
    return {f"blocks.{n}.mask": mask for n in range(depth)}
