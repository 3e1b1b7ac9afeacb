"""Karlo as diffusers keeps it, in Karlo's own names: prior, decoder with its `text_proj`, and upsampling UNets."""

from __future__ import annotations

import re

import numpy as np

from t2i_jax.interop import adm_diffusers
from t2i_jax.interop.karlo import FIRST, LAST, MEAN, MODEL, STD
from t2i_jax.interop.names import Tensors, require

PRIOR_NEEDED = ("prd_embedding", "proj_to_clip_embeddings.weight", "transformer_blocks.0.attn1.to_q.weight")
PROJECTION_NEEDED = ("learned_classifier_free_guidance_embeddings", "clip_extra_context_tokens_proj.weight")

PRIOR = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "proj_in": "clip_img_proj",
    "embedding_proj": "text_emb_proj",
    "encoder_hidden_states_proj": "text_enc_proj",
    "norm_out": "final_ln",
    "proj_to_clip_embeddings": "out_proj",
    "norm1": "ln_1",
    "norm3": "ln_2",
    "attn1.to_out.0": "attn.c_proj",
    "ff.net.0.proj": "mlp.c_fc",
    "ff.net.2": "mlp.c_proj",
}
ALONE = {"positional_embedding": "positional_embedding", "prd_embedding": "prd_emb"}
PROJECTION = {
    "embedding_proj": "text_feat_proj",
    "clip_image_embeddings_project_to_time_embeddings": "clip_emb",
    "clip_extra_context_tokens_proj": "clip_tok_proj",
    "encoder_hidden_states_proj": "text_seq_proj.0",
    "text_encoder_hidden_states_norm": "text_seq_proj.1",
}


def prior(tensors: Tensors, heads: int) -> dict[str, np.ndarray]:
    """A `PriorTransformer` in the names of Karlo's prior, with the statistics of embeddings."""
    require(tensors, PRIOR_NEEDED, "no prior of diffusers")
    found: dict[str, np.ndarray] = {}
    for name, x in tensors.items():
        block = re.match(r"transformer_blocks\.(\d+)\.", name)
        place, rest = (f"transformer.resblocks.{block[1]}.", name[block.end() :]) if block else ("", name)
        part, _, end = rest.rpartition(".")
        if name in ("clip_mean", "clip_std"):
            found[{"clip_mean": MEAN, "clip_std": STD}[name]] = x[0]
        elif name in ALONE:
            found[MODEL + ALONE[name]] = x
        elif part == "attn1.to_q":
            found[f"{MODEL}{place}attn.c_qkv.{end}"] = adm_diffusers.joined(tensors, name, heads)
        elif part not in ("attn1.to_k", "attn1.to_v"):
            found[f"{MODEL}{place}{PRIOR.get(part, part)}.{end}"] = x
    return found


def decoder(unet: Tensors, projection: Tensors, head_dim: int) -> dict[str, np.ndarray]:
    """A `UNet2DConditionModel` and a `UnCLIPTextProjModel` in the names of Karlo's decoder."""
    require(projection, PROJECTION_NEEDED, "no text_proj of diffusers")
    found = {f"{MODEL}{k}": x for k, x in adm_diffusers.unet(unet, head_dim)}
    for name, x in projection.items():
        part, _, end = name.rpartition(".")
        theirs = f"{PROJECTION.get(part, part)}.{end}" if part else "cf_param"
        found[f"{MODEL}{theirs}"] = x
    return found


def upsampler(first: Tensors, last: Tensors) -> dict[str, np.ndarray]:
    """Two `UNet2DModel` in the names of Karlo's upsampler."""
    return {
        f"{part}{k}": x for part, unet in {FIRST: first, LAST: last}.items() for k, x in adm_diffusers.unet(unet, 0)
    }
