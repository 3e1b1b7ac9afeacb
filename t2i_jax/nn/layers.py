"""Basic layers. Parameters are fp32; a layer computes in the dtype of its input, norms always in fp32.

Every module is an immutable pytree: it is built from sizes and a key, and `__call__` is pure. `axes` name the
dimensions of a parameter for `t2i_jax.core.sharding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import EllipsisType
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from t2i_jax.core.arrays import Float, Integer, typed
from t2i_jax.nn.stationary import lookup, product, stationary_axes

M = TypeVar("M", bound=nnx.Module)


class ModelState(nnx.Variable):
    """Non-trainable state of a model: codebook averages, running statistics, a table read from a file.

    A loss that updates state returns the model with the new values as `LossOutput.state`; the trainer takes over only
    its `ModelState` leaves.
    """


class Fixed(nnx.Variable):
    """A parameter that is not trained, while adapters are (`nn/lora.py`)."""


def param(value: Array, *axes: str | None) -> nnx.Param:
    """A trainable array whose trailing dimensions carry the names `axes`."""
    return nnx.Param(value, axes=axes)


def position_table(table: Array, *maps: tuple[int, int], prefix: int = 0) -> nnx.Param:
    """A trainable table (n, d) of position vectors: `prefix` rows, then those of each of `maps`, rows and columns of
    tokens in raster order; without `maps` those of a sequence. Training from weights of another grid resizes it by
    them (`training/start.py`)."""
    return nnx.Param(table, axes=("length", "embed"), maps=maps, prefix=prefix)


def replace(module: M, **values: object) -> M:
    """A copy of `module` in which the named attributes hold `values`: arrays or an `Int8` for variables, modules for
    modules."""
    copy = jax.tree.map(lambda leaf: leaf, module)
    for name, value in values.items():
        old = getattr(copy, name)  # in Flax, names of parameters are attributes
        whole = isinstance(value, nnx.Module) or not isinstance(old, nnx.Variable)
        setattr(copy, name, value if whole else old.replace(value))
    return copy


@typed
def normal(key: Array, shape: tuple[int, ...], std: float = 0.02) -> Float[Array, "..."]:
    """Numbers of N(0, std^2)."""
    return std * jax.random.normal(key, shape)


@typed
def fan_in(key: Array, shape: tuple[int, ...], gain: float = 1.0) -> Float[Array, "..."]:
    """Normal with variance `gain**2 / fan_in`; fan_in is the product of all dimensions but the last."""
    return normal(key, shape, gain / math.sqrt(math.prod(shape[:-1])))


def at_least_fp32(x: Array) -> Array:
    """x in fp32, the dtype of norms, softmax and losses; float64 is kept, for gradient checks."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def remat_elementwise(f: Callable[..., Array]) -> Callable[..., Array]:
    """f, with only its arguments kept for the backward pass and the rest recomputed.

    For norms and elementwise operations: their intermediates are several times the size of their inputs, and take
    longer to read than to recompute. For scanned stacks only: elsewhere the compiler may merge both computations (CSE).
    """
    return jax.checkpoint(f, prevent_cse=False)


class Int8(nnx.Module):
    """A matrix (..., d, f) as integers q in -127 .. 127 and a scale per column: w = q scale, accurate to half a scale.

    It replaces a parameter and takes a quarter of its memory; it cannot be trained.
    """

    def __init__(self, w: nnx.Variable):
        axes = w.get_metadata().get("axes", ())
        largest = jnp.abs(w[...]).max(-2, keepdims=True).astype(jnp.float32)
        scale = jnp.where(largest == 0, 1.0, largest) / 127
        self.q = nnx.Variable(jnp.round(w[...] / scale).astype(jnp.int8), axes=axes)
        self.scale = nnx.Variable(scale[..., 0, :], axes=axes[1:])

    def columns(self, choose: Callable[[Array], Array]) -> Int8:
        """Some columns, which `choose` takes from the last dimension of an array."""
        return replace(self, q=choose(self.q[...]), scale=choose(self.scale[...]))


