"""Resampling of images."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from t2i_jax.core.arrays import Float, typed


@typed
def aligned_bilinear(x: Float[Array, "b i j c"], size: tuple[int, int]) -> Float[Array, "b y z c"]:
    """Bilinear interpolation that maps corners to corners, without antialiasing: PyTorch's `align_corners=True`.

    Output n of m lies at n (k - 1) / (m - 1) of the k inputs along its axis. size: rows and columns of the output.
    """
    return _resample(x, size, _aligned)


@typed
def area(x: Float[Array, "b i j c"], size: tuple[int, int]) -> Float[Array, "b y z c"]:
    """Means: output n of m is that of the inputs floor(n k / m) to ceil((n + 1) k / m) of the k along its axis."""
    return _resample(x, size, _means)


@typed
def bicubic(x: Float[Array, "b i j c"], size: tuple[int, int]) -> Float[Array, "b y z c"]:
    """Cubic convolution (Keys 1981) with a = -0.75, between centres of pixels and without antialiasing.

    PyTorch's `bicubic` with `align_corners=False`; that of `jax.image.resize` has a = -0.5.
    """
    return _resample(x, size, _cubic)


def _resample(x: Array, size: tuple[int, int], weights: Callable[[int, int], np.ndarray]) -> Array:
    """weights(k, m): (m, k), of k inputs in m outputs along an axis."""
    rows, columns = (jnp.asarray(weights(k, m), x.dtype) for k, m in zip(x.shape[1:3], size, strict=True))
    return jnp.einsum("yi,zj,bijc->byzc", rows, columns, x, precision=jax.lax.Precision.HIGHEST)


def _aligned(k: int, m: int) -> np.ndarray:
    place = np.linspace(0, k - 1, m) if m > 1 else np.zeros(1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(k)))


def _means(k: int, m: int) -> np.ndarray:
    n, inputs = np.arange(m)[:, None], np.arange(k)
    covered = (inputs >= n * k // m) & (inputs < -(-(n + 1) * k // m))
    return covered / covered.sum(1, keepdims=True)


def _cubic(k: int, m: int, a: float = -0.75) -> np.ndarray:
    place = (np.arange(m) + 0.5) * k / m - 0.5
    taps = np.floor(place)[:, None] + np.arange(-1, 3)
    d = np.abs(place[:, None] - taps)
    near, far = ((a + 2) * d - (a + 3)) * d**2 + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    weights = np.zeros((m, k))
    # Beyond the edges, the pixels of the edges are repeated.
    np.add.at(weights, (np.arange(m)[:, None], np.clip(taps, 0, k - 1).astype(int)), np.where(d <= 1, near, far))
    return weights
