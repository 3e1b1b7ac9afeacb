"""Names of DALLE-pytorch: its Transformer over text and image tokens, its discrete VAE, and both in one file."""

from __future__ import annotations

import re

import numpy as np
from flax import nnx

from t2i_jax.core.params import named
from t2i_jax.interop.names import CONV, LINEAR, Fields, Source, Table, Tensors, by_head, layers, require, source
from t2i_jax.nn.transformer import Transformer

UNUSED = r"^vae\.|^transformer\.pos_emb$|mask$"
VAE_UNUSED = r"^(text_emb|image_emb|text_pos_emb|image_pos_emb|to_logits|transformer)\."
RENAMES = (
    (r"^(text|image)_emb\.linear\.", "to_logits.1."),
    (r"^image_pos_emb\.weights_(?=\d)", "image_pos_emb.weights."),
)
"""Files hold a matrix that input and output share under both names; and the older names of positions."""
NEEDED = (("to_logits.1.weight",), ("image_emb.linear.weight",), ("text_emb.linear.weight",))
"""Names of which every file of the Transformer has one."""
VAE_NEEDED = ("codebook.weight", "encoder.0.0.weight")
"""Names that every file of the dVAE has."""
VAE_RENAMES = ((r"^vae\.", ""),)
LAYER = "transformer.layers.layers.{}."


def describe_vae(tensors: Tensors) -> Fields:
    """Sizes that the shapes of `tensors` (arrays or abstract) belong to: codes, channels, layers, blocks, code."""
    require(tensors, VAE_NEEDED, "no dVAE of DALLE-pytorch")
    codes, code = tensors["codebook.weight"].shape
    count = lambda pattern: sum(re.fullmatch(rf"encoder\.{pattern}", name) is not None for name in tensors)
    return {
        "codes": codes,
        "code": code,
        "channels": tensors["encoder.0.0.weight"].shape[0],
        "layers": count(r"\d+\.0\.weight"),
        "blocks": count(r"\d+\.net\.0\.weight"),
    }


def vae_table(model: nnx.Module) -> Table:
    """The published name and layout of each variable of a `codecs.dvae.DVAE` with a `DALLEPytorchVAE` network."""
    names = named(model)
    layers = len({n for n in names if re.fullmatch(r"encoder\.layers\.\d+\.w", n)})
    blocks = len({n for n in names if re.fullmatch(r"encoder\.blocks\.\d+\.convs\.0\.w", n)})
    stem = 1 if blocks else 0
    # Both sides are plain sequences: layers, blocks, out; or stem, blocks, layers, out.
    place = {
        "encoder": {"layers": 0, "blocks": layers, "out": layers + blocks},
        "decoder": {"stem": 0, "blocks": stem, "layers": stem + blocks, "out": stem + blocks + layers},
    }

    def line(name: str) -> Source:
        if name == "codebook.w":
            return source("codebook.weight")
        side, part, *rest = name.removesuffix(".w").removesuffix(".b").split(".")
        number = place[side][part] + (int(rest[0]) if rest else 0)
        inside = {"layers": ".0", "blocks": f".net.{2 * int(rest[2])}" if len(rest) > 2 else ""}.get(part, "")
        transposed = side == "decoder" and part == "layers"
        layout = "c f i j -> i j c f" if transposed else CONV
        kind, layout = ("weight", layout) if name.endswith(".w") else ("bias", "")
        return source(f"{side}.{number}{inside}.{kind}", layout=layout)

    return {name: line(name) for name in names}


