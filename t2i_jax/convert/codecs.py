"""Formats of convolutional codecs: with discrete codes, and small ones of the latents of others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.discriminator import DiscriminatorConfig, StyleDiscriminatorConfig
from t2i_jax.codecs.quantize import GumbelConfig, QuantizerConfig
from t2i_jax.codecs.taesd import TAESD, DecoderLevels, EncoderLevels
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.convert import Format, ModelFolder, read
from t2i_jax.core.family import with_fields
from t2i_jax.core.params import HasInit, abstract
from t2i_jax.interop import huggingface, maskgit, taesd, vqgan
from t2i_jax.interop.names import Fields, Table, Tensors, require
from t2i_jax.presets import MASKGIT_VQGAN

JUDGE = ("main.0.weight", "main.2.weight")
"""Names that every PatchGAN has."""
TAMING = {"pixels": "l1", "adversarial": 0.8, "adaptive": True, "start": 250_001}
"""How the codecs of taming-transformers were trained."""


def _codec(
    tensors: Tensors,
    style: vqgan.Style,
    quantizer: Callable[..., QuantizerConfig | GumbelConfig],
    *,
    groups: int,
    eps: float,
    training: Fields,
) -> VQGAN:
    found = vqgan.describe(tensors, style)
    autoencoder = AutoencoderConfig(**found["autoencoder"], groups=groups, eps=eps)
    # A codec trained with an adversary is trained on without one where the file lacks it.
    judge = DiscriminatorConfig(**found["discriminator"]) if "discriminator" in found else None
    training = {**training, "discriminator": judge} if judge else {**training, "adversarial": 0.0}
    return VQGAN(autoencoder, quantizer(**found["quantizer"]), **training)


def _llamagen(
    tensors: Tensors,
    *,
    l2_norm: bool = True,
    beta: float = 0.25,
    entropy: float = 0.0,
    groups: int = 32,
    eps: float = 1e-6,
    **fields: object,
) -> VQGAN:
    quantizer = partial(QuantizerConfig, normalize=l2_norm, commitment=beta, entropy=entropy)
    return _codec(tensors, "llamagen", quantizer, groups=groups, eps=eps, training=fields)


def taming(
    tensors: Tensors,
    *,
    legacy: bool = False,
    beta: float | None = None,
    groups: int = 32,
    eps: float = 1e-6,
    **fields: object,
) -> VQGAN:
    """A VQGAN of taming-transformers.

    legacy: train with `beta` on the pull of the codebook instead of the encoder, as released models were. beta: 0.25
    unless given, and 1 for a codebook that is a moving average."""
    averaged = any(name.endswith("cluster_size") for name in tensors)
    beta = (1.0 if averaged else 0.25) if beta is None else beta
    weights = {"codebook": beta, "commitment": 1.0} if legacy else {"codebook": 1.0, "commitment": beta}
    quantizer = partial(QuantizerConfig, normalize=False, **weights)
    return _codec(tensors, "taming", quantizer, groups=groups, eps=eps, training=TAMING | fields)


def gumbel(
    tensors: Tensors,
    *,
    kl: float = 1e-8,
    temperature: float = 0.9,
    groups: int = 32,
    eps: float = 1e-6,
    **fields: object,
) -> VQGAN:
    """A Gumbel VQGAN of taming-transformers."""
    quantizer = partial(GumbelConfig, kl=kl, temperature=temperature)
    return _codec(tensors, "taming", quantizer, groups=groups, eps=eps, training=TAMING | fields)


def _clipgen(tensors: Tensors, *, beta: float = 0.2, groups: int = 32, eps: float = 1e-5, **fields: object) -> VQGAN:
    quantizer = partial(QuantizerConfig, normalize=False, codebook=beta, commitment=1.0)
    return _codec(tensors, "clipgen", quantizer, groups=groups, eps=eps, training=TAMING | fields)


def _maskgit(
    tensors: Tensors,
    *,
    beta: float = 0.25,
    entropy: float = 0.1,
    temperature: float = 0.01,
    groups: int = 32,
    eps: float = 1e-6,
    **fields: object,
) -> VQGAN:
    found, released = maskgit.describe_vqgan(tensors), MASKGIT_VQGAN
    weights = {"commitment": beta, "entropy": entropy, "temperature": temperature}
    parts: Fields = {
        "autoencoder": dataclasses.replace(released.autoencoder, **found["autoencoder"], groups=groups, eps=eps),
        "quantizer": dataclasses.replace(released.quantizer, **found["quantizer"], **weights),
        "adversarial": 0.0,  # the file holds no discriminator
    }
    return dataclasses.replace(released, **parts | fields)


def table_of(style: vqgan.Style) -> Callable[[HasInit], Table]:
    """The names of convolutional codecs in one style."""
    return lambda config: vqgan.table(abstract(config), style)


def _judge(tensors: Tensors) -> DiscriminatorConfig:
    kernels = sum(len(t.shape) == 4 for t in tensors.values())
    require(tensors, JUDGE, "no PatchGAN of taming-transformers")
    return DiscriminatorConfig(tensors["main.0.weight"].shape[0], kernels - 2)


def _taesd(tensors: Tensors, **fields: object) -> TAESD:
    found = taesd.describe(tensors)
    encoder = None if found["encoder"] is None else EncoderLevels(**found["encoder"])
    config = TAESD(found["channels"], encoder, DecoderLevels(**found["decoder"]), adversarial=0.0)
    return with_fields(config, **fields)


def _taesd_folder(path: Path) -> ModelFolder:
    """A folder of diffusers, or one with the two files of the original."""
    if not (path / "config.json").is_file():
        return ModelFolder(read(path, "taesd"), {})
    given = huggingface.config(path)
    huggingface.check_supported(given, taesd.ONLY)
    hints = {ours: given[theirs] for ours, theirs in (("scale", "scaling_factor"), ("shift", "shift_factor"))}
    return ModelFolder(huggingface.Weights(path, *taesd.NEEDED), {k: v for k, v in hints.items() if v is not None})


USED = {"quantize.codebook_used": np.zeros(65536, np.float32)}
"""The last codes seen, which LlamaGen saves with its weights for its log."""
STAGE = "first_stage_model."
"""Prefix of the codec in a checkpoint of a next-token model of taming-transformers."""

FORMATS = {
    "llamagen-vq": Format(
        _llamagen,
        table_of("llamagen"),
        vqgan.IGNORED,
        needed=(vqgan.needed("llamagen"),),
        buffers=lambda config: USED,
        title="LlamaGen's tokenizers VQ-16, VQ-8",
        example="vq_ds16_c2i.pt",
    ),
    "taming-vqgan": Format(
        taming,
        table_of("taming"),
        vqgan.IGNORED,
        needed=(vqgan.needed("taming"),),
        part=STAGE,
        title="VQGAN of taming-transformers",
        example="vqgan_imagenet_f16_16384.ckpt",
    ),
    "taming-gumbel": Format(
        gumbel,
        table_of("taming"),
        vqgan.IGNORED,
        needed=(vqgan.needed("taming"),),
        part=STAGE,
        title="Gumbel VQGAN of taming-transformers",
        example="vqgan_gumbel_f8.ckpt",
    ),
    "clipgen-vqgan": Format(
        _clipgen,
        table_of("clipgen"),
        vqgan.IGNORED,
        needed=(vqgan.needed("clipgen"),),
        title="CLIP-GEN's VQGAN",
        example="vqgan_coco.pt",
    ),
    "maskgit-vqgan": Format(
        _maskgit,
        lambda config: maskgit.vqgan_table(abstract(config)),
        needed=(maskgit.VQGAN,),
        title="MaskGIT's tokenizers, 256 and 512",
        example="tokenizer_imagenet256_checkpoint",
    ),
    "maskgit-discriminator": Format(
        lambda tensors: StyleDiscriminatorConfig(maskgit.discriminator_widths(tensors)),
        lambda config: maskgit.discriminator_table(len(config.widths) - 1),
        needed=(maskgit.JUDGE,),
        title="the discriminator of MaskGIT's tokenizer",
        example="discriminator_checkpoint",
    ),
    "taesd": Format(
        _taesd,
        lambda config: taesd.table(abstract(config)),
        needed=taesd.NEEDED,
        title="TAESD, TAEF and TAESANA: a folder with the encoder and the decoder (github.com/madebyollin/taesd), a "
        "decoder alone, or diffusers' folder",
        example="taef2/",
        adapt=lambda tensors, **hints: (taesd.sides(tensors), hints),
        files={".*encoder": "encoder.", ".*decoder": "decoder."},
        optional=(".*encoder",),
        folder=_taesd_folder,
    ),
    "taming-discriminator": Format(
        _judge,
        lambda config: vqgan.discriminator(abstract(config)),
        vqgan.IGNORED,
        needed=(JUDGE,),
        part="loss.discriminator.",
        title="the PatchGAN of a VQGAN of taming-transformers",
        example="vqgan_imagenet_f16_16384.ckpt",
    ),
}
