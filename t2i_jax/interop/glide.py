"""Names of GLIDE's noise-aware CLIP (Nichol et al. 2022): its two files, under `clip_text.` and `clip_image.`."""

from __future__ import annotations

from t2i_jax.interop.names import LINEAR, Fields, Source, Table, Tensors, layers, require, source

TEXT, IMAGE = "clip_text.blocks.", "clip_image.blocks."
LINEARS = {"attention.out": "f_attn.f_c", "mlp.into": "f_mlp.f_1", "mlp.out": "f_mlp.f_2"}
"""Of a block."""
WHOLE = f"{TEXT}input.w_voc", f"{IMAGE}input.patch_proj"
NEEDED = (WHOLE, ("blocks.input.w_voc",), ("blocks.input.patch_proj",))
"""Names that both files in one have, that of captions, and that of images."""


def describe(tensors: Tensors, head_dim: int = 64) -> Fields:
    """The sizes that follow from the shapes of `tensors` (arrays or abstract), of a `networks.clip.CLIPTowers`, and
    `text` and `image`: width, depth, heads; the width of a head does not follow.

    Errors: ValueError where a name that every such file has is not there.
    """
    require(tensors, WHOLE, "no CLIP of GLIDE")
    shape = lambda name: tuple(tensors[name].shape)
    depth = lambda part: sum(name.startswith(part) and name.endswith("f_attn.f_q.w") for name in tensors)
    tower = lambda part, width: {"width": width, "depth": depth(part), "heads": width // head_dim}
    (vocabulary, text), (image, _, patch, _) = shape(f"{TEXT}input.w_voc"), shape(f"{IMAGE}input.patch_proj")
    return {
        "text": tower(TEXT, text),
        "image": tower(IMAGE, image),
        "vocabulary": vocabulary,
        "length": shape(f"{TEXT}input.w_pos")[0],
        "size": patch * round((shape(f"{IMAGE}input.w_pos")[0] - 1) ** 0.5),
        "patch": patch,
        "dim": shape(f"{TEXT}output.f.w")[0],
        "times": shape(f"{IMAGE}input.w_t")[0] if f"{IMAGE}input.w_t" in tensors else 0,
    }


def table(text_head: int, image_head: int, timed: bool) -> Table:
    """GLIDE's names for a `models.clip.CLIP` whose towers have heads of these sizes; timed: it reads the noise
    level of an image. Keys have no bias, as softmax does not depend on it."""
    norms = {"image.before": f"{IMAGE}input.ln"}
    linears, outs, attention = {}, {}, {}
    for ours, theirs, head in (("text", TEXT, text_head), ("image", IMAGE, image_head)):
        block, place = f"{theirs}block_{{}}.", f"{ours}.blocks."
        norms |= {f"{ours}.norm": f"{theirs}output.ln"}
        norms |= {f"{place}attention_norm": f"{block}f_attn.ln", f"{place}mlp_norm": f"{block}f_mlp.ln"}
        outs |= {f"{ours}.out": f"{theirs}output.f"}
        linears |= {place + part: block + name for part, name in LINEARS.items()}
        w, b = (tuple(f"{block}f_attn.f_{part}.{end}" for part in "qkv") for end in "wb")
        attention[f"{place}attention.qkv.w"] = Source(w, "a (n h) d -> d (n a h)", {"h": head})
        attention[f"{place}attention.qkv.b"] = Source((b[0], "", b[2]), "a (n h) -> (n a h)", {"h": head})
    return {
        "text.words.w": source(f"{TEXT}input.w_voc"),
        "text.positions": source(f"{TEXT}input.w_pos"),
        "image.patches.w": source(f"{IMAGE}input.patch_proj", layout="d c p q -> p q c d"),
        "image.first": source(f"{IMAGE}input.{'w_t' if timed else 'pred_state'}"),
        "image.positions": source(f"{IMAGE}input.w_pos"),
        **layers(norms, ends=("g", "b")),
        **layers(linears, LINEAR, ends=("w", "b")),
        **layers(outs, LINEAR, biases=False, ends=("w", "b")),
        **attention,
    }
