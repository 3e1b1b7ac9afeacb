"""Formats of unCLIP: Karlo's prior, decoder and upsampler."""

import dataclasses
import re
from pathlib import Path
from typing import cast

import numpy as np

from t2i_jax.convert import Format, ModelFolder, read
from t2i_jax.convert.diffusers import empty_caption, stable_diffusion_config, stable_diffusion_folder
from t2i_jax.convert.gaussian import network_of
from t2i_jax.core.family import with_fields
from t2i_jax.core.fields import values
from t2i_jax.core.params import abstract
from t2i_jax.interop import adm_diffusers, huggingface, karlo, stable_diffusion
from t2i_jax.interop import karlo_diffusers as published
from t2i_jax.interop.names import Fields, Table, Tensors, below, require
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.models.unclip import UnCLIP
from t2i_jax.networks.condition import Conditioning, CrossAttnFeatures
from t2i_jax.networks.prior import EmbeddingPrior
from t2i_jax.networks.unclip import CaptionAndTokens, ImageAndCaption
from t2i_jax.networks.unet import ExpertUNets, UNet
from t2i_jax.noise.processes import Discrete
from t2i_jax.sampling.options import DiffusionSampler, UnCLIPSampler
from t2i_jax.text.clip import ClipCaption, ClipImages, ClipText
from t2i_jax.text.clip_pair import CaptionsAndImages, ClipPair

COSINE = Discrete("cosine")
STABLE_NEEDED = (f"decoder.{stable_diffusion.IMAGE}",)


def _encoded(tensors: Tensors, dim: int, words: int) -> CrossAttnFeatures:
    """Features of a caption; those of an empty one are kept if a folder gives its text encoder."""
    return CrossAttnFeatures(dim, 1 + words, trained_null=False, kept_null=karlo.NULL in tensors)


