"""Batch norms folded into the convolutions before them."""

from collections.abc import Mapping

import numpy as np


def folded(weights: Mapping[str, np.ndarray], conv: str, norm: str, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """A PyTorch convolution (f, c, k, k) with the batch norm after it, as one kernel (k, k, c, f) and bias (f,)."""
    get = lambda name: np.asarray(weights[f"{norm}.{name}"], np.float64)
    scale = get("weight") / np.sqrt(get("running_var") + eps)
    kernel = np.transpose(weights[f"{conv}.weight"], (2, 3, 1, 0)) * scale
    return kernel.astype(np.float32), (get("bias") - get("running_mean") * scale).astype(np.float32)
