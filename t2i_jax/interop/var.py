"""Names of VAR's next-scale Transformers (Tian et al. 2024), and sizes by their shapes."""

from __future__ import annotations

import numpy as np

from t2i_jax.interop.names import LINEAR, Fields, Source, Table, Tensors, by_head, layers, require, source

NEEDED = ("pos_start", "pos_1LC", "lvl_embed.weight", "blocks.0.attn.mat_qkv.weight")
"""Names that every such file has."""
UNUSED = r"^(lvl_1L|attn_bias_for_masking)$"
SCALES = {
    (10, 680): (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    (10, 2240): (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}
"""Sides of the maps of codes of released models, by how many there are and their codes in all."""
ORDER = (4, 2, 0, 5, 3, 1)
"""Where they have our shift, scale and gate of attention, and then of the MLP, among their six."""


def describe(tensors: Tensors, scales: tuple[int, ...] = (), heads: int = 0) -> Fields:
    """The sizes given by the shapes of `tensors` (arrays or abstract): `scales`, `codes` and `dim` of the quantiser,
    `classes`, and fields of the network.

    scales: (): those that the file's own table of levels says, or those of a released model of this length. heads: 0:
    as many as there are factors of attention, or one for 64 channels.
    Errors: ValueError where a name that every such file has is not there, and for scales that do not follow.
    """
    require(tensors, NEEDED, "no model of VAR")
    shape = lambda name: tuple(tensors[name].shape)
    count, length = shape("lvl_embed.weight")[0], shape("pos_1LC")[1]
    levels = tensors.get("lvl_1L")
    if not scales and isinstance(levels, np.ndarray):
        scales = tuple(int(n) for n in np.sqrt(np.bincount(levels.reshape(-1))))
    scales = tuple(scales) or SCALES.get((count, length), ())
    if (len(scales), sum(n * n for n in scales)) != (count, length):
        raise ValueError(f"{length} codes at {count} scales: give their sides, as --scales 1 2 3 4")
    width, dim = shape("word_embed.weight")
    factors = "blocks.0.attn.scale_mul_1H11"
    return {
        "scales": scales,
        "codes": shape("head.weight")[0],
        "dim": dim,
        "classes": shape("class_emb.weight")[0] - 1,
        "width": width,
        "depth": sum(name.endswith(".attn.mat_qkv.weight") for name in tensors),
        "heads": heads or (shape(factors)[1] if factors in tensors else width // 64),
        "mlp": shape("blocks.0.ffn.fc1.weight")[0],
        "cosine": factors in tensors,
        "shared": "shared_ada_lin.1.weight" in tensors,
    }


def table(heads: int, width: int, cosine: bool, shared: bool) -> Table:
    """VAR's names for a `models.var.VAR` that classes modulate."""
    ours, layer = "blocks.image.", "blocks.{}."
    linears = {
        f"{ours}attention.out": f"{layer}attn.proj",
        f"{ours}mlp.into": f"{layer}ffn.fc1",
        f"{ours}mlp.out": f"{layer}ffn.fc2",
        "embed": "word_embed",
        "output": "head",
    }
    biases = tuple(f"{layer}attn.{name}" for name in ("q_bias", "zero_k_bias", "v_bias"))
    six = "shared" if shared else f"{ours}modulation"
    lines = {
        **layers(linears, LINEAR),
        **by_head(f"{ours}attention.qkv", [f"{layer}attn.mat_qkv."], "(a n h)", biases=False, a=3, n=heads),
        f"{ours}attention.qkv.b": Source(biases, "a (n h) -> (n a h)", {"n": heads}),
        **_reordered(six, "shared_ada_lin.1" if shared else f"{layer}ada_lin.1", ORDER, width),
        **_reordered("modulation", "head_nm.ada_lin.1", (1, 0), width),
        "condition.table.w": source("class_emb.weight"),
        "start": source("pos_start", layout="1 t d -> t d"),
        "positions": source("pos_1LC", layout="1 t d -> t d"),
        "levels": source("lvl_embed.weight"),
    }
    if cosine:
        lines[f"{ours}attention.log_factor"] = source(f"{layer}attn.scale_mul_1H11", layout="1 n 1 1 -> n")
    if shared:
        rows = np.asarray(ORDER)
        lines[f"{ours}table"] = source(f"{layer}ada_gss", layout="1 1 n d -> n d", rows=rows, height=6, axis=2)
    return lines


def buffers(scales: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What the published program keeps besides the weights: the scale of each code, and the mask of attention."""
    levels = np.repeat(np.arange(len(scales)), np.square(scales))
    mask = np.where(levels[:, None] >= levels, 0, -np.inf).astype(np.float32)
    return {"lvl_1L": levels[None], "attn_bias_for_masking": mask[None, None]}


def _reordered(ours: str, theirs: str, order: tuple[int, ...], width: int) -> Table:
    """Lines of a matrix whose parts of `width` rows have another order there."""
    rows = np.concatenate([np.arange(width) + n * width for n in order])
    take = lambda name, layout: source(name, layout=layout, rows=rows, height=len(rows))
    return {f"{ours}.w": take(f"{theirs}.weight", LINEAR), f"{ours}.b": take(f"{theirs}.bias", "")}
