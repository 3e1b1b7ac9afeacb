"""What happens to one record: decode the picture, crop it, perhaps mirror it, choose a caption."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageOps

from t2i_jax.data.records import DataError


def open_image(image: bytes | np.ndarray, size: int = 0) -> Image.Image:
    """An RGB picture from a picture file or uint8 (i, j), (i, j, c); transparency is laid on white.

    A JPEG may come out smaller than it is, never with a short side below `size` (decoding is then several times
    faster). Errors: `DataError` or an error of pillow for what is no whole picture.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise DataError(f"a picture array must be uint8 (i, j, c), not {image.dtype} {image.shape}")
        picture = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
    elif isinstance(image, bytes):
        picture = Image.open(io.BytesIO(image))
        if size:
            picture.draft("RGB", (size, size))
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
    else:
        raise DataError(f"a picture must be bytes or an array, not {type(image).__name__}")
    if picture.mode.startswith("I;16"):  # pillow would clip 16-bit grey at 255
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        picture = white
    return picture.convert("RGB")


def to_square(picture: Image.Image, size: int, rng: Generator | None = None, smallest: float = 1.0) -> np.ndarray:
    """A square crop at `size`: uint8 (size, size, 3).

    Without `rng` the centre at full short side. With it a random place, its side drawn from [smallest, 1] of the short
    side; the picture's own aspect is kept either way.
    """
    w, h = picture.size
    side = min(w, h) * (rng.uniform(smallest, 1.0) if rng is not None and smallest < 1 else 1.0)
    x, y = rng.uniform(0, 1, 2) if rng is not None else (0.5, 0.5)
    left, top = x * (w - side), y * (h - side)
    if (w, h) != (size, size) or side != size:
        box = (left, top, left + side, top + side)
        picture = picture.resize((size, size), Image.Resampling.LANCZOS, box=box)
    return np.asarray(picture)


@lru_cache
def _words(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)


def may_flip(captions: Sequence[str], exceptions: tuple[str, ...]) -> bool:
    """Whether a mirrored picture still is what its captions say: none of them has one of the words."""
    return not exceptions or not any(_words(exceptions).search(c) for c in captions)


def choose_caption(captions: Sequence[str] | None, rng: Generator | None = None) -> str:
    """One caption of several: the first without `rng`. Errors: `DataError` if there is none, or it is no string."""
    if not captions:
        raise DataError("the record has no caption")
    caption = captions[int(rng.integers(len(captions))) if rng is not None else 0]
    if not isinstance(caption, str):
        raise DataError(f"a caption must be a string, not {type(caption).__name__}")
    return caption
