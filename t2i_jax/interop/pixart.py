"""Names of PixArt's Transformers in diffusers (Chen et al. 2024: alpha, Sigma), and sizes by shapes and settings."""

from __future__ import annotations

import math

from t2i_jax.interop import huggingface
from t2i_jax.interop.names import LINEAR, Fields, Table, Tensors, by_head, layers, require, source
from t2i_jax.networks.dit import DiT

PLACES = "pos_embed.pos_embed"
"""Where older files keep the positions; newer ones leave them out."""
NEEDED = ("pos_embed.proj.weight", "adaln_single.linear.weight", "caption_projection.linear_1.weight")
"""Names that every such file has."""
ONLY = {
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_single",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "attention_type": ("default",),
}
"""Fields of config.json for which only these values are supported."""
BLOCK = "transformer_blocks.{}."
PARTS = {
    "time.into": "adaln_single.emb.timestep_embedder.linear_1",
    "time.out": "adaln_single.emb.timestep_embedder.linear_2",
    "shared": "adaln_single.linear",
    "condition.into": "caption_projection.linear_1",
    "condition.out": "caption_projection.linear_2",
    "out": "proj_out",
    "blocks.image.attention.out": f"{BLOCK}attn1.to_out.0",
    "blocks.image.mlp.into": f"{BLOCK}ff.net.0.proj",
    "blocks.image.mlp.out": f"{BLOCK}ff.net.2",
    "blocks.cross.q": f"{BLOCK}attn2.to_q",
    "blocks.cross.out": f"{BLOCK}attn2.to_out.0",
}


def describe(tensors: Tensors) -> Fields:
    """The sizes given by the shapes of `tensors` (arrays or abstract), as fields of the network, and `dim` of the text.

    Errors: ValueError where the names are not those of such a model.
    """
    require(tensors, NEEDED, "no Transformer of PixArt in diffusers")
    if "adaln_single.emb.resolution_embedder.linear_1.weight" in tensors:
        raise ValueError(
            "adaln_single.emb.resolution_embedder: models conditioned on the size of the image "
            "(use_additional_conditions) cannot be read"
        )
    shape = lambda name: tuple(tensors[name].shape)
    width, channels, patch, _ = shape("pos_embed.proj.weight")
    return {
        "channels": channels,
        "patch": patch,
        "width": width,
        "depth": sum(name.endswith(".attn2.to_q.weight") for name in tensors),
        "mlp": shape("transformer_blocks.0.ff.net.0.proj.weight")[0],
        "frequency_dim": shape("adaln_single.emb.timestep_embedder.linear_1.weight")[1],
        "learn_variance": shape("proj_out.weight")[0] == 2 * channels * patch**2,
        "dim": shape("caption_projection.linear_1.weight")[1],
    }


def settings(config: Fields) -> Fields:
    """Fields that `transformer/config.json` has and the shapes have not: `heads`, `size`, `stretch`, `eps`.

    Errors: ValueError naming a field with an unsupported value.
    """
    huggingface.check_supported(config, ONLY, "transformer/config.json")
    side = config.get("sample_size", 128)
    return {
        "heads": config.get("num_attention_heads", 16),
        "size": (side, side),
        "stretch": float(config.get("interpolation_scale") or max(side // 64, 1)),
        "eps": config.get("norm_eps", 1e-6),
    }


def side_of(tensors: Tensors, patch: int) -> int:
    """Side of the latents, where a file keeps the positions; 0 where it does not."""
    return patch * math.isqrt(tensors[PLACES].shape[1]) if PLACES in tensors else 0


def table(network: DiT) -> Table:
    """PixArt's names for a `networks.dit.DiT` with cross-attention and shared modulation."""
    p, h = network.patch, network.transformer.head_size
    return {
        "embed.w": source("pos_embed.proj.weight", layout="d c p q -> (p q c) d", p=p, q=p),
        "embed.b": source("pos_embed.proj.bias"),
        "positions": source(PLACES, layout="1 t d -> t d"),
        "table": source("scale_shift_table"),
        "condition.null": source("null_features"),
        "blocks.image.table": source(f"{BLOCK}scale_shift_table"),
        **by_head("blocks.image.attention.qkv", [f"{BLOCK}attn1.to_{x}." for x in "qkv"], h=h),
        **by_head("blocks.cross.kv", [f"{BLOCK}attn2.to_{x}." for x in "kv"], h=h),
        **layers(PARTS, LINEAR),
    }
