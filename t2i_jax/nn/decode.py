"""Matrix products for few rows, as in decoding one token of each image, and int8 weights for them."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from t2i_jax.core.arrays import Float, Num, typed
from t2i_jax.nn.layers import Int8, Linear, replace
from t2i_jax.nn.stationary import at_rest, product, stationary_axes, stays
from t2i_jax.nn.transformer import Block, unstack

M = TypeVar("M")


def int8_weights(model: M) -> M:
    """`model` with an `Int8` in place of the matrix of every `Linear` and of every output matrix over a vocabulary.

    A table that also serves as the output matrix is left unquantised. Otherwise the model scores and samples as before,
    up to rounding.
    """

    def one(m: object) -> object:
        if isinstance(m, Linear):
            return replace(m, w=Int8(m.w))
        if isinstance(m, nnx.Variable) and m.get_metadata().get("axes") == ("embed", "vocab"):
            return Int8(m)
        return m

    return jax.tree.map(one, model, is_leaf=lambda m: isinstance(m, Linear | nnx.Variable))


@typed
def matvec(x: Float[Array, "*b d"], w: Num[Array, "f d"], dtype: DTypeLike | None = None) -> Float[Array, "*b f"]:
    """x w^T in `dtype`, or in that of x.

    This product is bound by reading the weights. A CPU reads them fastest row by row with the few columns of x^T in
    cache: twice as fast as x @ w at 8 rows. The barrier keeps the compiler from transposing the product back.
    """
    f, d = w.shape
    product = partial(jnp.matmul, preferred_element_type=dtype or x.dtype)

    def on_cpu(x: Array, w: Array) -> Array:
        if w.dtype == x.dtype:
            y = product(w, x.T)
        else:  # a CPU materialises the integers as floats: do so in chunks of rows that fit its cache
            least = -(-f * d // 2**18)
            parts = next((n for n in range(least, 4 * least) if f % n == 0), 1)
            y = jax.lax.map(lambda rows: product(rows.astype(x.dtype), x.T), w.reshape(parts, -1, d))
        return jax.lax.optimization_barrier(y.reshape(f, -1)).T

    y = jax.lax.platform_dependent(
        x.reshape(-1, d), w, cpu=on_cpu, default=lambda x, w: product(x, w.T.astype(x.dtype))
    )
    return y.reshape(*x.shape[:-1], f)


class DecodeLinear(nnx.Module):
    """x W + b as in `Linear`, with weights transposed and cast for `matvec`; the result in dtype `out`, or that of x.

    Weights that `weight_stationary` has marked are cast and sharded for its `product`, not transposed.
    """

    def __init__(self, w: nnx.Variable | Int8, b: nnx.Variable | None, dtype: DTypeLike, out: DTypeLike | None = None):
        values = w.q if isinstance(w, Int8) else w
        self.axes = stationary_axes(values)
        cast = (lambda x: x) if isinstance(w, Int8) else lambda x: x.astype(dtype)
        axes = self.axes
        self.w = nnx.Variable(cast(values[...].T) if axes is None else at_rest(cast(values[...]), axes))
        self.scale = nnx.Variable(w.scale[...]) if isinstance(w, Int8) else None
        self.b = None if b is None else nnx.Variable(b[...].astype(out or dtype))
        self.out = out

    @typed
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b f"]:
        out = self.out or x.dtype
        if self.scale is None:
            y = self._product(x, out)
        else:
            y = (self._product(x, jnp.float32) * self.scale[...]).astype(out)
        return y if self.b is None else y + self.b[...]

    def _product(self, x: Array, dtype: DTypeLike) -> Array:
        if self.axes is None:
            return matvec(x, self.w[...], dtype)
        multiply = lambda x, w: jnp.matmul(x, w.astype(x.dtype), preferred_element_type=dtype)
        return product(multiply, x, self.w[...], self.axes)


def prepare_for_decode(module: M, dtype: DTypeLike) -> M:
    """`module` with every `Linear` as `DecodeLinear` and other arrays in `dtype`; done once, before the first token."""
    linear = lambda m: isinstance(m, Linear)
    cast = lambda x: x.astype(dtype)
    return jax.tree.map(lambda m: DecodeLinear(m.w, m.b, dtype) if linear(m) else cast(m), module, is_leaf=linear)


def prepare_layers_for_decode(blocks: Block, dtype: DTypeLike) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    """The unstacked layers: for prefill, which has many tokens, and for the decoding steps.

    Weights are unstacked, transposed and cast once, not at every token. Where the mesh splits them over `fsdp`, the
    same copy serves both.
    """
    whole = unstack(blocks)
    decoding = prepare_for_decode(whole, dtype)
    return decoding if stays(blocks) else whole, decoding
