"""Inpainting arguments of samplers: `known` and `keep`, the same for every family."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from t2i_jax.core.specs import SampleSpec, Shaped
from t2i_jax.core.types import Capabilities


def check_keep(can: Capabilities, spec: SampleSpec, b: int, keep: Shaped) -> None:
    """Check the mask of tokens to keep.

    Errors: ValueError for a `keep` that is not bool (b, rows, columns) of tokens; and, outside of `jit`, for one that a
    family in raster order cannot keep.
    """
    shape = (b, *spec.tokens)
    if keep.shape != shape or keep.dtype != bool:
        raise ValueError(
            f"keep has the shape {keep.shape} and dtype {keep.dtype}: bool {shape}, True for tokens to keep"
        )
    if not can.inpaint_prefix or isinstance(keep, Tracer):
        return
    flat = np.asarray(keep).reshape(b, -1)
    if (flat[:, 1:] > flat[:, :-1]).any():
        raise ValueError("a model that samples in raster order keeps the first tokens only, and cannot fill holes")


def known_and_keep(
    can: Capabilities, spec: SampleSpec, b: int, known: Array | None, keep: Array | None
) -> tuple[Array, Array]:
    """Samples (b, *grid, ...) and a bool (b, rows, columns) of tokens to keep; all False where neither is given.

    Errors: ValueError for one without the other, for a wrong shape, and for tokens that cannot be kept.
    """
    if known is None and keep is None:
        return jnp.zeros((b, *spec.shape), spec.code.dtype), jnp.zeros((b, *spec.tokens), bool)
    if known is None or keep is None:
        raise ValueError("known and keep go together: codes, and which tokens of them to keep")
    check_keep(can, spec, b, keep)
    if known.shape != (b, *spec.shape):
        raise ValueError(f"known has the shape {known.shape}: {(b, *spec.shape)} is needed")
    return known, keep
