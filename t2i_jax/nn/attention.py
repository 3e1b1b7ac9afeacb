"""Attention, by einsums or a fused kernel of the platform, and rotary position embeddings.

Letters: b batch, t queries, s keys, n query heads, m key-value heads (m divides n), h head dimension.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array

from t2i_jax.core.arrays import Bool, Float, typed
from t2i_jax.nn import kernels
from t2i_jax.nn.kernels import Kind
from t2i_jax.nn.layers import at_least_fp32, remat_elementwise

Rotary = tuple[Array, Array]
"""cos and sin of the angles, each (t, h/2), or (b, t, h/2) where positions differ between rows of the batch."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Causal:
    """Causal mask, described structurally so that fused kernels can apply it."""

    valid: Array | None = None
    """bool (b, t), False for padding, which only itself attends to; None: no padding"""
    prefix: int = dataclasses.field(default=0, metadata={"static": True})
    """static upper bound: all padding and all bidirectional positions are among the first `prefix`"""
    bidirectional_prefix: int = dataclasses.field(default=0, metadata={"static": True})
    """number of leading positions that attend to each other in both directions (prefix-LM)"""

    @typed
    def dense(self, t: int) -> Bool[Array, "_ 1 {t} {t}"]:
        """The mask of the first t positions."""
        mask, early = causal(t), jnp.arange(t) < self.bidirectional_prefix
        mask = mask | early & early[:, None] if self.bidirectional_prefix else mask
        return mask if self.valid is None else mask & self.valid[:, None, None, :t] | jnp.eye(t, dtype=bool)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Padding:
    """Padding mask, described structurally: every query attends to every key that is not padding."""

    valid: Array
    """bool (b, s), False for padding"""

    @typed
    def dense(self, t: int) -> Bool[Array, "b 1 1 s"]:
        """The mask, the same for all t queries."""
        return self.valid[:, None, None]


MaskSpec = Causal | Padding
"""Structured masks."""


