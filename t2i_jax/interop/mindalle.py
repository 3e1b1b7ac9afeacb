"""Names of minDALL-E's Transformer over text and image tokens (Kakao Brain 2021), and its configuration."""

from t2i_jax.interop.names import LINEAR, Fields, Table, Tensors, by_head, layers, require, source
from t2i_jax.nn.transformer import Transformer

NEEDED = ("tok_emb_txt.weight", "tok_emb_img.weight", "pos_emb_img.weight", "blocks.0.mlp.0.weight")
"""Names that every such file has."""


def describe(tensors: Tensors, heads: int = 0) -> Fields:
    """The fields of the family that the shapes of `tensors` (arrays or abstract) belong to; those of the text under
    `text`. The file does not record the number of heads; 0 gives each of them 64 channels."""
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


def table(transformer: Transformer) -> Table:
    """The published name and layout of each variable of a `models.stream.Stream`."""
    block, (qkv_bias, out_bias) = "blocks.{}.", transformer.biases
    qkv = [f"{block}attn.{name}." for name in ("query", "key", "value")]
    return {
        "text_tokens.w": source("tok_emb_txt.weight"),
        "image_tokens.w": source("tok_emb_img.weight"),
        "text_places": source("pos_emb_txt.weight"),
        "image_places": source("pos_emb_img.weight"),
        "text_head": source("head_txt.weight", layout=LINEAR),
        "image_head": source("head_img.weight", layout=LINEAR),
        **by_head("blocks.attention.qkv", qkv, biases=qkv_bias, n=transformer.heads),
        **layers({"blocks.attention.out": f"{block}attn.proj"}, LINEAR, out_bias),
        **layers({"blocks.mlp.into": f"{block}mlp.0", "blocks.mlp.out": f"{block}mlp.2"}, LINEAR, transformer.bias),
        **layers({"blocks.attention_norm": f"{block}ln1", "blocks.mlp_norm": f"{block}ln2", "norm": "ln_f"}),
    }
