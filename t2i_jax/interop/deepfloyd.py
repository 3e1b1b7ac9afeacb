"""Names of the UNets of DeepFloyd IF (2023) and of the same in diffusers; fields from their shapes and settings."""

from __future__ import annotations

import numpy as np
from flax import nnx

from t2i_jax.interop import adm, adm_diffusers, huggingface
from t2i_jax.interop.names import LINEAR, Fields, Table, Tensors, layers, require, source, under

NEEDED = (*adm.NEEDED, "encoder_pooling.0.weight", "encoder_pooling.1.positional_embedding", "encoder_pooling.2.weight")
"""Names that every such file has."""
OF_DIFFUSERS = (*adm_diffusers.NEEDED, "add_embedding.norm1.weight", "add_embedding.pool.positional_embedding")
NULL = "null_features"
"""Features of an empty caption, which are in no published UNet."""
RENAMED = (
    ("class_embedding.linear_1.", "aug_proj.0."),
    ("class_embedding.linear_2.", "aug_proj.2."),
    ("encoder_hid_proj.", "encoder_proj."),
    ("add_embedding.norm1.", "encoder_pooling.0."),
    ("add_embedding.pool.", "encoder_pooling.1."),
    ("add_embedding.proj.", "encoder_pooling.2."),
    ("add_embedding.norm2.", "encoder_pooling.3."),
)
"""Beginnings of names in diffusers, and in the original, besides those of `adm_diffusers`."""
DOWN = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
UP = ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D")
ACTIVATIONS = {"gelu": "gelu", "silu": "silu", "swish": "silu"}

# Fields of config.json for which only these values are supported.
ONLY = {
    "center_input_sample": (False, None),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn",),
    "class_embed_type": ("timestep", None),
    "num_class_embeds": (None,),
    "addition_embed_type": ("text",),
    "encoder_hid_dim_type": ("text_proj", None),
    "resnet_time_scale_shift": ("scale_shift", "default"),
    "time_embedding_type": ("positional", None),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default", None),
    "class_embeddings_concat": (False, None),
    "cross_attention_norm": ("group_norm",),
    "dual_cross_attention": (False, None),
}


def describe(tensors: Tensors) -> tuple[Fields, Fields]:
    """The sizes of the UNet, and those of its condition: `dim`, `summary` and `projected`.

    Neither the width of a head follows, nor the side of an image, nor what `settings` gives.
    Errors: ValueError where the names are not those of such a model.
    """
    require(tensors, NEEDED, "no UNet of DeepFloyd IF")
    found = adm.describe(tensors)
    key = next(k for k in tensors if k.endswith(".encoder_kv.weight"))
    dim = tensors["encoder_pooling.1.positional_embedding"].shape[1]
    summary = tensors["encoder_pooling.2.weight"].shape[0]
    found |= {
        "context": tensors[key].shape[1],
        "time_width": 0 if summary == 4 * found["width"] else summary,
        "noise_aug_conditioning": "aug_proj.0.weight" in tensors,
    }
    return found, {"dim": dim, "summary": summary, "projected": "encoder_proj.weight" in tensors}


def table(model: nnx.Module, projected: bool, kept_null: bool) -> Table:
    """DeepFloyd's names for a UNet with the condition `networks.imagen.AttentionPooledFeatures`."""
    linears = {
        "q": "encoder_pooling.1.q_proj",
        "k": "encoder_pooling.1.k_proj",
        "v": "encoder_pooling.1.v_proj",
        "out": "encoder_pooling.2",
        **({"tokens": "encoder_proj"} if projected else {}),
    }
    lines = {
        "position": source("encoder_pooling.1.positional_embedding"),
        **layers(linears, LINEAR),
        **layers({"norm": "encoder_pooling.0", "out_norm": "encoder_pooling.3"}),
        **({"encoded.null": source(NULL)} if kept_null else {}),
    }
    return adm.table(model, condition=under(lines, "condition."))


def renamed(tensors: Tensors, head_dim: int) -> dict[str, np.ndarray]:
    """A `UNet2DConditionModel` of diffusers in the original's names; head_dim: width of a head of attention."""
    require(tensors, OF_DIFFUSERS, "no UNet of DeepFloyd IF in diffusers")
    found = {}
    for name, x in adm_diffusers.unet(tensors, head_dim):
        ours = next((theirs + name.removeprefix(start) for start, theirs in RENAMED if name.startswith(start)), name)
        found[ours] = x
    return found


def settings(config: Fields) -> Fields:
    """Hints that `unet/config.json` has and the shapes have not.

    Errors: ValueError naming a field with an unsupported value.
    """
    said = "unet/config.json"
    huggingface.check_supported(config, ONLY, said)
    for field, known in {"down_block_types": DOWN, "up_block_types": UP}.items():
        if odd := [kind for kind in config.get(field, ()) if kind not in known]:
            raise ValueError(f"{said}: {field} {odd[0]!r}; what can be read are {', '.join(known)}")
    act, embedding = config.get("act_fn", "silu"), config.get("time_embedding_act_fn")
    skips = bool(config.get("resnet_skip_time_act"))
    if act not in ACTIVATIONS or embedding not in (None, act) or (skips and embedding is None):
        raise ValueError(f"{said}: act_fn {act!r}, time_embedding_act_fn {embedding!r}, resnet_skip_time_act {skips}")
    heads = config.get("attention_head_dim", 8)
    if not isinstance(heads, int):
        raise ValueError(f"{said}: attention_head_dim {heads}; what can be read is one number")
    side = config.get("sample_size")
    return {
        "head_dim": heads,
        "pool_heads": config.get("addition_embed_type_num_heads", 64),
        "groups": config.get("norm_num_groups", 32),
        "eps": config.get("norm_eps", 1e-5),
        "activation": ACTIVATIONS[act],
        "activated_twice": embedding is not None and not skips,
        "residual_scale": 1 / config.get("resnet_out_scale_factor", 1.0),
        "middle_scale": 1 / config.get("mid_block_scale_factor", 1.0),
        **({} if side is None else {"size": side}),
    }
