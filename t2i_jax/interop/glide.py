"""Names of GLIDE's noise-aware CLIP (Nichol et al. 2022): its two files, under `clip_text.` and `clip_image.`."""

from __future__ import annotations

from t2i_jax.interop.names import LINEAR, Fields, Table, Tensors, layers, require, source

TEXT, IMAGE = "clip_text.blocks.", "clip_image.blocks."
LINEARS = {"q": "f_attn.f_q", "v": "f_attn.f_v", "out": "f_attn.f_c", "into": "f_mlp.f_1", "back": "f_mlp.f_2"}
"""Of a block, those with biases."""
WHOLE = f"{TEXT}input.w_voc", f"{IMAGE}input.patch_proj"
NEEDED = (WHOLE, ("blocks.input.w_voc",), ("blocks.input.patch_proj",))
"""Names that both files in one have, that of captions, and that of images."""


def describe(tensors: Tensors, head_dim: int = 64) -> Fields:
    """The sizes that follow from the shapes of `tensors` (arrays or abstract); the width of a head does not.

    Errors: ValueError where a name that every such file has is not there.
    """
    require(tensors, WHOLE, "no CLIP of GLIDE")
    shape = lambda name: tuple(tensors[name].shape)
    depth = lambda part: sum(name.startswith(part) and name.endswith("f_attn.f_q.w") for name in tensors)
    (vocabulary, text), (image, _, patch, _) = shape(f"{TEXT}input.w_voc"), shape(f"{IMAGE}input.patch_proj")
    return {
        "vocabulary": vocabulary,
        "length": shape(f"{TEXT}input.w_pos")[0],
        "text_width": text,
        "text_depth": depth(TEXT),
        "text_heads": text // head_dim,
        "size": patch * round((shape(f"{IMAGE}input.w_pos")[0] - 1) ** 0.5),
        "patch": patch,
        "image_width": image,
        "image_depth": depth(IMAGE),
        "image_heads": image // head_dim,
        "dim": shape(f"{TEXT}output.f.w")[0],
        "times": shape(f"{IMAGE}input.w_t")[0] if f"{IMAGE}input.w_t" in tensors else 0,
    }


def table(patch: int, timed: bool) -> Table:
    """GLIDE's names for a `models.noised_clip.NoisedCLIP`; timed: it reads the noise level of an image."""
    norms = {"image_norm": f"{IMAGE}input.ln"}
    linears, plain = {}, {}
    for ours, theirs in {"text": TEXT, "image": IMAGE}.items():
        block, place = f"{theirs}block_{{}}.", f"{ours}.blocks."
        norms |= {f"{ours}.norm": f"{theirs}output.ln"}
        norms |= {f"{place}attention_norm": f"{block}f_attn.ln", f"{place}mlp_norm": f"{block}f_mlp.ln"}
        plain |= {f"{ours}.out": f"{theirs}output.f", f"{place}k": f"{block}f_attn.f_k"}
        linears |= {place + part: block + name for part, name in LINEARS.items()}
    return {
        "table.w": source(f"{TEXT}input.w_voc"),
        "text_position": source(f"{TEXT}input.w_pos"),
        "patches.w": source(f"{IMAGE}input.patch_proj", layout="d c p q -> (p q c) d", p=patch, q=patch),
        "start": source(f"{IMAGE}input.{'w_t' if timed else 'pred_state'}"),
        "image_position": source(f"{IMAGE}input.w_pos"),
        **layers(norms, ends=("g", "b")),
        **layers(linears, LINEAR, ends=("w", "b")),
        **layers(plain, LINEAR, biases=False, ends=("w", "b")),
    }