def _prior(tensors: Tensors, *, heads: int = 0, null_tokens: int = 2, **fields: object) -> Diffusion:
    """heads: 0 for heads of width 64. null_tokens: tokens of an empty caption."""
    found = karlo.describe_prior(tensors)
    caption = CaptionAndTokens(_encoded(tensors, found["channels"], found.pop("words")), null_tokens)
    found |= {"heads": heads or found["width"] // 64, "conditioning": Conditioning(caption)}
    family: Fields = {
        "process": COSINE,
        "predicts": "x0",
        "variance": "fixed_small",
        "clip_range": 10.0,
        "sampling": DiffusionSampler(steps=25, guidance=4.0, clip=True),
    }
    return with_fields(Diffusion(with_fields(EmbeddingPrior(), **found)), **(family | fields))


def _decoder(
    tensors: Tensors,
    *,
    size: int = 0,
    blocks: int = 0,
    head_dim: int = 64,
    length: int = 77,
    null_tokens: int = 2,
    **fields: object,
) -> Diffusion:
    """size: side of an image; blocks: residual blocks a level; length: tokens of a caption; null_tokens: those of an
    empty one."""
    found, of = karlo.describe_decoder(tensors, blocks)
    encoded = _encoded(tensors, of.pop("dim"), length)
    found["size"] = (size, size) if size else found["size"]
    network = UNet(
        **found,
        head_dim=head_dim,
        pool="summary",
        conditioning=Conditioning(ImageAndCaption(encoded, null_tokens, **of)),
    )
    family: Fields = {
        "process": COSINE,
        "guided_channels": 3,
        "sampling": DiffusionSampler(steps=50, guidance=8.0, clip=True),
    }
    return with_fields(Diffusion(network), **(family | fields))


def _upsampler(tensors: Tensors, *, size: int = 256, blocks: int = 0, **fields: object) -> Diffusion:
    """size: side of an image; blocks: residual blocks a level."""
    found = karlo.describe_upsampler(tensors, blocks)
    found["size"] = (size, size)
    network = UNet(**found, conditioning=None, upscaling="cubic", last_times=1)
    family: Fields = {
        "process": COSINE,
        "variance": "fixed_small",
        "sampling": DiffusionSampler(steps=7, guidance=1.0, clip=True),
    }
    return with_fields(Diffusion(network), **(family | fields))


def _whole(
    tensors: Tensors,
    *,
    prior_heads: int = 0,
    size: int = 0,
    blocks: int = 0,
    head_dim: int = 64,
    null_tokens: int = 2,
    candidates: int = 1,
    clip_range: float = 10.0,
    **fields: object,
) -> UnCLIP:
    """prior_heads: 0 for heads of width 64. candidates: embeddings drawn for each image. clip_range: of the prior.
    fields: of both parts; the other hints are those of the decoder."""
    require(tensors, karlo.WHOLE_NEEDED, "no unCLIP of Karlo")
    own = {part: below(tensors, part) for part in karlo.PARTS}
    length = own["prior."]["model.positional_embedding"].shape[1] - 4
    shared: Fields = {"null_tokens": null_tokens, **fields}
    prior = _prior(own["prior."], heads=prior_heads, **{"clip_range": clip_range, **shared})
    hints: Fields = {"length": length, "size": size, "blocks": blocks, "head_dim": head_dim}
    decoder = _decoder(own["decoder."], **(hints | shared))
    options = dataclasses.replace(UnCLIPSampler(), **values(decoder.sampling))
    given = {"prior_steps": prior.sampling.steps, "prior_guidance": prior.sampling.guidance}
    sampling = dataclasses.replace(options, **given)
    return UnCLIP(prior, decoder, candidates, decoder.compute, sampling)


def _folder(path: Path) -> ModelFolder:
    """The files of a release: both parts, CLIP, which encodes captions, and statistics of embeddings; or a folder as
    diffusers lays it out, with the text tower of CLIP alone."""
    if (path / "prior").is_dir():
        return _diffusers(path)
    found = {what: _file(path, what, pattern) for what, pattern in FILES.items()}
    tensors: dict[str, np.ndarray] = {}
    for part, name in {"prior.": "karlo_prior", "decoder.": "karlo_decoder"}.items():
        tensors |= {f"{part}{k}": v for k, v in read(found[part.removesuffix(".")], name).items()}
    merges = path / "merges.txt"
    text = ClipCaption(str(found["CLIP"]), vocabulary=str(merges) if merges.is_file() else "")
    return ModelFolder(tensors | dict(karlo.statistics(found["statistics"])) | _nulls(text), {}, None, text)


def _nulls(text: ClipCaption) -> dict[str, np.ndarray]:
    """Features of an empty caption for both parts."""
    return dict.fromkeys((f"{part}{karlo.NULL}" for part in karlo.PARTS), empty_caption(text))


def _diffusers(path: Path) -> ModelFolder:
    of_decoder = huggingface.config(path / "decoder")
    read_part = lambda part, needed: dict(huggingface.Weights(path / part, needed))
    unet, projection = read_part("decoder", adm_diffusers.NEEDED), read_part("text_proj", published.PROJECTION_NEEDED)
    head_dim = of_decoder.get("attention_head_dim", 64)
    tensors, hints = _prior_of(path)
    tensors |= {f"decoder.{k}": v for k, v in published.decoder(unet, projection, head_dim).items()}
    text = _caption_text(path)
    hints |= {"head_dim": head_dim, "size": of_decoder.get("sample_size") or 0}
    return ModelFolder(tensors | _nulls(text), hints, None, text)


def _prior_of(path: Path) -> tuple[dict[str, np.ndarray], Fields]:
    """Prior and statistics of a folder of diffusers, and hints of it."""
    heads = huggingface.config(path / "prior").get("num_attention_heads", 32)
    scheduler = huggingface.settings(path / "prior_scheduler" / "scheduler_config.json")
    found = published.prior(dict(huggingface.Weights(path / "prior", published.PRIOR_NEEDED)), heads)
    tensors = {k if k in (karlo.MEAN, karlo.STD) else f"prior.{k}": v for k, v in found.items()}
    return tensors, {"prior_heads": heads, "clip_range": float(scheduler.get("clip_sample_range") or 5.0)}


def _caption_text(path: Path, which: str = "") -> ClipCaption:
    """The text encoder of a folder of diffusers, which has no tower of images."""
    merges = path / f"{which}tokenizer" / "merges.txt"
    vocabulary = str(merges) if merges.is_file() else ""
    return ClipCaption(str(path / f"{which}text_encoder"), vocabulary=vocabulary, images=False)


def _stable(
    tensors: Tensors,
    *,
    prior_heads: int = 0,
    null_tokens: int = 2,
    clip_range: float = 10.0,
    candidates: int = 1,
    **fields: object,
) -> UnCLIP:
    """prior_heads: 0 for heads of width 64. candidates: embeddings drawn for each image. clip_range: of the prior.
    fields: hints and fields of the decoder, as of stable-diffusion. Without a prior it makes variations of images."""
    of_prior, of_decoder = (below(tensors, part) for part in ("prior.", "decoder."))
    given: Fields = fields
    decoder, prior = stable_diffusion_config(of_decoder, **given), None
    if of_prior:
        prior = _prior(of_prior, heads=prior_heads, null_tokens=null_tokens, clip_range=clip_range)
    options = dataclasses.replace(UnCLIPSampler(), **values(decoder.sampling))
    sampling = dataclasses.replace(options, steps=20, guidance=10.0)
    return UnCLIP(prior, decoder, candidates, decoder.compute, sampling)


def _stable_table(config: UnCLIP) -> Table:
    decoder = cast(Diffusion, config.decoder)
    named = stable_diffusion.table(abstract(decoder), network_of(decoder, UNet))
    return karlo.whole_table(None if config.prior is None else _prior_table(cast(Diffusion, config.prior)), named)


def _stable_folder(path: Path) -> ModelFolder:
    """A folder of diffusers: a Stable Diffusion that reads embeddings of images, with a prior of them, or an encoder of
    images, or both."""
    whole, with_prior, with_images = (
        stable_diffusion_folder(path),
        *((path / part).is_dir() for part in ("prior", "image_encoder")),
    )
    if not isinstance(whole.text, ClipText) or stable_diffusion.IMAGE not in whole.tensors:
        raise ValueError(f"{path}: its UNet reads no embedding of an image, or there is no text encoder")
    if not with_prior and not with_images:
        raise ValueError(f"{path}: there is neither a prior of embeddings of images nor an image_encoder")
    tensors, hints = _prior_of(path) if with_prior else ({}, {})
    statistics = huggingface.Weights(path / "image_normalizer", ("mean", "std"))
    decoder = dict(whole.tensors) | {f"image_{name}": statistics[name] for name in ("mean", "std")}
    squared = stable_diffusion.squared(decoder, whole.hints.get("head_dim", 0) > 0)
    tensors |= {f"decoder.{k}": v for k, v in squared.items()}
    text: ClipText | ClipPair = whole.text
    if with_prior:
        text = ClipPair(_caption_text(path, "prior_"), whole.text)
        tensors[f"prior.{karlo.NULL}"] = empty_caption(text.prior)
    both = CaptionsAndImages(text, ClipImages(str(path / "image_encoder"))) if with_images else text
    return ModelFolder(tensors, hints | whole.hints, whole.codec, both)


def _upsampler_folder(path: Path) -> ModelFolder:
    """A folder as diffusers lays it out, with both UNets; or one with Karlo's file."""
    if not (path / "super_res_first").is_dir():
        return ModelFolder(read(path, "karlo_sr"), {})
    first, last = (
        dict(huggingface.Weights(path / part, adm_diffusers.NEEDED)) for part in ("super_res_first", "super_res_last")
    )
    side = huggingface.config(path / "super_res_first").get("sample_size") or 256
    return ModelFolder(published.upsampler(first, last), {"size": side})


FILES = {
    "prior": r"prior.*",
    "decoder": r"decoder.*",
    "CLIP": r"ViT-[^_]*",
    "statistics": r".*stats.*",
}
"""Regular expressions of the stems of the files of a folder."""


def _file(path: Path, what: str, pattern: str) -> Path:
    found = [file for file in sorted(path.iterdir()) if file.is_file() and re.fullmatch(pattern, file.stem)]
    if len(found) != 1:
        there = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"{path}: one file of the {what} is wanted, with a name as {pattern!r}; there is {there}")
    return found[0]


