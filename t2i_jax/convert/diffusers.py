"""Folders of diffusers: Stable Diffusion 1.x, 2.x and 3, its upscaler, and PixArt, with codec and text encoders.

A folder is that of the network alone, or the one that contains those of network, autoencoder, tokeniser and text
encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from flax import nnx

from t2i_jax import convert
from t2i_jax.convert import Format, ModelFolder
from t2i_jax.convert.gaussian import network_of
from t2i_jax.core.family import with_fields
from t2i_jax.core.noise import Predicts
from t2i_jax.core.params import abstract
from t2i_jax.core.types import Compute, Trainable
from t2i_jax.interop import huggingface, pixart
from t2i_jax.interop import stable_diffusion as published
from t2i_jax.interop import stable_diffusion_3 as third
from t2i_jax.interop.names import Fields, Tensors
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import Conditioning, CrossAttnFeatures, PooledAndTokenFeatures, TextFeatures
from t2i_jax.networks.dit import DiT
from t2i_jax.networks.unclip import NoisedImageAndTokens
from t2i_jax.networks.unet import UNet
from t2i_jax.nn.positions import SinCosPositions, sincos_2d
from t2i_jax.noise.processes import Discrete, Flow
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.text.clip import ClipCaption, ClipText
from t2i_jax.text.t5 import T5
from t2i_jax.text.triple import Triple


def stable_diffusion_config(
    tensors: Tensors,
    *,
    size: int | tuple[int, int] = 0,
    heads: int = 8,
    head_dim: int | None = None,
    groups: int = 32,
    eps: float = 1e-5,
    length: int = 77,
    schedule: str = "scaled_linear",
    ends: tuple[float, float] | None = None,
    steps: int = 1000,
    zero_terminal_snr: bool = False,
    predicts: Predicts | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    **fields: object,
) -> Diffusion:
    """Values that a folder's settings lack are those of versions 1 where the text is of CLIP ViT-L (width 768), else
    those of versions 2. size: side of the latents; length: tokens of a caption; ends: first and last variance of the
    schedule, if not those of its paper; dtype: of the arithmetic."""
    second = published.describe(tensors)["context"] != 768
    head_dim = (64 if second else 0) if head_dim is None else head_dim
    side = _side(size or (96 if second else 64))
    network = _unet(tensors, size=side, heads=heads, head_dim=head_dim, groups=groups, eps=eps, length=length)
    family: Fields = {
        "process": Discrete(schedule, steps, zero_terminal_snr, ends=ends),
        "predicts": predicts or ("v" if second else "eps"),
        "solver": "dpm++",
        "sampling": DiffusionSampler(steps=min(30, steps), guidance=7.5, eta=0.0),
        "compute": Compute(dtype),
    }
    return with_fields(Diffusion(network), **(family | fields))


def _unet(tensors: Tensors, *, length: int, **fields: object) -> UNet:
    """fields: of the network, which its shapes lack. length: tokens of a caption."""
    found = published.describe(tensors)
    encoded = CrossAttnFeatures(found["context"], length, trained_null=False, kept_null="null_features" in tensors)
    image = tensors.get(published.IMAGE)
    what = encoded if image is None else NoisedImageAndTokens(encoded, image.shape[1] // 2, image.shape[0])
    shape: Fields = found | fields
    return UNet(**shape, conditioning=Conditioning(what))


def _ends(tensors: Tensors, **hints: object) -> tuple[Tensors, Fields]:
    """The ends of attentions as the table has them, whichever way this file keeps them."""
    if published.LEVELS in tensors:
        raise ValueError(f"{published.LEVELS}: it is the upscaler's UNet, which is read as stable-diffusion-upscaler")
    given: Fields = hints
    network = network_of(stable_diffusion_config(tensors, **given), UNet)
    return published.squared(tensors, published.linear(network)), given


def stable_diffusion_folder(path: Path) -> ModelFolder:
    """A UNet's folder, or the one that has it as `unet/` among the other parts."""
    part = path / "unet"
    if not part.is_dir():
        return ModelFolder(huggingface.Weights(path, published.NEEDED), published.settings(huggingface.config(path)))
    hints = published.settings(huggingface.config(part))
    hints |= published.schedule(huggingface.settings(path / "scheduler" / "scheduler_config.json"))
    text, tensors = None, dict(huggingface.Weights(part, published.NEEDED))
    if (path / "text_encoder").is_dir():
        text = clip_of(path)
        tensors["null_features"], hints["length"] = empty_caption(text), text.length
    codec = codec_of(path / "vae") if (path / "vae").is_dir() else None
    return ModelFolder(tensors, hints, codec, text)


