"""Names of Karlo's unCLIP: its prior, its decoder and its two upsampling UNets (kakaobrain 2022)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flax import nnx

from t2i_jax.interop import adm
from t2i_jax.interop.names import LINEAR, Fields, Table, Tensors, below, layers, require, source, under
from t2i_jax.interop.tensorfile import content
from t2i_jax.interop.torchfile import is_tensor

MODEL = "model."
FIRST, LAST = "model_first_steps.", "model_last_step."
NULL = "null_features"
"""Features of an empty caption, which are in no published file."""
PRIOR_NEEDED = ("model.prd_emb", "model.positional_embedding", "model.clip_img_proj.weight", "model.out_proj.weight")
DECODER_NEEDED = ("model.cf_param", "model.clip_tok_proj.weight", "model.text_seq_proj.0.weight")
MEAN, STD = "clip_mean", "clip_std"
"""Statistics of embeddings, in a file of their own."""
PARTS = {"prior.": PRIOR_NEEDED, "decoder.": DECODER_NEEDED}
"""What goes before the names of each file where both are read together."""
WHOLE_NEEDED = (*(f"{part}{name}" for part, needed in PARTS.items() for name in needed), MEAN, STD)
UPSAMPLER_NEEDED = tuple(f"{part}{name}" for part in (FIRST, LAST) for name in adm.NEEDED)


def describe_prior(tensors: Tensors) -> Fields:
    """The sizes of the prior: `channels`, `words` of a caption, width, depth and kind of the Transformer."""
    require(tensors, PRIOR_NEEDED, "no prior of Karlo")
    length, width = tensors["model.positional_embedding"].shape[1:]
    blocks = "model.transformer.resblocks."
    return {
        "channels": tensors["model.clip_img_proj.weight"].shape[1],
        "words": length - 4,  # then the caption's embedding, the time, the image's embedding and the learned token
        "width": width,
        "depth": sum(name.startswith(blocks) and name.endswith(".ln_1.weight") for name in tensors),
        "mlp": tensors[f"{blocks}0.mlp.c_fc.weight"].shape[0],
        "final_norm": "model.final_ln.weight" in tensors,
    }


def prior_table(final_norm: bool, kept_null: bool) -> Table:
    """Karlo's names for a `networks.prior.EmbeddingPriorNetwork`."""
    linears = {
        "time.into": "time_embed.0",
        "time.out": "time_embed.2",
        "condition.tokens": "text_enc_proj",
        "condition.whole": "text_emb_proj",
        "embed": "clip_img_proj",
        "out": "out_proj",
    }
    blocks = {ours: theirs for ours, theirs in adm.TEXT.items() if ours.startswith("blocks.")}
    norms = {ours: theirs for ours, theirs in blocks.items() if ours.endswith("norm")}
    norms |= {"norm": "final_ln"} if final_norm else {}
    plain = {ours: theirs for ours, theirs in blocks.items() if not ours.endswith("norm")}
    lines = {
        "last": source("prd_emb", layout="1 1 d -> d"),
        "positions": source("positional_embedding", layout="1 t d -> t d"),
        **layers(linears | plain, LINEAR),
        **layers(norms),
    }
    return {**under(lines, theirs=MODEL), **_null(kept_null)}


def describe_decoder(tensors: Tensors, blocks: int = 0) -> tuple[Fields, Fields]:
    """The sizes of the decoder's UNet, and those of its condition: `dim`, `image_tokens` and `summary`."""
    require(tensors, DECODER_NEEDED, "no decoder of Karlo")
    own = below(tensors, MODEL)
    context, dim = own["text_seq_proj.0.weight"].shape
    condition: Fields = {
        "dim": dim,
        "image_tokens": own["clip_tok_proj.weight"].shape[0] // context,
        "summary": own["clip_emb.weight"].shape[0],
    }
    return {**adm.describe(own, blocks), "context": context}, condition


def decoder_table(model: nnx.Module, image_tokens: int, kept_null: bool) -> Table:
    """Karlo's names for a UNet with the condition `networks.unclip.ImageAndCaption`."""
    linears = {"tokens": "text_seq_proj.0", "image_whole": "clip_emb", "caption_whole": "text_feat_proj"}
    lines = {
        "null_image": source("cf_param"),
        # Numbers of all tokens are interleaved there, and each token is together here.
        "image_tokens.w": source("clip_tok_proj.weight", layout="(d n) k -> k (n d)", n=image_tokens),
        "image_tokens.b": source("clip_tok_proj.bias", layout="(d n) -> (n d)", n=image_tokens),
        **layers(linears, LINEAR),
        **layers({"norm": "text_seq_proj.1"}),
    }
    return {**under(adm.table(model, condition=under(lines, "condition.")), theirs=MODEL), **_null(kept_null)}


def whole_table(prior: Table | None, decoder: Table) -> Table:
    """Names for a `models.unclip.UnCLIPModel`, whose parts are read from several files; it may have no prior."""
    named = under(decoder, "decoder.", "decoder.")
    if prior is None:
        return named
    parts = under(prior, "prior.", "prior.") | named
    return {**parts, "mean": source(MEAN), "std": source(STD)}


def statistics(path: str | Path) -> Tensors:
    """Mean and standard deviation of embeddings in a published file, two rows.

    Errors: OSError; ValueError naming the file where it holds something else.
    """
    rows = content(path)
    if not (isinstance(rows, np.ndarray) or (isinstance(rows, list | tuple) and all(map(is_tensor, rows)))):
        raise ValueError(f"{path}: holds a {type(rows).__name__}; mean and standard deviation of embeddings are wanted")
    if len(rows) != 2 or np.ndim(rows[0]) != 1 or np.shape(rows[0]) != np.shape(rows[1]):
        raise ValueError(f"{path}: holds tensors of shapes {[np.shape(row) for row in rows]}; two vectors are wanted")
    return {MEAN: np.asarray(rows[0]), STD: np.asarray(rows[1])}


def describe_upsampler(tensors: Tensors, blocks: int = 0) -> Fields:
    """The sizes of the upsampler's UNets, which are alike."""
    require(tensors, UPSAMPLER_NEEDED, "no upsampler of Karlo")
    return adm.describe(below(tensors, FIRST), blocks)


def upsampler_table(first: nnx.Module, last: nnx.Module) -> Table:
    """Karlo's names for the two UNets of a `networks.unet.ExpertUNets`."""
    return {**under(adm.table(first), "first.", FIRST), **under(adm.table(last), "last.", LAST)}


def _null(kept: bool) -> Table:
    return {"condition.caption.encoded.null": source(NULL)} if kept else {}
