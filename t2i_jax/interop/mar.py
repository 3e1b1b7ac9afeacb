"""Names of MAR (Li et al. 2024) and sizes by their shapes."""

from __future__ import annotations

import math

from t2i_jax.interop.names import LINEAR, Fields, Table, Tensors, by_head, layers, require, source

HEADS = {1280: 16}  # by width; heads of 64 elsewhere
NEEDED = (
    "z_proj.weight",
    "encoder_pos_embed_learned",
    "diffusion_pos_embed_learned",
    "diffloss.net.input_proj.weight",
)
"""Names that every such file has."""
UNUSED = r"^diffloss\.(train|gen)_diffusion"


def describe(tensors: Tensors, grid: tuple[int, int] | None = None) -> Fields:
    """The sizes given by the shapes of `tensors` (arrays or abstract); `head` holds those of the diffusion head.

    Errors: ValueError where names are missing, or where the number of tokens is no square and no `grid` is given.
    """
    require(tensors, NEEDED, "no MAR")
    shape = lambda name: tuple(tensors[name].shape)
    length = shape("diffusion_pos_embed_learned")[1]
    side = math.isqrt(length)
    if grid is None and side**2 != length:
        raise ValueError(f"{length} tokens are no square: give their rows and columns as grid=")
    if grid is not None and math.prod(grid) != length:
        raise ValueError(f"grid {grid} has {math.prod(grid)} tokens, the file has {length}")
    count = lambda prefix: len({n.removeprefix(prefix).split(".")[0] for n in tensors if n.startswith(prefix)})
    sides = {}
    for part in ("encoder", "decoder"):
        inner, width = shape(f"{part}_blocks.0.mlp.fc1.weight")
        sides[part] = (width, count(f"{part}_blocks."), HEADS.get(width, max(width // 64, 1)), inner)
    names = ("width", "depth", "heads", "mlp")
    return {
        "grid": grid or (side, side),
        "classes": shape("class_emb.weight")[0],
        "buffer": shape("encoder_pos_embed_learned")[1] - length,
        "head": {
            "dim": shape("z_proj.weight")[1],
            "width": shape("diffloss.net.input_proj.weight")[0],
            "depth": count("diffloss.net.res_blocks."),
        },
        **{part: dict(zip(names, shape, strict=True)) for part, shape in sides.items()},
    }


def table(classes: int, encoder_heads: int, decoder_heads: int) -> Table:
    """MAR's names for a `models.masked.Masked` with a diffusion head."""
    lines = {
        "condition.table.w": source("class_emb.weight", "fake_latent", parts=(classes, 1)),
        "mask_token": source("mask_token", layout="1 1 d -> d"),
        "encoder_position": source("encoder_pos_embed_learned", layout="1 t d -> t d"),
        "decoder_position": source("decoder_pos_embed_learned", layout="1 t d -> t d"),
        "head_position": source("diffusion_pos_embed_learned", layout="1 t d -> t d"),
    }
    norms = {"entrance_norm": "z_proj_ln", "encoder_norm": "encoder_norm", "decoder_norm": "decoder_norm"}
    linears = {"entrance": "z_proj", "widen": "decoder_embed"}
    for part, heads in (("encoder", encoder_heads), ("decoder", decoder_heads)):
        block = f"{part}_blocks.{{}}"
        norms |= {f"{part}.attention_norm": f"{block}.norm1", f"{part}.mlp_norm": f"{block}.norm2"}
        parts = {"attention.out": "attn.proj", "mlp.into": "mlp.fc1", "mlp.out": "mlp.fc2"}
        linears |= {f"{part}.{ours}": f"{block}.{theirs}" for ours, theirs in parts.items()}
        lines |= by_head(f"{part}.attention.qkv", [f"{block}.attn.qkv."], "(a n h)", a=3, n=heads)
    net, block = "diffloss.net", "diffloss.net.res_blocks.{}"
    norms |= {"head.blocks.norm": f"{block}.in_ln"}
    linears |= {
        "head.time.into": f"{net}.time_embed.mlp.0",
        "head.time.out": f"{net}.time_embed.mlp.2",
        "head.condition": f"{net}.cond_embed",
        "head.into": f"{net}.input_proj",
        "head.blocks.into": f"{block}.mlp.0",
        "head.blocks.out": f"{block}.mlp.2",
        "head.blocks.modulation": f"{block}.adaLN_modulation.1",
        "head.modulation": f"{net}.final_layer.adaLN_modulation.1",
        "head.out": f"{net}.final_layer.linear",
    }
    return lines | layers(linears, LINEAR) | layers(norms)
