"""Formats of text-to-image GANs in stages."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from jax import Array

from t2i_jax.convert import Format
from t2i_jax.core.family import with_fields
from t2i_jax.core.fields import Checked
from t2i_jax.core.params import abstract
from t2i_jax.interop import staged_gan
from t2i_jax.interop.names import Fields, Table, Tensors
from t2i_jax.interop.staged_gan import Style
from t2i_jax.models.staged_gan import PAIRS, SUMS, StagedGAN
from t2i_jax.networks.condition import CrossAttnFeatures, SentenceAndWords
from t2i_jax.networks.staged_discriminator import ScaleDiscriminator, ScaleDiscriminatorNetwork
from t2i_jax.networks.staged_generator import DynamicMemory, Joint, Redraw, Stage, WordAttention
from t2i_jax.presets import OF_STAGED_GAN


def _of(base: StagedGAN, found: Fields, stages: tuple[Stage, ...]) -> StagedGAN:
    """A released model with the sizes of a file, and without discriminators where the file has none."""
    network, judge = found["network"], base.discriminator
    augmentation = dataclasses.replace(base.network.augmentation, size=network["augmentation"] or 1)
    network = network | {"augmentation": augmentation, "stages": stages}
    judge = dataclasses.replace(judge, **found["discriminator"]) if judge and "discriminator" in found else None
    return dataclasses.replace(base, network=dataclasses.replace(base.network, **network), discriminator=judge)


def _words(tensors: Tensors, style: Style, *, words: int = 18, **fields: object) -> StagedGAN:
    """words: per caption, 18 for birds; on COCO 15 for AttnGAN and 12 for DM-GAN."""
    found = staged_gan.describe(tensors, style)
    block = WordAttention if style == "attngan" else DynamicMemory
    stages = tuple(block(residuals) for residuals in found["network"].pop("residuals"))
    condition = SentenceAndWords(found["words"], words)
    return with_fields(_of(OF_STAGED_GAN[style], found, stages), **({"condition": condition} | fields))


def _joint(
    tensors: Tensors, *, kl: float = 2.0, uncond_loss: float = 1.0, color: float | None = None, **fields: object
) -> StagedGAN:
    """kl, uncond_loss, color: weights of the training, KL, UNCOND_LOSS and COLOR_LOSS in the published programs; color
    is 0 for models of captions and 50 for unconditional ones."""
    found = staged_gan.describe(tensors, "stackgan_v2")
    stages = tuple(Joint(residuals) for residuals in found["network"].pop("residuals"))
    base = OF_STAGED_GAN["stackgan-v2" if found["words"] else "stackgan-v2-alone"]
    training: Fields = {"kl": kl, "color": base.color if color is None else color}
    if found["words"]:
        u = uncond_loss
        terms = dataclasses.replace(SUMS, real_alone=u, wrong_alone=u, fake_alone=u) if u else PAIRS
        training |= {"condition": _sentence(found["words"]), "terms": (terms,), "adversarial_alone": u}
    return with_fields(_of(base, found, stages), **(training | fields))


def _two(tensors: Tensors, *, kl: float = 2.0, **fields: object) -> StagedGAN:
    """kl: weight of the KL of each stage in the training."""
    found = staged_gan.describe(tensors, "stackgan")
    config = _of(OF_STAGED_GAN["stackgan"], found, (Redraw(**found["network"].pop("redraw")),))
    return with_fields(config, **({"condition": _sentence(found["words"]), "kl": kl} | fields))


def _sentence(size: int) -> CrossAttnFeatures:
    """One vector of a caption, as it is."""
    return CrossAttnFeatures(size, 1, trained_null=False)


def _table(config: StagedGAN, style: Style) -> Table:
    return staged_gan.table(abstract(config), style, config.network.sizes)


@dataclasses.dataclass(frozen=True)
class OfOneScale(Checked):
    """A discriminator of one scale, as a file of its own."""

    config: ScaleDiscriminator
    size: int
    """rows and columns of its images"""
    c: int
    """size of its condition, 0 for none"""

    def init(self, key: Array) -> ScaleDiscriminatorNetwork:
        return self.config.init(self.size, self.c, True, key)


def _of_one_scale(tensors: Tensors, style: Style) -> OfOneScale:
    found = staged_gan.describe_discriminator(tensors, style)
    alone = "all" if found["alone"] else "none"
    norm, first = "spectral" if style == "dmgan" else "batch", style == "stackgan_v2"
    return OfOneScale(ScaleDiscriminator(found["width"], norm, alone, first), found["size"], found["c"])


def _table_of_one_scale(config: OfOneScale, style: Style) -> Table:
    return staged_gan.discriminator(abstract(config), style, config.size)


JUDGES = {rf"netD_?{n}(_.*)?": f"netD{n}." for n in range(3)}
FILES = {r"netG(_.*)?": "netG.", **JUDGES}
"""Files that the programs save in one folder."""


PARALLEL = (r"^module\.", "")
SPECTRAL = (r"(img_code_\w+\.\d+|jointConv\.0)\.(?:module\.)?(bias|weight_bar|weight_u|weight_v)$", r"\1.module.\2")
"""The wrapper of DM-GAN's spectral norm, which readers of files take for one of parallel training."""


def _renames(style: Style) -> tuple[tuple[str, str], ...]:
    return (PARALLEL, SPECTRAL) if style == "dmgan" else (PARALLEL,)


def _format(describe: Any, style: Style, **fields: Any) -> Format:
    bare = staged_gan.GENERATOR[style]
    together = tuple(f"{staged_gan.WHOLE.get(style, 'netG.')}{name}" for name in bare)
    return Format(
        describe,
        partial(_table, style=style),
        staged_gan.UNUSED,
        needed=(together, bare),
        renames=_renames(style),
        optional=tuple(JUDGES),
        **fields,
    )


def _format_of_one_scale(style: Style, title: str, example: str) -> Format:
    return Format(
        partial(_of_one_scale, style=style),
        partial(_table_of_one_scale, style=style),
        staged_gan.UNUSED,
        needed=(tuple(name.replace(".module.", ".") for name in staged_gan.DISCRIMINATOR[style]),),
        renames=_renames(style),
        title=f"{title}: the discriminator of one scale",
        example=example,
    )


FORMATS = {
    "stackgan": _format(_two, "stackgan", title="StackGAN, both stages: the generator", example="netG_epoch_120.pth"),
    "stackgan_v2": _format(
        _joint,
        "stackgan_v2",
        files=FILES,
        title="StackGAN++ (StackGAN-v2): the generator, or a folder with its discriminators",
        example="birds/netG_210000.pth",
    ),
    "attngan": _format(
        partial(_words, style="attngan"),
        "attngan",
        files=FILES,
        title="AttnGAN: the generator, or a folder with its discriminators",
        example="bird_AttnGAN2.pth",
    ),
    "dmgan": _format(
        partial(_words, style="dmgan"),
        "dmgan",
        files=FILES,
        title="DM-GAN: the generator, or a folder with its discriminators",
        example="netG_epoch_600.pth",
    ),
    "stackgan_v2-discriminator": _format_of_one_scale("stackgan_v2", "StackGAN++", "birds/netD0.pth"),
    "attngan-discriminator": _format_of_one_scale("attngan", "AttnGAN", "netD0.pth"),
    "dmgan-discriminator": _format_of_one_scale("dmgan", "DM-GAN", "netD0.pth"),
}
