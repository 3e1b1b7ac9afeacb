"""The format of DAMSM: the encoders of captions and of images that AttnGAN, DM-GAN, DF-GAN and SSA-GAN read."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import cast

from t2i_jax.convert import Format, ModelFolder
from t2i_jax.core.family import with_fields
from t2i_jax.interop import damsm
from t2i_jax.interop.names import Fields, Tensors
from t2i_jax.models.damsm import DAMSM, Inception
from t2i_jax.text.damsm import CaptionWords

TEXT, IMAGE, WORDS = (
    r"text_encoder.*\.(pth|pt|safetensors)",
    r"image_encoder.*\.(pth|pt|safetensors)",
    r"captions.*\.pickle",
)
"""Names of the files of a folder."""


def _damsm(
    tensors: Tensors, *, trunk: str = "", align_corners: bool = True, length: int = 18, **fields: object
) -> DAMSM:
    """trunk: the file with the Inception-v3 of the image encoder. length: words per caption, 15 or 12 for COCO."""
    found = damsm.describe(tensors)
    widths = found.pop("widths")
    if widths not in (None, Inception.widths):
        raise ValueError(f"heads on features of {widths} numbers; Inception-v3 has {Inception.widths}")
    network = None if widths is None else Inception(trunk, align_corners)
    return with_fields(DAMSM(), **(found | {"length": length, "trunk": network} | fields))


def _folder(path: Path) -> ModelFolder:
    """A folder with one file each of both encoders, and the dictionary if it is there."""

    def one(pattern: str, needed: bool) -> Path | None:
        files = [file for file in sorted(path.iterdir()) if re.fullmatch(pattern, file.name)]
        if len(files) > 1 or (needed and not files):
            there = ", ".join(file.name for file in files) or "none"
            raise ValueError(f"{path}: one file {pattern} is wanted; there is {there}")
        return files[0] if files else None

    text, image, words = one(TEXT, True), one(IMAGE, False), one(WORDS, False)
    hints: Fields = {} if image is None else {"trunk": str(image.resolve())}
    tensors = {k: v for file in (text, image) if file is not None for k, v in damsm.read(file).items()}
    return ModelFolder(tensors, hints, text=CaptionWords(str(words)) if words else None)


FORMATS = {
    "damsm": Format(
        _damsm,
        lambda config: damsm.table(config.vocabulary > 0, config.trunk is not None),
        unused=damsm.TRUNK,
        needed=(damsm.TEXT_NEEDED, damsm.IMAGE_NEEDED),
        title="DAMSM, the encoders of AttnGAN, DM-GAN, DF-GAN and SSA-GAN: a folder with text_encoder*.pth, "
        "image_encoder*.pth, and captions.pickle",
        example="FOLDER",
        folder=_folder,
        fit_text=lambda config, text: text and dataclasses.replace(cast(CaptionWords, text), length=config.length),
    ),
}