@typed
def attend(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s m h"],
    v: Float[Array, "b s m h"],
    mask: Bool[Array, "_ _ _ s"] | MaskSpec | None = None,
    scale: float | None = None,
    bias: Float[Array, "_ n t s"] | None = None,
    kind: Kind = "auto",
) -> Float[Array, "b t n h"]:
    """softmax(q k^T scale + bias) v for all heads, in the dtype of v; see `plain`.

    A fused kernel may compute it where there is no bias and the mask is None or structured. `kind` selects the kernel;
    "auto" takes that of the platform for sequences long enough to benefit.
    Errors: ValueError if m does not divide n, or if the requested kernel does not support this dtype or head dimension.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    in_words = bias is None and (mask is None or isinstance(mask, MaskSpec))
    kernel = kernels.choose(kind, q, k) if in_words else None
    if kernel is None:
        return plain(q, k, v, mask.dense(q.shape[1]) if isinstance(mask, MaskSpec) else mask, scale, bias)
    if isinstance(mask, Padding):  # the output of kernels for a row that is all padding is undefined
        y = kernel(q, k, v, scale, valid=mask.valid)
        return jnp.where(mask.valid.any(1)[:, None, None, None], y, 0)
    if not isinstance(mask, Causal):
        return kernel(q, k, v, scale)
    y = kernel(q, k, v, scale, causal=True, valid=mask.valid)
    if mask.valid is None and not mask.bidirectional_prefix:
        return y
    p = max(
        mask.prefix, mask.bidirectional_prefix
    )  # kernels cannot express this prefix; no later key is visible from it
    first = remat_elementwise(partial(plain, scale=scale))(q[:, :p], k[:, :p], v[:, :p], mask.dense(p))
    return jnp.concatenate([first, y[:, p:]], 1)


@typed
def plain(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s m h"],
    v: Float[Array, "b s m h"],
    mask: Bool[Array, "_ _ _ s"] | None = None,
    scale: float | None = None,
    bias: Float[Array, "_ n t s"] | None = None,
) -> Float[Array, "b t n h"]:
    """softmax(q k^T scale + bias) v, n query heads on m key-value heads (Vaswani et al. 2017; Ainslie et al. 2023).

    mask (b or 1, 1 or n, t or 1, s): True where a query may attend; `scale` defaults to h^-1/2. Returns the dtype of v;
    the softmax is fp32. A query whose keys are all masked gets zeros. Query heads of a group are adjacent, as if k and
    v were repeated; nothing is repeated in memory.
    Errors: ValueError if m does not divide n.
    """
    n, m = q.shape[2], k.shape[2]
    if n % m:
        raise ValueError(f"attention: {n} query heads cannot be shared by {m} key-value heads")
    q = rearrange(q, "b t (m g) h -> b t m g h", m=m)
    logits = jnp.einsum("btmgh,bsmh->bmgts", q, k, preferred_element_type=jnp.float32)
    logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + rearrange(bias.astype(jnp.float32), "b (m g) t s -> b m g t s", m=m)
    if mask is not None:
        groups = n // m if mask.shape[1] > 1 else 1
        mask = rearrange(mask, "b (m g) t s -> b m g t s", g=groups)
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    out = jnp.einsum("bmgts,bsmh->btmgh", jax.nn.softmax(logits).astype(v.dtype), v)
    if mask is not None:
        out = jnp.where(rearrange(mask.any(-1), "b m g t -> b t m g 1"), out, 0)
    return rearrange(out, "b t m g h -> b t (m g) h")


@typed
def causal(t: int, s: int | None = None, start: Array | int = 0) -> Bool[Array, "1 1 {t} s"]:
    """Causal mask for queries at positions start .. start + t - 1."""
    s = t if s is None else s
    return (jnp.arange(s) <= start + jnp.arange(t)[:, None])[None, None]


@typed
def frequencies(count: int, base: float = 10000.0) -> Float[Array, " {count}"]:
    """base^(-j / count) for j = 0 .. count - 1: rotations of a head with 2 count channels (Su et al. 2021, eq. 15)."""
    return base ** (-jnp.arange(count, dtype=jnp.float32) / count)


@typed
def rotary_2d(grid: tuple[int, int], head_dim: int, base: float = 10000.0) -> Float[Array, "t {head_dim}//2"]:
    """Angles of a raster grid: the row rotates the first half of the pairs, the column the second.

    Errors: ValueError if 4 does not divide head_dim.
    """
    if head_dim % 4:
        raise ValueError(f"rotary_2d: head_dim {head_dim} is not a multiple of 4")
    freqs = frequencies(head_dim // 4, base)
    row, column = jnp.indices(grid).reshape(2, -1, 1)
    return jnp.concatenate([row * freqs, column * freqs], -1)


@typed
def rotary_text_grid(text: int, grid: tuple[int, int], head_dim: int) -> Float[Array, "t {head_dim}//2"]:
    """Angles of text followed by a raster grid, as in DALLE-pytorch.

    A third of the channels encodes the text position, a third the row and a third the column, both in [-1, 1]. Image
    tokens have text position 8192, text tokens row and column -10. The remaining channels are not rotated.
    """
    third, count = head_dim // 3, head_dim // 6
    line = 10000.0 ** (-2 * jnp.arange(count) / third)
    pixel = math.pi * jnp.linspace(1, 5, count)
    cells = jnp.meshgrid(*(jnp.linspace(-1, 1, n) for n in grid), indexing="ij")
    places = [jnp.concatenate([jnp.arange(text), jnp.full(math.prod(grid), 8192)])]
    places += [jnp.concatenate([jnp.full(text, -10.0), cell.reshape(-1)]) for cell in cells]
    angles = [place[:, None] * turn for place, turn in zip(places, (line, pixel, pixel), strict=True)]
    return jnp.pad(jnp.concatenate(angles, 1), [(0, 0), (0, head_dim // 2 - 3 * count)])


@typed
def with_prefix(
    cos: Float[Array, "t h"], sin: Float[Array, "t h"], count: int, zero: bool = False
) -> tuple[Float[Array, "t+{count} h"], Float[Array, "t+{count} h"]]:
    """The table with `count` rows prepended for tokens without a position.

    These rows do not rotate (cos 1, sin 0). With `zero` they multiply by 0, so that all attention logits from and to
    them are 0: released LlamaGen weights were trained this way.
    """
    row = jnp.zeros((count, cos.shape[-1]), cos.dtype)
    return jnp.concatenate([row if zero else row + 1, cos]), jnp.concatenate([row, sin])


@typed
def rotate(
    x: Float[Array, "b t n h"], cos: Float[Array, "*bt h//2"], sin: Float[Array, "*bt h//2"]
) -> Float[Array, "b t n h"]:
    """Rotate the adjacent pairs (x0, x1), (x2, x3), ... by the angles of their positions, in fp32.

    cos and sin: of t positions, or of b t; constants, without gradient.
    """
    return _turn(x, jax.lax.stop_gradient(cos), jax.lax.stop_gradient(sin))


@jax.custom_vjp  # the gradient is the inverse rotation and does not need x
def _turn(x: Array, cos: Array, sin: Array) -> Array:
    return jax.lax.platform_dependent(x, cos[..., None, :], sin[..., None, :], tpu=_swapped, default=_paired)


def _paired(x: Array, cos: Array, sin: Array) -> Array:
    even, odd = jnp.moveaxis(at_least_fp32(rearrange(x, "b t n (h two) -> b t n h two", two=2)), -1, 0)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.reshape(x.shape).astype(x.dtype)


def _swapped(x: Array, cos: Array, sin: Array) -> Array:
    """As `_paired`, but (-x1, x0, -x3, x2, ...) is an exact matrix product: TPUs would copy and pad (.., h/2, 2)."""
    swap = np.kron(np.eye(x.shape[-1] // 2), [[0, 1], [-1, 0]])
    other = jnp.matmul(x, jnp.asarray(swap, x.dtype), precision="highest" if x.dtype.itemsize > 2 else None)
    cos, sin = jnp.repeat(cos, 2, -1), jnp.repeat(sin, 2, -1)
    return (at_least_fp32(x) * cos + at_least_fp32(other) * sin).astype(x.dtype)


def _turn_back(table: Rotary, dy: Array) -> tuple[Array, None, None]:
    cos, sin = table
    return _turn(dy, cos, -sin), None, None


_turn.defvjp(lambda x, cos, sin: (_turn(x, cos, sin), (cos, sin)), _turn_back)
