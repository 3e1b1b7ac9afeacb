"""The convolutions of VGG16, whose features measure how similar two images look."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Weights = Array | np.ndarray


class VGGTrunk(NamedTuple):
    """Frozen convolutions of VGG16 (Simonyan & Zisserman 2015); scales of the input are folded into the first."""

    shift: Weights
    """(3,) mean colour, in [-1, 1]"""
    blocks: tuple[tuple[tuple[Weights, Weights], ...], ...]
    """per block, per convolution: kernel (3, 3, c, f), bias (f,)"""
    heads: tuple[Weights, ...]
    """per block: the weight (f,) of each channel's difference"""


def features(trunk: VGGTrunk, images: Array) -> list[Array]:
    """Images (b, i, j, 3) in [-1, 1] -> the last activation of each block, at full, half, quarter ... resolution."""
    smallest = 2 ** (len(trunk.blocks) - 1)
    if min(images.shape[1:3]) < smallest:
        raise ValueError(
            f"images of {images.shape[1:3]} are too small for {len(trunk.blocks)} blocks: from {smallest} on"
        )
    x, taps = images - trunk.shift.astype(images.dtype), []
    for block in trunk.blocks:
        if taps:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for w, b in block:
            x = jax.lax.conv_general_dilated(
                x, jnp.asarray(w, x.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + b.astype(x.dtype))
        taps.append(x)
    return taps