class LowRank(nnx.Module):
    """A matrix (..., d, f) or kernel W as W + scale A B, of which A (..., d, r) and B (..., r, f) are trained (Hu et
    al. 2021, 4.1). It is read like the parameter that it replaces.

    B begins at 0, so W is as it was.
    """

    def __init__(self, w: nnx.Param, rank: int, scale: float, dropout: float, key: Array):
        shape, axes = w.shape, w.get_metadata()["axes"]
        stack = shape[: len(shape) - len(axes)]
        self.base = Fixed(w.get_value(), **w.get_metadata())
        # Uniform with variance 1 / (3 fan-in), as the layers of the published adapters begin.
        bound = math.prod(shape[len(stack) : -1]) ** -0.5
        self.a = param(jax.random.uniform(key, (*shape[:-1], rank), minval=-bound, maxval=bound), *axes[:-1], None)
        self.b = param(jnp.zeros((*stack, rank, shape[-1])), None, axes[-1])
        self.scale, self.dropout = scale, dropout
        self.masks: nnx.Variable | None = nnx.data(None)

    @staticmethod
    def product(a: Array, b: Array) -> Array:
        """A B of a matrix or of a kernel, whose B has no dimensions of pixels."""
        b = b.reshape(*b.shape[:-2], *(1,) * (a.ndim - b.ndim), *b.shape[-2:])
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    def __getitem__(self, index: EllipsisType) -> Array:
        base = self.base[...]
        return (base + self.scale * self.product(self.a[...], self.b[...])).astype(base.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def with_masks(self, key: Array) -> LowRank:
        """The same, with the keys of the inputs that it drops: one for each matrix of a stack."""
        stack = self.b.shape[:-2]
        keys = jax.random.split(key, stack) if stack else key
        return replace(self, masks=nnx.Variable(jax.random.key_data(keys)))

    def columns(self, choose: Callable[[Array], Array]) -> LowRank:
        """Some columns, which `choose` takes from the last dimension of an array."""
        return replace(self, base=choose(self.base[...]), b=choose(self.b[...]))

    def multiply(self, x: Array, dtype: DTypeLike) -> Array:
        """x W, in `dtype`."""
        low = x
        if self.masks is not None:
            keep = jax.random.bernoulli(jax.random.wrap_key_data(self.masks[...]), 1 - self.dropout, x.shape)
            low = jnp.where(keep, x / (1 - self.dropout), 0)
        return matmul(x, self.base, dtype) + self.scale * matmul(matmul(low, self.a), self.b, dtype)


def transposed(w: nnx.Variable) -> nnx.Variable:
    """Transpose a table (v, d) to the output matrix (d, v)."""
    return w.replace(w[...].T, axes=w.get_metadata()["axes"][::-1])


@typed
def matmul(
    x: Float[Array, "*b d"], w: nnx.Variable | Int8 | LowRank, dtype: DTypeLike | None = None
) -> Float[Array, "*b f"]:
    """x w for a matrix (d, f), in `dtype`, or in that of x, accumulated in at least fp32.

    Products with an `Int8` are scaled after the sum, which is exact for a scale per column.
    """
    dtype = x.dtype if dtype is None else dtype
    if isinstance(w, LowRank):
        return w.multiply(x, dtype)
    if isinstance(w, Int8):
        return (matmul(x, w.q, jnp.float32) * w.scale[...]).astype(dtype)
    axes, multiply = stationary_axes(w), partial(jnp.matmul, preferred_element_type=dtype)
    values = w[...].astype(x.dtype)
    return multiply(x, values) if axes is None else product(multiply, x, values, axes)


@typed
def unit(x: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
    """x divided by its length, or by 1e-12 where that is more."""
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))  # 0 has a gradient, unlike of a norm


class Linear(nnx.Module):
    """y = x W + b over the last dimension. `std=None`: fan-in scaling; `std=0`: zeros."""

    def __init__(
        self,
        d: int,
        f: int,
        key: Array,
        *,
        bias: bool = True,
        std: float | None = 0.02,
        axes: tuple[str | None, str | None] = ("embed", "mlp"),
    ):
        w = fan_in(key, (d, f)) if std is None else normal(key, (d, f), std)
        self.w = param(w, *axes)  # or an `Int8` for sampling
        self.b = param(jnp.zeros(f), axes[1]) if bias else None

    def columns(self, choose: Callable[[Array], Array]) -> Linear:
        """The layer of some of its outputs, which `choose` takes from the last dimension of an array."""
        w = self.w.columns(choose) if isinstance(self.w, LowRank | Int8) else choose(self.w[...])
        return replace(self, w=w, **({} if self.b is None else {"b": choose(self.b[...])}))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b f"]:
        y = matmul(x, self.w)
        return y if self.b is None else y + self.b[...].astype(x.dtype)