def _caption_of(config: Diffusion) -> CaptionAndTokens:
    """The condition of a prior or a decoder. Errors: ValueError for another."""
    if not isinstance(config.condition, CaptionAndTokens):
        raise ValueError(f"its condition is a {type(config.condition).__name__}, not that of unCLIP")
    return config.condition


def _prior_table(config: Diffusion) -> Table:
    prior = network_of(config, EmbeddingPrior)
    return karlo.prior_table(prior.final_norm, _caption_of(config).encoded.kept_null)


def _decoder_table(config: Diffusion) -> Table:
    network_of(config, UNet)
    condition = _caption_of(config)
    if not isinstance(condition, ImageAndCaption):
        raise ValueError("its condition has no embedding of an image")
    return karlo.decoder_table(abstract(config), condition.image_tokens, condition.encoded.kept_null)


def _upsampler_table(config: Diffusion) -> Table:
    if not network_of(config, UNet).last_times:
        raise ValueError("it has one UNet, where Karlo has two")
    model = cast(ExpertUNets, abstract(config))
    return karlo.upsampler_table(model.first, model.last)


def _whole_table(config: UnCLIP) -> Table:
    return karlo.whole_table(
        _prior_table(cast(Diffusion, config.prior)), _decoder_table(cast(Diffusion, config.decoder))
    )


FORMATS = {
    "karlo": Format(
        _whole,
        _whole_table,
        needed=(karlo.WHOLE_NEEDED,),
        folder=_folder,
        title="Karlo, an unCLIP: a folder with its prior, its decoder, CLIP ViT-L-14.pt and ViT-L-14_stats.th, or "
        "that of diffusers",
        example="karlo/",
    ),
    "stable-unclip": Format(
        _stable,
        _stable_table,
        needed=(STABLE_NEEDED,),
        folder=_stable_folder,
        title="Stable unCLIP as diffusers keeps it: Stable Diffusion 2.1 of embeddings of images, with Karlo's prior, "
        "or an encoder of images for variations of them",
        example="stable-diffusion-2-1-unclip/",
    ),
    "karlo_prior": Format(
        _prior,
        _prior_table,
        needed=(karlo.PRIOR_NEEDED,),
        title="the prior of Karlo, of embeddings of images",
        example="prior-ckpt-step=01000000-of-01000000.ckpt",
    ),
    "karlo_decoder": Format(
        _decoder,
        _decoder_table,
        needed=(karlo.DECODER_NEEDED,),
        title="the decoder of Karlo, of captions and embeddings of images",
        example="decoder-ckpt-step=01000000-of-01000000.ckpt",
    ),
    "karlo_sr": Format(
        _upsampler,
        _upsampler_table,
        needed=(karlo.UPSAMPLER_NEEDED,),
        folder=_upsampler_folder,
        title="the upsampler of Karlo, for `t2i sample --upsample`",
        example="improved-sr-ckpt-step=1.2M.ckpt",
    ),
}
