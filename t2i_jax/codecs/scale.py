"""The scale of continuous codes."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


def standardising(moments: Callable[[Array], tuple[Array, Array]], batches: Iterable[ArrayLike]) -> tuple[float, float]:
    """(scale, shift) that give the codes of images mean 0 and variance 1 as (code - shift) scale.

    moments: images (b, i, j, 3) -> the means of their codes and of their squares. Errors: `ValueError` without images.
    """
    compiled = jax.jit(moments)
    found = np.asarray([jax.device_get(compiled(jnp.asarray(images))) for images in batches], np.float64)
    if not len(found):
        raise ValueError("there are no images to measure the scale on")
    mean, square = found.mean(0)
    return float((square - mean**2) ** -0.5), float(mean)