# -------------------------------------------------------------------------------------------------------- upscaler

_WIDE = Discrete("scaled_linear", ends=(1e-4, 0.02))
"""Noise of latents and of small images, in released weights."""


def _upscaler(
    tensors: Tensors,
    *,
    size: int | tuple[int, int] = 128,
    heads: int = 8,
    head_dim: int = 0,
    groups: int = 32,
    eps: float = 1e-5,
    length: int = 77,
    schedule: str = "",
    ends: tuple[float, float] | None = None,
    steps: int = 1000,
    zero_terminal_snr: bool = False,
    predicts: Predicts = "v",
    low_res_schedule: str = "",
    low_res_ends: tuple[float, float] | None = None,
    low_res_steps: int = 1000,
    max_noise_level: int = 350,
    dtype: Literal["float32", "bfloat16"] = "float32",
    **fields: object,
) -> Diffusion:
    """size: side of the small images, and of the latents; length: tokens of a caption; schedule, ends, steps: of the
    noise, low_res_schedule, low_res_ends, low_res_steps: of that of small images, which training draws below
    max_noise_level, those of released weights without a schedule; dtype: of the arithmetic."""
    shape: Fields = {"size": _side(size), "heads": heads, "head_dim": head_dim, "groups": groups, "eps": eps}
    network = _unet(tensors, length=length, **shape)
    process = Discrete(schedule, steps, zero_terminal_snr, ends=ends) if schedule else _WIDE
    low_res = Discrete(low_res_schedule, low_res_steps, ends=low_res_ends) if low_res_schedule else _WIDE
    family: Fields = {
        "process": process,
        "predicts": predicts,
        "noise_aug": max_noise_level / low_res.steps,
        "solver": "ddim",
        "compute": Compute(dtype),
        "sampling": DiffusionSampler(
            min(50, process.steps), guidance=9.0, spacing="leading", noise_aug=min(1.0, 20 / low_res.steps)
        ),
    }
    return with_fields(Diffusion(network, low_res_process=low_res), **(family | fields))


def _upscaler_folder(path: Path) -> ModelFolder:
    """A UNet's folder, or the one that has it as `unet/` among the other parts."""
    found, hints = stable_diffusion_folder(path), {}
    if (file := path / "low_res_scheduler" / "scheduler_config.json").is_file():
        named = published.schedule(huggingface.settings(file))
        hints = {f"low_res_{k}": named[k] for k in ("schedule", "ends", "steps") if k in named}
    if (file := path / "model_index.json").is_file():
        hints["max_noise_level"] = huggingface.settings(file).get("max_noise_level", 350)
    return found._replace(hints=found.hints | hints)


# ---------------------------------------------------------------------------------------------------------- PixArt


