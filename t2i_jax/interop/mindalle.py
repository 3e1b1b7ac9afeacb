"""Names of minDALL-E's Transformer over text and image tokens (Kakao Brain 2021), and its configuration."""

from typing import Any

from t2i_jax.interop.names import LINEAR, Fields, Table, Tensors, require, source

NEEDED = ("tok_emb_txt.weight", "tok_emb_img.weight", "pos_emb_img.weight", "blocks.0.mlp.0.weight")
"""Names that every such file has."""


def describe(tensors: Tensors, heads: int = 0) -> Fields:
    """The fields of the family that the shapes of `tensors` (arrays or abstract) belong to; those of the text under
    `text`. The file does not know the number of heads; 0 gives each of them 64 channels."""
    require(tensors, NEEDED, "no Transformer of minDALL-E")
    vocabulary, width = tensors["tok_emb_img.weight"].shape
    length = tensors["pos_emb_img.weight"].shape[0]
    side = round(length**0.5)
    return {
        "vocabulary": vocabulary,
        "grid": (side, side) if side * side == length else (1, length),
        "text": {
            "vocabulary": tensors["tok_emb_txt.weight"].shape[0],
            "length": tensors["pos_emb_txt.weight"].shape[0],
        },
        "width": width,
        "depth": sum(name.endswith(".attn.proj.weight") for name in tensors),
        "heads": heads or width // 64,
        "mlp": tensors["blocks.0.mlp.0.weight"].shape[0],
        "bias": "blocks.0.mlp.0.bias" in tensors,
        "qkv_bias": "blocks.0.attn.query.bias" in tensors,
        "out_bias": "blocks.0.attn.proj.bias" in tensors,
    }


def table(config: Any) -> Table:
    """The published name and layout of each variable of a `models.stream.Stream`."""
    block, n = "blocks.{}.", config.transformer.heads
    qkv = [f"{block}attn.{name}." for name in ("query", "key", "value")]
    lines = {
        "text_tokens.w": source("tok_emb_txt.weight"),
        "image_tokens.w": source("tok_emb_img.weight"),
        "text_places": source("pos_emb_txt.weight"),
        "image_places": source("pos_emb_img.weight"),
        "text_head": source("head_txt.weight", layout=LINEAR),
        "image_head": source("head_img.weight", layout=LINEAR),
        "blocks.attention.qkv.w": source(*(f"{name}weight" for name in qkv), layout="a (n h) d -> d (n a h)", n=n),
    }
    qkv_bias, out_bias = config.transformer.biases
    if qkv_bias:
        biases = source(*(f"{name}bias" for name in qkv), layout="a (n h) -> (n a h)", n=n)
        lines["blocks.attention.qkv.b"] = biases
    linear = {"attention.out": ("attn.proj", out_bias)}
    linear |= {"mlp.into": ("mlp.0", config.transformer.bias), "mlp.out": ("mlp.2", config.transformer.bias)}
    for ours, (theirs, bias) in linear.items():
        lines[f"blocks.{ours}.w"] = source(f"{block}{theirs}.weight", layout=LINEAR)
        if bias:
            lines[f"blocks.{ours}.b"] = source(f"{block}{theirs}.bias")
    norms = {"blocks.attention_norm": f"{block}ln1", "blocks.mlp_norm": f"{block}ln2", "norm": "ln_f"}
    for ours, theirs in norms.items():
        lines |= {f"{ours}.w": source(f"{theirs}.weight"), f"{ours}.b": source(f"{theirs}.bias")}
    return lines
