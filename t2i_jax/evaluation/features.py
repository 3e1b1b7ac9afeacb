"""Named feature spaces: images to vectors, the same way for every model that is measured."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import rich
from jax import Array
from rich.progress import track

from t2i_jax.interop.efficientnet import load_efficientnet
from t2i_jax.interop.inception import load_inception

SIZES = {"efficientnet_lite0": 128, "inception": 299, "pixels": 16}


@dataclasses.dataclass(frozen=True)
class Space:
    """A loaded feature space: `space(images)` uint8 (n, i, j, 3) -> float32 (n, d)."""

    name: str
    batch: int
    apply: Callable[[np.ndarray], Array]
    """uint8 (b, i, j, 3) -> (b, d), jitted"""
    classify: Callable[[Array], Array] | None = None
    """features (n, d) -> class logits (n, v); None where the space has no classifier"""

    def __call__(self, images: np.ndarray, progress: bool = True) -> np.ndarray:
        check_images(images)
        n = len(images)
        chunks = []
        starts = range(0, n, self.batch)
        silent = not progress or not rich.get_console().is_terminal
        for start in track(starts, f"features: {self.name}", transient=True, disable=silent):
            chunk = images[start : start + self.batch]
            # The last batch is padded, not compiled for; features of an image do not depend on the others.
            fill = np.zeros((self.batch - len(chunk), *chunk.shape[1:]), np.uint8)
            chunks.append(self.apply(np.concatenate([chunk, fill])))
        return np.concatenate([np.asarray(c) for c in chunks])[:n]

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Class logits (n, v) from the features of this space. Errors: `ValueError` where it has no classifier."""
        if self.classify is None:
            raise ValueError(f"{self.name} has no classifier")
        return np.asarray(self.classify(jnp.asarray(features)))


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A feature space; `load()` reads the weights.

    `efficientnet_lite0`: 1280 pooled features (ImageNet-1k); weights come as a pip package. `inception`: the 2048 of
    the FID, comparable with published numbers; needs `weights`, the file of pytorch-fid. `pixels`: no network, the
    image averaged down; the baseline that shows how much of a number is similarity of colours.
    """

    name: Literal["efficientnet_lite0", "inception", "pixels"] = "efficientnet_lite0"
    size: int = 0
    """side that images are resized to; 0: 128 for efficientnet_lite0, 299 for inception, 16 for pixels"""
    weights: str = ""
    """weights file; empty: the installed package (efficientnet_lite0)"""
    batch: int = 64
    """images of a batch"""

    @property
    def title(self) -> str:
        """Name and size: numbers of two sizes are not comparable."""
        return f"{self.name}@{self.size or SIZES[self.name]}"

    def load(self) -> Space:
        """The space with its weights. Errors: `ValueError`, `FileNotFoundError` name what is missing."""
        if self.name not in SIZES:
            raise ValueError(f"features.name={self.name!r}: one of {', '.join(SIZES)}")
        size = self.size or SIZES[self.name]
        if self.name == "pixels":
            return Space(self.title, self.batch, jax.jit(lambda x: pixels(x, size)))
        if self.name == "inception":
            if not self.weights:
                raise ValueError("features.weights: inception needs pytorch-fid's pt_inception-2015-12-05-6726825d.pth")
            model = load_inception(self.weights)
        else:
            model = load_efficientnet(self.weights or None)
        # The model is an argument and not a closure: as constants, its weights would be compiled in.
        step = jax.jit(lambda model, x: model(x.astype(jnp.float32), size))
        return Space(self.title, self.batch, lambda x: step(model, x), jax.jit(model.logits))


def pixels(images: Array, size: int) -> Array:
    """uint8 (b, i, j, 3) -> the images averaged down to `size`, as vectors in [0, 1] (b, size * size * 3)."""
    x = jax.image.resize(images.astype(jnp.float32), (len(images), size, size, 3), "linear", antialias=True)
    return x.reshape(len(images), -1) / 255


def check_images(images: np.ndarray, name: str = "images") -> None:
    """Errors: `ValueError` unless `images` is uint8 (n, i, j, 3) with n > 0."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"{name}: uint8 (n, i, j, 3) with n > 0 is wanted, not {images.dtype} {images.shape}")
