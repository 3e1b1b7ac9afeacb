"""Arrays by name into a model, with every misfit named; batch norms into the convolutions before them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from t2i_jax.nn.trees import named, rebuild


def assemble(build: Callable[[Array], Any], arrays: Mapping[str, np.ndarray], source: str) -> Any:
    """The model that `build(key)` would make, holding `arrays` by the dotted names of its variables.

    Errors: `ValueError` with `source` and the names that are missing, left over, or of another shape.
    """
    abstract = jax.eval_shape(build, jax.random.key(0))
    wanted = named(abstract)
    wrong = [f"missing: {k}" for k in wanted if k not in arrays] + [f"unused: {k}" for k in arrays if k not in wanted]
    wrong += [
        f"{k}: {arrays[k].shape} in the file, {v.shape} in the model"
        for k, v in wanted.items()
        if k in arrays and arrays[k].shape != v.shape
    ]
    if wrong:
        raise ValueError(f"{source} does not fit this model:\n  " + "\n  ".join(wrong[:20]))
    fill = lambda k, v: jax.tree.map(lambda leaf: jnp.asarray(arrays[k], leaf.dtype), v)
    return rebuild(abstract, {k: fill(k, v) for k, v in wanted.items()})


def folded(weights: Mapping[str, np.ndarray], conv: str, norm: str, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """A PyTorch convolution (f, c, k, k) with the batch norm behind it, as one kernel (k, k, c, f) and bias (f,)."""
    get = lambda name: np.asarray(weights[f"{norm}.{name}"], np.float64)
    scale = get("weight") / np.sqrt(get("running_var") + eps)
    kernel = np.transpose(weights[f"{conv}.weight"], (2, 3, 1, 0)) * scale
    return kernel.astype(np.float32), (get("bias") - get("running_mean") * scale).astype(np.float32)
