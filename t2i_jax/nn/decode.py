"""Matrix products for few rows at a time, as when one token of each image is decoded."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t2i_jax.nn.layers import Linear


def few_rows(x: Array, w: Array, dtype: Any = None) -> Array:
    """x w^T for x (..., d) and w (f, d): (..., f) in `dtype`, or in that of x.

    Such a product only reads the weights, and a CPU reads them fastest row by row with the few columns of x^T at hand:
    twice as fast as x @ w at 8 rows. The barrier is for the compiler, which would turn the product back.
    """
    product = partial(jnp.matmul, preferred_element_type=dtype or x.dtype)
    y = jax.lax.platform_dependent(
        x.reshape(-1, x.shape[-1]),
        w,
        cpu=lambda x, w: jax.lax.optimization_barrier(product(w, x.T)).T,
        default=lambda x, w: product(x, w.T),
    )
    return y.reshape(*x.shape[:-1], -1)


class FewRows(nnx.Module):
    """A `Linear` with its weights turned and cast for `few_rows`."""

    def __init__(self, linear: Linear, dtype: Any):
        self.w = nnx.Variable(linear.w[...].T.astype(dtype))
        self.b = None if linear.b is None else nnx.Variable(linear.b[...].astype(dtype))

    def __call__(self, x: Array) -> Array:
        y = few_rows(x, self.w[...])
        return y if self.b is None else y + self.b[...]


def for_decoding(module: Any, dtype: Any) -> Any:
    """`module` with every `Linear` as `FewRows` and every other array in `dtype`: done once, before the first token."""
    linear = lambda m: isinstance(m, Linear)
    cast = lambda x: x.astype(dtype)
    return jax.tree.map(lambda m: FewRows(m, dtype) if linear(m) else cast(m), module, is_leaf=linear)
