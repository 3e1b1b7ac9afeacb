"""Edits of a given image, and images that new ones are to be like: arguments of a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from t2i_jax.core.conditions import Tokenizer
from t2i_jax.core.config import ConfigError, refused
from t2i_jax.core.fields import Checked, Share
from t2i_jax.core.narrow import embeds_images, image_to_image, inpainting, learns_from_images
from t2i_jax.core.types import Codec, Family, SamplingOptions
from t2i_jax.sampling.inpainting import check_keep
from t2i_jax.sampling.interpolation import slerp


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


Embed = Callable[[np.ndarray], np.ndarray]
"""The embedding fp32 (..., k) of an image uint8 (i, j, 3)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Vary:
    """Images like a given one: its embedding takes the place of that of the caption, or of that which a prior draws
    (Ramesh et al. 2022, DALL-E 2, 3.1)."""

    image: np.ndarray
    """uint8 (i, j, 3), of any size"""

    @property
    def images(self) -> tuple[np.ndarray, ...]:
        return (self.image,)

    def embedding(self, embed: Embed) -> np.ndarray:
        """The embedding (..., k)."""
        return embed(self.image)


@dataclasses.dataclass(frozen=True, eq=False)
class Blend(Checked):
    """Images between two given ones, whose embeddings are interpolated along a great circle (Ramesh et al. 2022,
    3.2)."""

    image: np.ndarray
    """uint8 (i, j, 3), of any size"""
    other: np.ndarray
    share: Share = 0.5
    """0: like the first; 1: like the other"""

    @property
    def images(self) -> tuple[np.ndarray, ...]:
        return self.image, self.other

    def embedding(self, embed: Embed) -> np.ndarray:
        """The embedding (..., k)."""
        return along_circle(embed(self.image), embed(self.other), self.share)


Like = Vary | Blend


def along_circle(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """From vectors a (..., k) to b (..., k) by angle (Shoemake 1985, slerp), and from the length of a to that of b."""
    rows = [x.reshape(-1, x.shape[-1]).astype(np.float32) for x in (a, b)]
    lengths = [np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in rows]
    first, last = (jnp.asarray(x / length) for x, length in zip(rows, lengths, strict=True))
    direction = slerp(first, last, jnp.full(len(first), share, jnp.float32))
    length = (1 - share) * lengths[0] + share * lengths[1]
    return (np.asarray(direction) * length).astype(np.float32).reshape(a.shape)


def embedding_field(family: Family, text: Tokenizer | None) -> str:
    """The field that embeddings of images are: `features` of the condition, or the argument `image_features`.

    Errors: `ConfigError` for a family that reads no embeddings of images, and a text side that makes none.
    """
    if learns_from_images(text) and "features" in family.condition_spec():
        return "features"
    if not family.capabilities.image_embedding:
        raise ConfigError(f"a {type(family).__name__} on this text side reads no embeddings of images; an UnCLIP does")
    if not embeds_images(text):
        raise ConfigError("the text side has no encoder of images, only of captions")
    return "image_features"