def describe(
    tensors: Tensors, heads: int = 8, grid: tuple[int, int] | None = None, text_length: int = 0, codes: int = 0
) -> Fields:
    """The fields of the family that the shapes of `tensors` (arrays or abstract) belong to; those of the text under
    `text`. The file does not record the number of heads. With rotary positions it records neither the grid nor the
    length of the text; with a shared matrix and without its dVAE, not the number of codes.

    Errors: ValueError that says what is missing.
    """
    require(tensors, NEEDED[0], "no Transformer of DALLE-pytorch")
    if any(name.startswith("transformer.layers.blocks.") for name in tensors):
        raise ValueError(
            "reversible=True: reversible layers of DALLE-pytorch are another network; only plain ones load"
        )
    total, width = tensors["to_logits.1.weight"].shape
    learned, tied = "text_pos_emb.weight" in tensors, "text_emb.weight" not in tensors
    if learned:
        text_length = tensors["text_pos_emb.weight"].shape[0] - 1
        grid = (tensors["image_pos_emb.weights.0"].shape[1], tensors["image_pos_emb.weights.1"].shape[2])
    if grid is None:
        raise ValueError("rotary_emb=True: the file does not record the grid of codes; give it as `grid`")
    if not text_length and "transformer.pos_emb" in tensors:
        text_length = tensors["transformer.pos_emb"].shape[1] - 1 - grid[0] * grid[1]
    if not text_length:
        raise ValueError("rotary_emb=True: the file does not record the length of the text; give it as `text_length`")
    if tied and not codes:
        if "vae.codebook.weight" not in tensors:
            raise ValueError(
                "share_input_output_emb=True: the file does not record the number of codes; give it as `codes`"
            )
        codes = tensors["vae.codebook.weight"].shape[0]
    rows = total - codes if tied else tensors["text_emb.weight"].shape[0]
    shift = f"{LAYER.format(0)}0.fn.fn.fn.fn.fn.to_qkv.weight" in tensors
    attention, mlp = (LAYER.format(0) + name for name in branches(shift))
    return {
        "vocabulary": total - rows,
        "grid": grid,
        "text": {"vocabulary": rows - text_length, "length": text_length, "start": True, "unique_padding": True},
        "width": width,
        "depth": sum(name.endswith(".to_qkv.weight") for name in tensors),
        "heads": heads,
        "head_dim": tensors[f"{attention}to_qkv.weight"].shape[0] // 3 // heads,
        "mlp": tensors[f"{mlp}net.3.weight"].shape[1],
        "activation": "geglu_exact",
        "qkv_bias": False,
        "sandwich_norm": f"{LAYER.format(0)}0.fn.norm_out.weight" in tensors,
        "layer_scale": True,
        "rope_values": not learned,
        "token_shift": shift,
        "positions": "axial" if learned else "rotary",
        "tied": tied,
        "output_bias": True,
    }


def branches(shift: bool) -> tuple[str, str]:
    """Prefix of the names of attention and MLP within a layer; token shift wraps both."""
    wrapped = "fn.fn." if shift else ""
    return f"0.fn.fn.fn.{wrapped}", f"1.fn.fn.{wrapped}"


def table(transformer: Transformer, words: int, codes: int, *, token_shift: bool, tied: bool, axial: bool) -> Table:
    """The published name and layout of each variable of a `models.stream.Stream`.

    words, codes: ids of text and of images; axial: learned positions of rows and columns.
    """
    rows, total, f = words, words + codes, transformer.mlp_dim
    text, image = {"rows": np.arange(rows), "height": total}, {"rows": np.arange(rows, total), "height": total}
    attention, mlp = (LAYER + name for name in branches(token_shift))
    linear = lambda name, **place: source(f"{name}.weight", layout=LINEAR, **place)
    lines = {
        "text_bias": source("to_logits.1.bias", **text),
        "image_bias": source("to_logits.1.bias", **image),
        **by_head(
            "blocks.attention.qkv", [f"{attention}to_qkv."], "(a n h)", biases=False, a=3, h=transformer.head_size
        ),
        **layers({"blocks.attention.out": f"{attention}to_out.0", "blocks.mlp.out": f"{mlp}net.3"}, LINEAR),
        "blocks.attention_scale": source(f"{LAYER}0.scale", layout="1 1 d -> d"),
        "blocks.mlp_scale": source(f"{LAYER}1.scale", layout="1 1 d -> d"),
    }
    for ours, half in {"into": np.arange(f), "gate": np.arange(f, 2 * f)}.items():  # the gated half is first
        place = {"rows": half, "height": 2 * f}
        lines[f"blocks.mlp.{ours}.w"] = linear(f"{mlp}net.0", **place)
        lines[f"blocks.mlp.{ours}.b"] = source(f"{mlp}net.0.bias", **place)
    norms = {"norm": "to_logits.0"}
    for n, branch in enumerate(("attention", "mlp")):
        norms[f"blocks.{branch}_norm"] = f"{LAYER}{n}.fn.norm"
        if transformer.sandwich_norm:
            norms[f"blocks.{branch}_out_norm"] = f"{LAYER}{n}.fn.norm_out"
    lines |= layers(norms)
    shared = {
        "text_tokens.w": source("to_logits.1.weight", **text),
        "image_tokens.w": source("to_logits.1.weight", **image),
    }
    apart = {
        "text_tokens.w": source("text_emb.weight"),
        "image_tokens.w": source("image_emb.weight"),
        "text_head": linear("to_logits.1", **text),
        "image_head": linear("to_logits.1", **image),
    }
    places = {
        "text_places": source("text_pos_emb.weight"),
        "row_places": source("image_pos_emb.weights.0", layout="1 h 1 d -> h d"),
        "column_places": source("image_pos_emb.weights.1", layout="1 1 w d -> w d"),
    }
    return {**lines, **(shared if tied else apart), **(places if axial else {})}