def _pixart(
    tensors: Tensors,
    *,
    size: int | tuple[int, int] = 0,
    heads: int = 16,
    stretch: float = 0.0,
    eps: float = 1e-6,
    dtype: Literal["float32", "bfloat16"] = "float32",
    **fields: object,
) -> Diffusion:
    """size: side of the latents; stretch: how much larger than 64 it is, unless given; dtype: of the arithmetic.
    Captions are as long as the unconditional features."""
    found = pixart.describe(tensors)
    length, dim = tensors["null_features"].shape[0], found.pop("dim")
    side = _side(size or pixart.side_of(tensors, found["patch"]))
    kind: Fields = {
        "size": side,
        "whole": False,
        "shared": True,
        "cross_norm": False,
        "conditioning": Conditioning(TextFeatures(dim, length, trained_null=False, bias=True), "cross_attention"),
        "positions": SinCosPositions(stretch or max(side[0] // 64, 1)),
    }
    network = with_fields(DiT(), **(kind | found | {"heads": heads, "eps": eps}))
    family: Fields = {
        "process": Discrete("linear"),
        "solver": "dpm++",
        "compute": Compute(dtype),
        "sampling": DiffusionSampler(steps=20, guidance=4.5, eta=0.0),
    }
    return with_fields(Diffusion(network), **(family | fields))


def _pixart_whole(
    tensors: Tensors, *, length: int = 120, size: int | tuple[int, int] = 0, stretch: float = 0.0, **hints: object
) -> tuple[Tensors, Fields]:
    """Positions are counted where a file has none. Without the features of an empty caption there is no guidance."""
    tensors, found = dict(tensors), pixart.describe(tensors)
    side = _side(size or pixart.side_of(tensors, found["patch"]) or 64)
    stretch = stretch or max(side[0] // 64, 1)
    if pixart.PLACES not in tensors:
        grid = side[0] // found["patch"], side[1] // found["patch"]
        tensors[pixart.PLACES] = sincos_2d(grid, found["width"], stretch)[None]
    if "null_features" not in tensors:
        tensors["null_features"] = np.zeros((length, found["dim"]), np.float32)
        hints = {"condition_dropout": 0.0} | hints
    return tensors, hints | {"size": side, "stretch": stretch}


def _pixart_folder(path: Path) -> ModelFolder:
    part = path / "transformer"
    if not part.is_dir():
        return ModelFolder(huggingface.Weights(path, pixart.NEEDED), pixart.settings(huggingface.config(path)))
    hints, tensors = pixart.settings(huggingface.config(part)), dict(huggingface.Weights(part, pixart.NEEDED))
    sigma = "Sigma" in huggingface.settings(path / "model_index.json").get("_class_name", "")
    hints["length"], text = 300 if sigma else 120, None
    if (path / "text_encoder").is_dir():
        spiece = str(path / "tokenizer" / "spiece.model")
        text = T5(str(path / "text_encoder"), hints["length"], clean=True, vocabulary=spiece)
        # Their sampler shows only the end token of an empty caption; the same vector at all positions is equivalent.
        tensors["null_features"] = np.repeat(empty_t5_caption(text)[:1], text.length, 0)
    return ModelFolder(tensors, hints, codec_of(path / "vae") if (path / "vae").is_dir() else None, text)


# ----------------------------------------------------------------------------------------------- Stable Diffusion 3


def _third(
    tensors: Tensors,
    *,
    size: int | tuple[int, int] = 128,
    heads: int = 0,
    length: int = 333,
    shift: float = 3.0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    **fields: object,
) -> Diffusion:
    """size: side of the latents; heads: 0 for heads of width 64; length: tokens of a caption; shift: of the flow;
    dtype: of the arithmetic."""
    found = third.describe(tensors)
    summary, dim = found.pop("summary"), found.pop("dim")
    encoded = CrossAttnFeatures(dim, length + 1, trained_null=False, kept_null="null_features" in tensors)
    kind: Fields = {
        "conditioning": Conditioning(PooledAndTokenFeatures(encoded, summary), "joint"),
        "learn_variance": False,
        "size": _side(size),
        "heads": heads or found["width"] // 64,
    }
    network = with_fields(DiT(), **(found | kind))
    family: Fields = {
        "process": Flow(shift=shift),
        "predicts": "velocity",
        "solver": "euler",
        "compute": Compute(dtype),
        "sampling": DiffusionSampler(steps=28, guidance=7.0, eta=0.0),
    }
    return with_fields(Diffusion(network), **(family | fields))


def _third_whole(tensors: Tensors, *, size: int | tuple[int, int] = 128, **hints: object) -> tuple[Tensors, Fields]:
    patch, side = third.describe(tensors)["patch"], _side(size)
    return third.completed(tensors, (side[0] // patch, side[1] // patch)), hints | {"size": side}


def _third_folder(path: Path) -> ModelFolder:
    part = path / "transformer"
    if not part.is_dir():
        return ModelFolder(huggingface.Weights(path, third.NEEDED), third.settings(huggingface.config(path)))
    hints, tensors, text = third.settings(huggingface.config(part)), dict(huggingface.Weights(part, third.NEEDED)), None
    hints["shift"] = huggingface.settings(path / "scheduler" / "scheduler_config.json").get("shift", 1.0)
    if (path / "text_encoder_3").is_dir():
        spiece = str(path / "tokenizer_3" / "spiece.model")
        t5 = T5(str(path / "text_encoder_3"), 256, vocabulary=spiece)
        text = Triple(clip_of(path), clip_of(path, "_2"), t5)
        tensors["null_features"], hints["length"] = empty_caption(text), text.length - 1
    return ModelFolder(tensors, hints, codec_of(path / "vae") if (path / "vae").is_dir() else None, text)


# ---------------------------------------------------------------------------------------------------- what they share


def _side(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def empty_caption(text: ClipText | ClipCaption | Triple) -> np.ndarray:
    """Features (s, k) of an empty caption."""
    ids, mask = text([""])
    return np.asarray(jax.jit(text.features)(text.load(), ids, mask))[0]


def empty_t5_caption(text: T5) -> np.ndarray:
    """Features (s, k) of an empty caption, which is the end token and padding."""
    ids, mask = np.zeros((1, text.length), np.int32), np.zeros((1, text.length), bool)
    ids[0, 0], mask[0, 0] = 1, True
    return np.asarray(jax.jit(text.features)(text.load(), ids, mask))[0].astype(np.float32)


def clip_of(path: Path, which: str = "") -> ClipText:
    """A CLIP of a folder, with the list of merges and the padding of its tokeniser."""
    folder = path / f"tokenizer{which}"
    merges = folder / "merges.txt"
    pad = huggingface.settings(folder / "special_tokens_map.json").get("pad_token", "<|endoftext|>")
    pad = pad["content"] if isinstance(pad, Mapping) else pad
    return ClipText(
        str(path / f"text_encoder{which}"),
        pad=huggingface.settings(folder / "vocab.json")[pad],
        vocabulary=str(merges) if merges.exists() else "",
    )


def codec_of(path: Path) -> tuple[Trainable, nnx.Module]:
    """The KL autoencoder of a folder: its configuration and its model."""
    read = convert.find("kl_diffusers").folder
    assert read is not None
    found = read(path)
    return convert.convert("kl_diffusers", found.tensors, str(path), **found.hints)


FORMATS = {
    "stable-diffusion": Format(
        stable_diffusion_config,
        lambda config: published.table(abstract(config), network_of(config, UNet)),
        needed=(published.NEEDED,),
        adapt=_ends,
        folder=stable_diffusion_folder,
        title="Stable Diffusion 1.x and 2.x as diffusers keeps them",
        example="stable-diffusion-v1-5/",
    ),
    "stable-diffusion-upscaler": Format(
        _upscaler,
        lambda config: published.table(abstract(config), network_of(config, UNet)),
        needed=((*published.NEEDED, published.LEVELS),),
        adapt=lambda tensors, **hints: (published.squared(tensors, True), hints),
        folder=_upscaler_folder,
        title="the upscaler of Stable Diffusion as diffusers keeps it, for `t2i sample --upsample`",
        example="stable-diffusion-x4-upscaler/",
    ),
    "stable-diffusion-3": Format(
        _third,
        lambda config: third.table(network_of(config, DiT)),
        needed=(third.NEEDED,),
        adapt=_third_whole,
        folder=_third_folder,
        title="Stable Diffusion 3, and 3.5 large, as diffusers keeps them",
        example="stable-diffusion-3-medium-diffusers/",
    ),
    "pixart": Format(
        _pixart,
        lambda config: pixart.table(network_of(config, DiT)),
        needed=(pixart.NEEDED,),
        adapt=_pixart_whole,
        folder=_pixart_folder,
        title="PixArt-alpha (256, 512) and PixArt-Sigma as diffusers keeps them",
        example="PixArt-XL-2-512x512/",
    ),
}
