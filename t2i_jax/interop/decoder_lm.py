"""Names of decoder language models in folders as Hugging Face lays them out: Llama, Qwen 2 and Qwen 3."""

import numpy as np

from t2i_jax.interop.names import LINEAR, Table, by_kv_head, layers, source

NEEDED = ("model.embed_tokens.weight",)
"""Names that every such file has."""
IGNORED = r"^lm_head\.|inv_freq$"
"""The head, and tables that are counted."""


def ignored(depth: int, last: bool) -> str:
    """Names that a model of `depth` layers does not use: head, further layers, and the last norm unless it is used."""
    used = "|".join(map(str, range(depth))) or "none"
    return IGNORED + rf"|^model\.layers\.(?!({used})\.)" + ("" if last else r"|^model\.norm\.")


def table(heads: int, kv_heads: int, head: int, *, bias: bool, out_bias: bool, qk_norm: bool, last: bool) -> Table:
    """The published names and layouts of the variables of a `t2i_jax.text.decoder_lm.Decoder`.

    Theirs turn dimension j of a head with j + h/2, ours neighbours; ours go by key-value head, each with its queries.
    last: the model has the norm after the last layer.
    """
    layer, n, m = "model.layers.{}.", heads, kv_heads
    turned = np.arange(head).reshape(2, -1).T.reshape(-1)
    blocks = np.arange((n + 2 * m) * head).reshape(-1, head)
    blocks[: n + m] = blocks[: n + m, turned]
    rows = by_kv_head(blocks, n, m)
    joined = {"rows": rows, "height": len(rows), "parts": (n * head, m * head, m * head)}
    names = [f"{layer}self_attn.{p}_proj" for p in "qkv"]
    lines = {
        "words.w": source("model.embed_tokens.weight"),
        "blocks.attention_norm.w": source(f"{layer}input_layernorm.weight"),
        "blocks.attention.qkv.w": source(*(f"{name}.weight" for name in names), layout=LINEAR, **joined),
        "blocks.mlp_norm.w": source(f"{layer}post_attention_layernorm.weight"),
    }
    lines |= layers({"blocks.attention.out": f"{layer}self_attn.o_proj"}, LINEAR, out_bias)
    mlp = {"gate": "gate_proj", "into": "up_proj", "out": "down_proj"}
    mlp = {f"blocks.mlp.{ours}": f"{layer}mlp.{theirs}" for ours, theirs in mlp.items()}
    lines |= layers(mlp, LINEAR, biases=False)
    if bias:
        lines["blocks.attention.qkv.b"] = source(*(f"{name}.bias" for name in names), **joined)
    for letter in "qk" if qk_norm else "":
        theirs = f"{layer}self_attn.{letter}_norm.weight"
        lines[f"blocks.attention.{letter}_norm.w"] = source(theirs, rows=turned, height=head)
    return lines | ({"norm.w": source("model.norm.weight")} if last else {})
