"""Karlo as diffusers keeps it, in Karlo's own names: prior, decoder with its `text_proj`, and upsampling UNets."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from einops import rearrange

from t2i_jax.interop.karlo import FIRST, LAST, MEAN, MODEL, STD
from t2i_jax.interop.names import Tensors, require

PRIOR_NEEDED = ("prd_embedding", "proj_to_clip_embeddings.weight", "transformer_blocks.0.attn1.to_q.weight")
UNET_NEEDED = ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight")
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
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_out.0": "proj_out"}
JOINED = {"to_q": ("to_q", "to_k", "to_v"), "add_k_proj": ("add_k_proj", "add_v_proj")}
"""Matrices that are one of Karlo's, by the first of them."""


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
            found[f"{MODEL}{place}attn.c_qkv.{end}"] = _joined(tensors, name, heads)
        elif part not in ("attn1.to_k", "attn1.to_v"):
            found[f"{MODEL}{place}{PRIOR.get(part, part)}.{end}"] = x
    return found


def decoder(unet: Tensors, projection: Tensors, head_dim: int) -> dict[str, np.ndarray]:
    """A `UNet2DConditionModel` and a `UnCLIPTextProjModel` in the names of Karlo's decoder."""
    require(projection, PROJECTION_NEEDED, "no text_proj of diffusers")
    found = {f"{MODEL}{k}": x for k, x in _unet(unet, head_dim)}
    for name, x in projection.items():
        part, _, end = name.rpartition(".")
        theirs = f"{PROJECTION.get(part, part)}.{end}" if part else "cf_param"
        found[f"{MODEL}{theirs}"] = x
    return found


def upsampler(first: Tensors, last: Tensors) -> dict[str, np.ndarray]:
    """Two `UNet2DModel` in the names of Karlo's upsampler."""
    return {f"{part}{k}": x for part, unet in {FIRST: first, LAST: last}.items() for k, x in _unet(unet, 0)}


def _unet(tensors: Tensors, head_dim: int) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a UNet in the names of guided-diffusion."""
    require(tensors, UNET_NEEDED, "no UNet of diffusers")
    blocks = len({m[0] for m in (re.match(r"down_blocks\.0\.resnets\.\d+\.", name) for name in tensors) if m})
    attends = {
        m[0] for m in (re.match(r"(down|up)_blocks\.\d+\.attentions|mid_block\.attentions", k) for k in tensors) if m
    }
    for name, x in tensors.items():
        m = re.match(
            r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.*)\.(\w+)$", name
        )
        if m is None:
            part, _, end = name.rpartition(".")
            yield f"{UNET.get(part, part)}.{end}", x
            continue
        way, level, kind, n, part, end = m[1], int(m[2] or 0), m[3], int(m[4]), m[5], m[6]
        there = f"{way}_blocks.{level}.attentions" if way else "mid_block.attentions"
        change, attention = kind.endswith("samplers"), kind == "attentions"
        if way == "down":
            place = f"input_blocks.{1 + level * (blocks + 1) + (blocks if change else n)}.{int(attention)}"
        elif way == "up":
            after = 1 + (there in attends) if change else int(attention)
            place = f"output_blocks.{level * (blocks + 1) + (blocks if change else n)}.{after}"
        else:
            place = f"middle_block.{1 if attention else n and 1 + (there in attends)}"
        if not attention:
            yield f"{place}.{BLOCK.get(part, part)}.{end}", x
        elif part in JOINED:
            joined = _joined(tensors, name, (x.shape[0] // head_dim) if head_dim else 1)
            yield f"{place}.{'qkv' if part == 'to_q' else 'encoder_kv'}.{end}", _pointwise(joined)
        elif not any(part in several for several in JOINED.values()):
            yield f"{place}.{ATTENTION.get(part, part)}.{end}", _pointwise(x) if part == "to_out.0" else x


def _joined(tensors: Tensors, name: str, heads: int) -> np.ndarray:
    """The matrices (or biases) of queries, keys and values, or of keys and values, as one, head by head."""
    part, end = name.rsplit(".", 1)
    place, first = part.rpartition(".")[::2]
    several = [np.asarray(tensors[f"{place}.{other}.{end}"]) for other in JOINED[first]]
    return rearrange(np.stack(several), "a (n h) ... -> (n a h) ...", n=heads)


def _pointwise(x: np.ndarray) -> np.ndarray:
    """A matrix as a convolution along one axis of positions; biases as they are."""
    return np.asarray(x)[..., None] if np.ndim(x) == 2 else x
