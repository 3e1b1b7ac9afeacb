"""Edits of a given image: arguments of a pipeline."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from t2i_jax.core.config import ConfigError, refused
from t2i_jax.core.narrow import image_to_image, inpainting
from t2i_jax.core.types import Codec, Family, SamplingOptions
from t2i_jax.sampling.inpainting import check_keep


@dataclasses.dataclass(frozen=True, eq=False)
class Inpaint:
    """Sample the masked part of an image and keep the rest: inpainting, or outpainting."""

    image: np.ndarray
    """uint8 (i, j, 3), of the model's size"""
    mask: np.ndarray
    """bool (i, j), True where to sample; a token is sampled if any of its pixels is"""

    def editable(self, family: Family) -> Family:
        """The family. Errors: `ConfigError` for one that cannot keep a part of an image."""
        return inpainting(family)

    def override(self, options: SamplingOptions) -> SamplingOptions:
        """Sampling options with those of the edit."""
        return options


@dataclasses.dataclass(frozen=True, eq=False)
class InitImage:
    """Sample from a noised version of an image (Meng et al. 2022, SDEdit)."""

    image: np.ndarray
    """uint8 (i, j, 3), of the model's size"""
    strength: float | None = None
    """share of the steps, in (0, 1]: more of them change the image more; None: that of the options"""

    @property
    def mask(self) -> np.ndarray:
        """All of the image is sampled."""
        return np.ones(self.image.shape[:2], bool)

    def editable(self, family: Family) -> Family:
        """The family. Errors: `ConfigError` for one that cannot start from an image."""
        return image_to_image(inpainting(family))

    def override(self, options: SamplingOptions) -> SamplingOptions:
        """Sampling options with those of the edit."""
        return options if self.strength is None else dataclasses.replace(options, strength=self.strength)


Edit = Inpaint | InitImage


def tokens_to_keep(edit: Edit, family: Family, codec: Codec | None) -> np.ndarray:
    """The tokens that an edit keeps, bool (1, rows, columns); family: `Edit.editable`.

    Errors: `ConfigError` for an image or a mask of another shape or dtype than the model's, and for a mask that makes a
    family in raster order keep tokens after a hole.
    """
    spec, factor = family.sample_spec(), codec.spec.factor if codec else 1
    size = tuple(n * factor for n in spec.grid)
    for what, given, shape, dtype in (("image", edit.image, (*size, 3), np.uint8), ("mask", edit.mask, size, np.bool_)):
        if given.shape != shape:
            raise ConfigError(f"the {what} has the shape {given.shape}; this model draws images of {shape}")
        if given.dtype != dtype:
            raise ConfigError(f"the {what} has the dtype {given.dtype}: {np.dtype(dtype)} is needed")
    rows, columns = spec.tokens
    drawn = edit.mask.reshape(1, rows, size[0] // rows, columns, size[1] // columns)
    keep = np.logical_not(np.any(drawn, axis=(2, 4)))
    with refused():
        check_keep(family.capabilities, spec, 1, keep)
    return keep


def digest(edit: Edit) -> str:
    """Sixteen hexadecimal digits that identify the image and the mask."""
    return hashlib.sha256(edit.image.tobytes() + edit.mask.tobytes()).hexdigest()[:16]
