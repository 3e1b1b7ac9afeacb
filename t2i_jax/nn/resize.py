"""Resampling of images."""

from __future__ import annotations

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
    rows, columns = (jnp.asarray(_weights(k, m), x.dtype) for k, m in zip(x.shape[1:3], size, strict=True))
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("yi,zj,bijc->byzc", rows, columns, x, precision=precision)


def _weights(k: int, m: int) -> np.ndarray:
    """Weights (m, k) of k inputs in m outputs."""
    place = np.linspace(0, k - 1, m) if m > 1 else np.zeros(1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(k)))
