"""What happens to one record: crop its image, perhaps mirror it, choose a caption."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image

from t2i_jax.data.images import open_image as open_image
from t2i_jax.data.records import DataError, as_captions


class Crop(NamedTuple):
    """A part of an image, as shares of its sides."""

    top: float
    left: float
    height: float
    width: float

    def numbers(self, original: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
        """What a model reads of it, float32 (4,): rows and columns of the original image, then rows above and columns
        left of the crop in pixels of the image as it was scaled for `shape`."""
        above, left = self.top / self.height * shape[0], self.left / self.width * shape[1]
        return np.asarray([*original, above, left], np.float32)


def to_shape(
    image: Image.Image, shape: tuple[int, int], rng: Generator | None = None, smallest: float = 1.0
) -> tuple[np.ndarray, Crop]:
    """A crop of an RGB image at `shape`, rows and columns: uint8 (*shape, 3), and which part it is.

    Without `rng` the largest one of that ratio of sides, in the middle. With it one at a random place, its sides drawn
    from [smallest, 1] of the largest; the image's own aspect is kept either way.
    """
    rows, columns = shape
    start_x, start_y, end_x, end_y = image.info.get("box", (0, 0, *image.size))
    w, h = end_x - start_x, end_y - start_y
    share = rng.uniform(smallest, 1.0) if rng is not None and smallest < 1 else 1.0
    width, height = min(w, h * (columns / rows)) * share, min(h, w * (rows / columns)) * share
    x, y = rng.uniform(0, 1, 2) if rng is not None else (0.5, 0.5)
    left, top = start_x + x * (w - width), start_y + y * (h - height)
    if (w, h) != (columns, rows) or (width, height) != (columns, rows):
        box = (left, top, left + width, top + height)
        image = image.resize((columns, rows), Image.Resampling.LANCZOS, box=box)
    return np.asarray(image), Crop((top - start_y) / h, (left - start_x) / w, height / h, width / w)


def to_square(image: Image.Image, size: int, rng: Generator | None = None, smallest: float = 1.0) -> np.ndarray:
    """`to_shape` of a square: uint8 (size, size, 3)."""
    return to_shape(image, (size, size), rng, smallest)[0]


@lru_cache
def _words(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)


def may_flip(captions: Sequence[str], exceptions: tuple[str, ...]) -> bool:
    """Whether an image may be mirrored: none of its captions has one of the words."""
    return not exceptions or not any(_words(exceptions).search(c) for c in captions)


def choose_caption(
    captions: object, rng: Generator | None = None, empty: bool = False, weights: Sequence[float] = ()
) -> str:
    """One caption of several that are not blank: the first without `rng`.

    empty: "" where there is none. weights: of all of them, how often each is drawn; () is equally often. Errors:
    `DataError` that says why there is none, or none that is text.
    """
    found = as_captions(captions)
    places = [n for n, caption in enumerate(found) if caption]
    if found.fault or not (places or empty):
        raise DataError(found.fault or found.missing)
    if not places:
        return ""
    if rng is None:
        return found[places[0]]
    if len(weights) == len(found):
        return found[places[choose_row([weights[n] for n in places], rng)]]
    return found[places[int(rng.integers(len(places)))]]


def choose_row(weights: Sequence[float], rng: Generator) -> int:
    """A place of `weights`, drawn in proportion to them."""
    ends = np.cumsum(np.asarray(weights, float))
    return min(int(np.searchsorted(ends, rng.uniform() * ends[-1], side="right")), len(ends) - 1)
