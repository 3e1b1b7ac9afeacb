"""Formats of GANs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from t2i_jax.convert import Format
from t2i_jax.core.family import with_fields
from t2i_jax.core.params import abstract
from t2i_jax.interop import one_stage_gan
from t2i_jax.interop.names import Fields, Table, Tensors
from t2i_jax.models.gan import GAN
from t2i_jax.networks.condition import SentenceAndWords
from t2i_jax.networks.one_stage import DeepFusion, OneStage, SemanticSpatial
from t2i_jax.networks.one_way import OneWay
from t2i_jax.presets import OF_GAN


def _one_stage(tensors: Tensors, style: one_stage_gan.Style, words: int, fields: Fields) -> GAN:
    found = one_stage_gan.describe(tensors, style)
    block = DeepFusion(found["layers"]) if style == "dfgan" else SemanticSpatial(found["mask_width"])
    judge = found["discriminator"]
    return with_fields(
        OF_GAN[style],
        **{
            "network": OneStage(**found["network"], block=block),
            "discriminator": None if judge is None else OneWay(**judge),
            "condition": SentenceAndWords(found["sentence"], words),
        }
        | fields,
    )


def _dfgan(tensors: Tensors, *, words: int = 18, **fields: object) -> GAN:
    """words: of a caption, in the features of the text encoder."""
    return _one_stage(tensors, "dfgan", words, fields)


def _ssagan(tensors: Tensors, *, words: int = 18, **fields: object) -> GAN:
    """words: of a caption, in the features of the text encoder."""
    return _one_stage(tensors, "ssagan", words, fields)


def _table(config: GAN, style: one_stage_gan.Style) -> Table:
    return one_stage_gan.table(abstract(config), style, config.network.start)


def _buffers(config: GAN, style: one_stage_gan.Style) -> dict[str, np.ndarray]:
    return one_stage_gan.buffers(abstract(config), style)


def _format(describe: Callable[..., GAN], style: one_stage_gan.Style, title: str, example: str) -> Format:
    return Format(
        describe,
        partial(_table, style=style),
        one_stage_gan.UNUSED,
        needed=(one_stage_gan.needed(style),),
        renames=one_stage_gan.ALONE,
        buffers=partial(_buffers, style=style),
        title=title,
        example=example,
        files=FILES if style == "ssagan" else {},
        optional=tuple(FILES)[1:],
    )


FILES = {r"netG(_.*)?": "netG.", r"netD(_.*)?": "netD."}
"""Files that SSA-GAN saves in one folder."""

FORMATS = {
    "dfgan": _format(_dfgan, "dfgan", "DF-GAN: the generator and the discriminator", "state_epoch_1220.pth"),
    "ssagan": _format(_ssagan, "ssagan", "SSA-GAN: the generator, or a folder with its discriminator", "netG_550.pth"),
}