class Embedding(nnx.Module):
    """A table of v rows, of which the last `special` ones are for no id of a vocabulary: a mask, no class."""

    def __init__(self, v: int, d: int, key: Array, *, std: float = 0.02, special: int = 0):
        self.w = nnx.Param(normal(key, (v, d), std), axes=("vocab", "embed"), special=special)

    @typed
    def __call__(self, ids: Integer[Array, "*b"]) -> Float[Array, "*b d"]:
        return lookup(self.w, ids)


class RMSNorm(nnx.Module):
    """x / sqrt(mean x^2 + eps) * w over the last dimension (Zhang & Sennrich 2019); `affine=False` omits w."""

    def __init__(self, d: int, eps: float = 1e-5, affine: bool = True):
        self.w = param(jnp.ones(d), None) if affine else None
        self.eps = eps

    @typed
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return remat_elementwise(self._normalised)(x, *(() if self.w is None else (self.w[...],)))

    def _normalised(self, x: Array, *w: Array) -> Array:
        y = x.astype(jnp.float32)
        y = (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)).astype(x.dtype)
        return y * w[0].astype(x.dtype) if w else y


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * w + b over the last dimension; `affine=False` omits w and b.

    relax: first scale x so that its largest magnitude is this value, against overflow in narrow dtypes; 0: no scaling.
    """

    def __init__(self, d: int, eps: float = 1e-5, affine: bool = True, relax: float = 0.0):
        self.w = param(jnp.ones(d), None) if affine else None
        self.b = param(jnp.zeros(d), None) if affine else None
        self.eps, self.relax = eps, relax

    @typed
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        affine = () if self.w is None or self.b is None else (self.w[...], self.b[...])
        return remat_elementwise(self._normalised)(x, *affine)

    def _normalised(self, x: Array, *affine: Array) -> Array:
        y = x.astype(jnp.float32)
        if self.relax:
            largest = jax.lax.stop_gradient(jnp.abs(y).max(-1, keepdims=True))
            y = y * (self.relax / jnp.where(largest == 0, 1.0, largest))
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        if affine:
            y = y * affine[0] + affine[1]
        return y.astype(x.dtype)


class GroupNorm(nnx.Module):
    """Normalise over positions and the channels of a group (Wu & He 2018)."""

    def __init__(self, c: int, groups: int = 32, eps: float = 1e-6):
        if c % groups:
            raise ValueError(f"GroupNorm: {c} channels cannot be split into {groups} groups")
        self.w = param(jnp.ones(c), None)
        self.b = param(jnp.zeros(c), None)
        self.groups, self.eps = groups, eps

    @typed
    def __call__(self, x: Float[Array, "b i j c"]) -> Float[Array, "b i j c"]:
        # Statistics per channel first, then per group: reductions stay channel-last, the layout of convolutions.
        y = at_least_fp32(x)
        fold = lambda s: s.reshape(s.shape[0], self.groups, -1).mean(-1, keepdims=True)
        spread = lambda s: jnp.broadcast_to(s, (*s.shape[:2], x.shape[-1] // self.groups)).reshape(s.shape[0], 1, 1, -1)
        mean = spread(fold(y.mean((1, 2))))
        y = y - mean
        scale = jax.lax.rsqrt(spread(fold(jnp.mean(y * y, (1, 2)))) + self.eps)
        return (y * (scale * self.w[...]) + self.b[...]).astype(x.dtype)


class Conv(nnx.Module):
    """2-D convolution, NHWC, with a kernel (k, k, c, f)."""

    def __init__(
        self,
        c: int,
        f: int,
        key: Array,
        *,
        kernel: int = 3,
        stride: int = 1,
        padding: Literal["SAME", "VALID"] | tuple[tuple[int, int], tuple[int, int]] = "SAME",
        bias: bool = True,
        std: float | None = None,
    ):
        shape = (kernel, kernel, c, f)
        self.w = param(fan_in(key, shape) if std is None else normal(key, shape, std), None, None, None, "conv")
        self.b = param(jnp.zeros(f), "conv") if bias else None
        self.stride, self.padding = stride, padding

    @typed
    def __call__(self, x: Float[Array, "b _ _ c"]) -> Float[Array, "b _ _ f"]:
        w = self.w[...].astype(x.dtype)
        if w.shape[:2] == (1, 1) and self.stride == 1:
            y = x @ w[0, 0]  # equal to the convolution, with faster gradients
        else:
            y = jax.lax.conv_general_dilated(
                x, w, (self.stride, self.stride), self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return y if self.b is None else y + self.b[...].astype(x.dtype)
