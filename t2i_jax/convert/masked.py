"""Formats of masked and any-order models, and of the KL autoencoders of their latents."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from pathlib import Path

from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.kl import KL
from t2i_jax.convert import Format, ModelFolder
from t2i_jax.convert.codecs import table_of
from t2i_jax.core.family import with_fields
from t2i_jax.heads import DiffusionHead, SoftmaxHead
from t2i_jax.interop import huggingface, kl, mar, maskgit, vqgan
from t2i_jax.interop.names import Fields, Tensors
from t2i_jax.models.masked import Masked
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.presets import BERT, MAR, OF_MASKED

log = logging.getLogger(__name__)

SCALES = {
    (4, True): {"Stable Diffusion 1 and 2": (0.18215, 0.0), "SDXL": (0.13025, 0.0)},
    (16, True): {"MAR": (0.2325, 0.0)},
    (16, False): {"Stable Diffusion 3": (1.5305, 0.0609), "FLUX.1": (0.3611, 0.1159)},
}
"""(channels, with convolutions) -> those whose codecs have these shapes, with the scale and shift of their codes, which
do not follow from shapes. The first is the default."""


def _kl(
    tensors: Tensors,
    style: vqgan.Style,
    *,
    scale: float | None = None,
    shift: float | None = None,
    groups: int = 32,
    eps: float = 1e-6,
    **fields: object,
) -> KL:
    """scale, shift: of the latents; those of SCALES, with a warning, unless given."""
    found = kl.describe(tensors, style)
    known = SCALES.get((found["channels"], found["convolutions"]), {"no released codec": (1.0, 0.0)})
    guessed, taken = scale is None, next(iter(known.values()))[0] if scale is None else scale
    shift = dict(known.values()).get(taken, 0.0) if shift is None else shift
    if guessed:
        (whose, _), *others = known.items()
        also = "".join(f"; {name} has --scale {one} --shift {other}" for name, (one, other) in others)
        log.warning(
            f"the file lacks the scale of its codes; taken: scale {taken} and shift {shift}, of {whose}{also}. "
            "Give others by --scale and --shift, or the folder of diffusers whose config.json has them"
        )
    found |= {"scale": taken, "shift": shift}
    found["autoencoder"] = AutoencoderConfig(**found["autoencoder"], groups=groups, eps=eps)
    weights: Fields = {"perceptual": 0.0, "adversarial": 0.0}  # released files hold no adversary
    return with_fields(KL(), **(weights | found | fields))


def _kl_folder(path: Path) -> ModelFolder:
    """An autoencoder of diffusers with its settings, or the folder of a whole model, of which it is the `vae/`."""
    path = path / "vae" if (path / "vae").is_dir() else path
    config = huggingface.config(path)
    hints = {"groups": config.get("norm_num_groups", 32), "scale": config.get("scaling_factor", 0.18215)}
    hints["shift"] = config.get("shift_factor") or 0.0
    return ModelFolder(huggingface.Weights(path, vqgan.needed("diffusers")), hints)


def _mar(
    tensors: Tensors,
    *,
    grid: tuple[int, int] | None = None,
    heads: int = 0,
    decoder_heads: int = 0,
    respacing: str = "100",
    repeat: int = 4,
    **fields: object,
) -> Masked:
    """grid: where it is no square; heads: for widths that no released model has; respacing: steps of the head's
    sampler; repeat: noise times per z in training."""
    found = mar.describe(tensors, grid)
    kind = dataclasses.replace(MAR, **{name: fields.pop(name) for name in ("eps", "dropout") if name in fields})
    encoder, decoder = found.pop("encoder"), found.pop("decoder")
    encoder["heads"], decoder["heads"] = heads or encoder["heads"], decoder_heads or heads or decoder["heads"]
    found["transformer"], found["decoder"] = (dataclasses.replace(kind, **part) for part in (encoder, decoder))
    found["head"] = DiffusionHead(**found["head"], respacing=respacing, repeat=repeat)
    found["condition"] = ClassEmbedder(found.pop("classes"))
    return with_fields(Masked(), **(found | fields))


def _maskgit(
    tensors: Tensors,
    *,
    codes: int = maskgit.CODES,
    grid: tuple[int, int] | None = None,
    eps: float = BERT.eps,
    dropout: float = BERT.dropout,
    label_smoothing: float = 0.1,
    **fields: object,
) -> Masked:
    """codes: how many of the table's words are codes of the codec. grid: where it is no square."""
    found = maskgit.describe(tensors, codes, grid)
    released = OF_MASKED["maskgit-512" if found["grid"] == (32, 32) else "maskgit"]
    return with_fields(
        released,
        grid=found["grid"],
        head=SoftmaxHead(codes, label_smoothing),
        transformer=dataclasses.replace(BERT, **found["transformer"], eps=eps, dropout=dropout),
        condition=ClassEmbedder(found["classes"], null=False),
        **fields,
    )


OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of 2022 for the matrices of attention, and today's."""

FORMATS = {
    "mar": Format(
        _mar,
        lambda config: mar.table(
            config.conditioning.what.spec.classes or 0, config.transformer.heads, config.decoding.heads
        ),
        mar.UNUSED,
        needed=(mar.NEEDED,),
        title="MAR: base, large and huge, by the class",
        example="mar_base/checkpoint-last.pth --codec models/kl",
    ),
    "maskgit": Format(
        _maskgit,
        lambda config: maskgit.table(
            config.head.code.sizes[0], config.conditioning.what.spec.classes or 0, config.transformer.heads
        ),
        needed=(maskgit.TRANSFORMER,),
        title="MaskGIT's Transformer, 256 and 512, by the class",
        example="maskgit_imagenet256_checkpoint --codec models/maskgit-vqgan",
    ),
    "kl": Format(
        partial(_kl, style="taming"),
        table_of("taming"),
        kl.UNUSED,
        needed=(vqgan.needed("taming"),),
        title="KL autoencoders of MAR and latent-diffusion",
        example="kl16.ckpt",
    ),
    "kl_diffusers": Format(
        partial(_kl, style="diffusers"),
        table_of("diffusers"),
        kl.UNUSED,
        needed=(vqgan.needed("diffusers"),),
        folder=_kl_folder,
        renames=tuple((rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.") for old, new in OLDER.items()),
        title="KL autoencoders of diffusers: a folder, which has the scale of the codes, or its file alone",
        example="sd-vae-ft-mse/",
    ),
    "kl_diffusers_2022": Format(
        partial(_kl, style="diffusers_2022"),
        table_of("diffusers_2022"),
        kl.UNUSED,
        needed=(vqgan.needed("diffusers_2022"),),
        folder=_kl_folder,
        title="the same in the names of 2022, for --back: `kl_diffusers` reads them too",
        example="sd-vae-ft-mse/",
    ),
}
