"""Named feature spaces: images to vectors, the same way for every model that is measured."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from t2i_jax.core.arrays import Float, Shaped, UInt8, typed
from t2i_jax.core.console import bar
from t2i_jax.core.errors import ConfigError
from t2i_jax.data.records import Record
from t2i_jax.interop.efficientnet import load_efficientnet
from t2i_jax.interop.inception import load_inception

SIZES = {"efficientnet_lite0": 128, "inception": 299, "pixels": 16}


def batches(count: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Rows int (size,) of each batch of `count` things, and how many are its own: the last batch is filled up with the
    last row, so that one program serves all."""
    for at in range(0, count, size):
        yield np.minimum(np.arange(at, at + size), count - 1), min(size, count - at)


@typed
def in_batches(
    function: Callable[[np.ndarray], ArrayLike], images: Shaped[np.ndarray, " n *x"], size: int, title: str
) -> Shaped[np.ndarray, " n *y"]:
    """`function`, by which no image depends on others, over batches of one size, with a bar."""
    parts = []
    with bar() as progress:
        task = progress.add_task(title, total=len(images))
        for rows, count in batches(len(images), size):
            parts.append(np.asarray(function(images[rows]))[:count])
            progress.advance(task, count)
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class Space:
    """A loaded feature space: `space(images)` uint8 (n, i, j, 3) -> float32 (n, d)."""

    name: str
    batch: int
    apply: Callable[[np.ndarray], Array]
    """uint8 (b, i, j, 3) -> (b, d), jitted"""
    classify: Callable[[Array], Array] | None = None
    """features (n, d) -> class logits (n, v); None where the space has no classifier"""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        check_images(images)
        return in_batches(self.apply, images, self.batch, f"features: {self.name}")

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


@typed
def pixels(images: UInt8[Array, "b i j 3"], size: int) -> Float[Array, "b {size}*{size}*3"]:
    """uint8 (b, i, j, 3) -> the images averaged down to `size`, as vectors in [0, 1] (b, size * size * 3)."""
    x = jax.image.resize(images.astype(jnp.float32), (len(images), size, size, 3), "linear", antialias=True)
    return x.reshape(len(images), -1) / 255


def space_of(name: str) -> FeatureNetwork:
    """A feature space by name; `inception:FILE` brings its weights."""
    kind, _, weights = name.partition(":")
    return FeatureNetwork(kind, weights=weights)  # pyright: ignore[reportArgumentType]


@typed
def images_of(records: Sequence[Record]) -> UInt8[np.ndarray, "n i j 3"]:
    """The images of records, uint8 (n, i, j, 3). Errors: `ConfigError` for a record without one."""
    if any("image" not in record for record in records):
        raise ConfigError("the data has codes and no images: name a config with images")
    return np.stack([record["image"] for record in records])


def check_images(images: np.ndarray, name: str = "images") -> None:
    """Errors: `ValueError` unless `images` is uint8 (n, i, j, 3) with n > 0."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"{name}: uint8 (n, i, j, 3) with n > 0 is wanted, not {images.dtype} {images.shape}")
