"""Names of T5's encoder (Raffel et al. 2020) in folders as Hugging Face lays them out."""

from collections.abc import Container

from t2i_jax.interop.names import LINEAR, Table, source

NEEDED = ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight")
"""Names that every such file has."""
IGNORED = r"^decoder\.|^lm_head\.|^shared\.|^encoder\.embed_tokens\."
"""The decoder, and the table of words under its other name."""
BLOCK = "encoder.block.{}.layer."
ATTENTION = BLOCK + "0.SelfAttention."
MLP = BLOCK + "1.DenseReluDense."


def table(names: Container[str], head_dim: int, gated: bool) -> Table:
    """The published names and layouts of the variables of `t2i_jax.text.t5.Encoder`.

    names: of the file, which has the word embeddings once or twice.
    """
    shared = "shared.weight"
    lines = {
        "words.w": source(shared if shared in names else "encoder.embed_tokens.weight"),
        "relative": source(ATTENTION.format(0) + "relative_attention_bias.weight"),
        "norm.w": source("encoder.final_layer_norm.weight"),
        "blocks.attention_norm.w": source(BLOCK + "0.layer_norm.weight"),
        "blocks.attention.qkv.w": source(
            *(f"{ATTENTION}{p}.weight" for p in "qkv"), layout="a (n h) d -> d (n a h)", h=head_dim
        ),
        "blocks.attention.out.w": source(ATTENTION + "o.weight", layout=LINEAR),
        "blocks.mlp_norm.w": source(BLOCK + "1.layer_norm.weight"),
        "blocks.mlp.into.w": source(MLP + ("wi_1" if gated else "wi") + ".weight", layout=LINEAR),
        "blocks.mlp.out.w": source(MLP + "wo.weight", layout=LINEAR),
    }
    if gated:
        lines["blocks.mlp.gate.w"] = source(MLP + "wi_0.weight", layout=LINEAR)
    return lines
