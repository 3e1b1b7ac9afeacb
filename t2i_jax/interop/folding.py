"""Networks whose batch norms are folded into the convolutions before them."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from flax import nnx
from jax import Array

from t2i_jax.core.params import assemble
from t2i_jax.interop.names import require, warn_not_finite

M = TypeVar("M", bound=nnx.Module)
EPS = 1e-3


def folded(weights: Mapping[str, np.ndarray], conv: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
    """A PyTorch convolution (f, c, k, k) with the batch norm after it, as one kernel (k, k, c, f) and bias (f,)."""
    get = lambda name: np.asarray(weights[f"{norm}.{name}"], np.float64)
    scale = get("weight") / np.sqrt(get("running_var") + EPS)
    kernel = np.transpose(weights[f"{conv}.weight"], (2, 3, 1, 0)) * scale
    return kernel.astype(np.float32), (get("bias") - get("running_mean") * scale).astype(np.float32)


def network(
    build: Callable[[Array], M],
    weights: Mapping[str, np.ndarray],
    units: Mapping[str, tuple[str, str]],
    fc: str,
    needed: Sequence[str],
    what: str,
    source: str,
) -> M:
    """The network that `build(key)` would make, with the weights of a state dict.

    units: our names of convolutions, and theirs of the convolution and its norm; fc: theirs of the last matrix, "" if
    there is none. needed, what, source: as for `names.require`. Errors: ValueError naming what is missing.
    """
    require(weights, needed, what, source)
    arrays: dict[str, np.ndarray] = {}
    try:
        for ours, (conv, norm) in units.items():
            kernel, arrays[f"{ours}.b"] = folded(weights, conv, norm)
            arrays[f"{ours}.w"] = kernel[:, :, 0] if kernel.shape[2] == 1 else kernel  # (k, k, f) where it is depthwise
        arrays |= {"fc.w": weights[f"{fc}.weight"].T, "fc.b": weights[f"{fc}.bias"]} if fc else {}
    except KeyError as missing:
        raise ValueError(f"{source} is {what}: it has no {missing}") from None
    warn_not_finite(arrays.items(), source)
    return assemble(build, arrays, source)
