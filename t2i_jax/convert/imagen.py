"""Formats of pixel cascades that read a frozen T5: DeepFloyd IF."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from t2i_jax.convert import Format, ModelFolder
from t2i_jax.convert.diffusers import empty_t5_caption
from t2i_jax.convert.gaussian import network_of
from t2i_jax.core.family import with_fields
from t2i_jax.core.params import abstract
from t2i_jax.interop import deepfloyd as published
from t2i_jax.interop import huggingface, stable_diffusion
from t2i_jax.interop.names import Fields, Table, Tensors
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import Conditioning, CrossAttnFeatures
from t2i_jax.networks.imagen import AttentionPooledFeatures
from t2i_jax.networks.unet import UNet
from t2i_jax.noise.processes import Discrete
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.text.t5 import T5

TOKENS = 77
EMPTY = "zero_t5*.npy"
"""Name of the file with the features of an empty caption, in the folder of the original's weights."""
SCALE = 0.7071
"""Factor of residual blocks of the original's upsamplers."""


def _deepfloyd(
    tensors: Tensors,
    *,
    size: int = 0,
    head_dim: int = 64,
    pool_heads: int = 64,
    length: int = TOKENS,
    schedule: str = "cosine",
    steps: int = 1000,
    threshold: float = 0.95,
    threshold_most: float = 0.0,
    clip: bool = True,
    **fields: object,
) -> Diffusion:
    """Values that do not follow from shapes are those of released models. size: side of an image, 0 for 64 of a first
    stage, 256 of the second and 1024 of one with six levels. length: tokens of a caption. threshold, threshold_most,
    clip: of the sampler; the second 0 for 1.5 of a first stage and 1 of others."""
    found, of = published.describe(tensors)
    enlarges = bool(found["extra_inputs"])
    encoded = CrossAttnFeatures(of["dim"], length, trained_null=False, kept_null=published.NULL in tensors)
    what = AttentionPooledFeatures(encoded, pool_heads, of["summary"], of["projected"])
    third = enlarges and len(found["multipliers"]) == 6
    side = size or (1024 if third else 256 if enlarges else 64)
    kind: Fields = {
        "conditioning": Conditioning(what),
        "size": (side, side),
        "head_dim": head_dim,
        "pool": "summary",
        "context_norm": "group",
        "activation": "gelu",
        "residual_scale": SCALE if enlarges else 1.0,
        "upscaling": "corners",
    }
    network = with_fields(UNet(conditioning=None), **(found | kind))
    process, most = Discrete(schedule, steps), threshold_most or (1.0 if enlarges else 1.5)
    bounded: Fields = {"threshold": threshold, "threshold_most": most, "clip": clip}
    family: Fields = {
        "process": process,
        "guided_channels": 3,
        "sampling": DiffusionSampler(100, guidance=7.0, spacing="smart100", **bounded),
    }
    if enlarges:
        family |= {
            "low_res_process": process,
            "noise_aug": 1.0,
            "sampling": DiffusionSampler(40, guidance=4.0, spacing="super40", **bounded)
            if third
            else DiffusionSampler(50, guidance=4.0, spacing="smart50", noise_aug=0.25, **bounded),
        }
    return with_fields(Diffusion(network), **(family | fields))


def _table(config: Diffusion) -> Table:
    network_of(config, UNet)
    what = config.condition
    if not isinstance(what, AttentionPooledFeatures):
        raise ValueError(f"its condition is a {type(what).__name__}, not that of DeepFloyd IF")
    return published.table(abstract(config), what.projected, what.encoded.kept_null)


def _folder(path: Path) -> ModelFolder:
    """A UNet's folder of diffusers, or the one that has it as `unet/`, with T5; or the original's, with the features
    of an empty caption if it has a file of them."""
    part = path / "unet" if (path / "unet").is_dir() else path
    if not (part / "config.json").is_file():
        return ModelFolder(dict(huggingface.Weights(part, published.NEEDED)) | _given_null(path), {})
    config = huggingface.config(part)
    hints = published.settings(config)
    tensors = published.renamed(dict(huggingface.Weights(part, published.OF_DIFFUSERS)), hints["head_dim"])
    scheduler = huggingface.settings(path / "scheduler" / "scheduler_config.json")
    if scheduler:
        hints |= _scheduler(scheduler)
    if not (path / "text_encoder").is_dir():
        return ModelFolder(tensors | _given_null(path), hints)
    spiece = path / "tokenizer" / "spiece.model"
    text = T5(str(path / "text_encoder"), TOKENS, clean=True, vocabulary=str(spiece) if spiece.is_file() else "")
    return ModelFolder(tensors | {published.NULL: empty_t5_caption(text)}, hints, None, text)


def _scheduler(config: Fields) -> Fields:
    """Hints that `scheduler_config.json` gives."""
    found = stable_diffusion.schedule(config)
    if "ends" in found:
        raise ValueError("scheduler_config.json: betas of {} from {} to {}".format(found["schedule"], *found["ends"]))
    if found["predicts"] != "eps" or found["zero_terminal_snr"]:
        raise ValueError(f"scheduler_config.json: predictions {found['predicts']!r}; what can be read is 'epsilon'")
    thresholds, variance = config.get("thresholding", False), config.get("variance_type", "fixed_small")
    if variance not in ("learned_range", "fixed_small", "fixed_large"):
        raise ValueError(f"scheduler_config.json: variance_type {variance!r}; what can be read is 'learned_range'")
    fixed: Fields = {"variance": variance, "discard_variance_output": True}
    return {
        **({} if variance == "learned_range" else fixed),
        "schedule": found["schedule"],
        "steps": found["steps"],
        "threshold": float(config.get("dynamic_thresholding_ratio", 0.995)) if thresholds else 0.0,
        "threshold_most": float(config.get("sample_max_value", 1.0)),
        "clip": bool(config.get("clip_sample", True)),
    }


def _given_null(path: Path) -> dict[str, np.ndarray]:
    """Features of an empty caption in a file of this folder. Errors: ValueError where it holds something else."""
    files = sorted(path.glob(EMPTY))
    if not files:
        return {}
    rows = np.load(files[0], allow_pickle=False)
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise ValueError(f"{files[0]}: {rows.shape} {rows.dtype}; the vectors of an empty caption are wanted")
    return {published.NULL: rows.astype(np.float32)}


FORMATS = {
    "deepfloyd": Format(
        _deepfloyd,
        _table,
        needed=(published.NEEDED,),
        folder=_folder,
        title="DeepFloyd IF, any stage: a folder of diffusers with its T5, or the original's with pytorch_model.bin; "
        "later stages for `t2i sample --upsample`",
        example="IF-I-XL-v1.0/",
    ),
}
