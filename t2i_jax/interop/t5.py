"""Names of T5's encoder (Raffel et al. 2020) in folders as Hugging Face lays them out."""

from collections.abc import Container

from t2i_jax.interop.names import LINEAR, Table, by_head, layers, source

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
    linears = {
        "blocks.attention.out": ATTENTION + "o",
        "blocks.mlp.into": MLP + ("wi_1" if gated else "wi"),
        "blocks.mlp.out": MLP + "wo",
        **({"blocks.mlp.gate": MLP + "wi_0"} if gated else {}),
    }
    norms = {"blocks.attention_norm": BLOCK + "0.layer_norm", "blocks.mlp_norm": BLOCK + "1.layer_norm"}
    return {
        "words.w": source(shared if shared in names else "encoder.embed_tokens.weight"),
        "relative": source(ATTENTION.format(0) + "relative_attention_bias.weight"),
        **by_head("blocks.attention.qkv", [f"{ATTENTION}{p}." for p in "qkv"], biases=False, h=head_dim),
        **layers(linears, LINEAR, biases=False),
        **layers(norms | {"norm": "encoder.final_layer_norm"}, biases=False),
    }
