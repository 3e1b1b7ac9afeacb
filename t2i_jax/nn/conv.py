"""Convolutional blocks of autoencoders, NHWC: residual block, attention over positions, resampling, patches."""

from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Float, typed
from t2i_jax.nn.layers import Conv, GroupNorm

Shortcut = Literal["input", "branch"]
"""What the shortcut of a residual block reads where the number of channels changes."""


class ResBlock(nnx.Module):
    """x + h with h = conv(silu(norm(conv(silu(norm(x)))))); where f is not c, the 1x1 shortcut W x + h.

    shortcut_of: "branch" is W h + h instead, without x, as in the released codecs of MaskGIT.
    """

    def __init__(
        self,
        c: int,
        f: int,
        key: Array,
        *,
        groups: int = 32,
        eps: float = 1e-6,
        bias: bool = True,
        shortcut_of: Shortcut = "input",
    ):
        first, second, third = jax.random.split(key, 3)
        self.norm1 = GroupNorm(c, groups, eps)
        self.conv1 = Conv(c, f, first, bias=bias)
        self.norm2 = GroupNorm(f, groups, eps)
        self.conv2 = Conv(f, f, second, bias=bias)
        self.of_branch = shortcut_of == "branch"
        self.shortcut = Conv(f if self.of_branch else c, f, third, kernel=1, bias=bias) if c != f else None

    @typed
    def __call__(self, x: Float[Array, "b i j c"]) -> Float[Array, "b i j f"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(y if self.of_branch else x))


class Residual(nnx.Module):
    """x + conv(relu(conv(relu(conv(x))))), without a norm: (b, i, j, c) -> (b, i, j, c)."""

    def __init__(self, c: int, key: Array, *, kernels: tuple[int, int, int]):
        keys = jax.random.split(key, 3)
        self.convs = nnx.List([Conv(c, c, k, kernel=n) for k, n in zip(keys, kernels, strict=True)])

    def __call__(self, x: Array) -> Array:
        first, second, third = self.convs
        return x + third(jax.nn.relu(second(jax.nn.relu(first(x)))))


class SpatialAttention(nnx.Module):
    """Single-head attention among all positions, with a residual."""

    def __init__(self, c: int, key: Array, *, groups: int = 32, eps: float = 1e-6):
        q, k, v, out = jax.random.split(key, 4)
        self.norm = GroupNorm(c, groups, eps)
        self.q = Conv(c, c, q, kernel=1)
        self.k = Conv(c, c, k, kernel=1)
        self.v = Conv(c, c, v, kernel=1)
        self.out = Conv(c, c, out, kernel=1)

    @typed
    def __call__(self, x: Float[Array, "b i j c"]) -> Float[Array, "b i j c"]:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b i j d -> b (i j) d") for layer in (self.q, self.k, self.v))
        logits = jnp.einsum("btd,bsd->bts", q, k, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
        logits = logits * x.shape[-1] ** -0.5
        y = jnp.einsum("bts,bsd->btd", jax.nn.softmax(logits).astype(x.dtype), v)
        return x + self.out(y.reshape(x.shape))


class Downsample(nnx.Module):
    """Halve both sides. Padded on the right and at the bottom only."""

    def __init__(self, c: int, key: Array):
        self.conv = Conv(c, c, key, stride=2, padding=((0, 1), (0, 1)))

    @typed
    def __call__(self, x: Float[Array, "b i j c"]) -> Float[Array, "b i//2 j//2 c"]:
        return self.conv(x)


# FOLD[p][a][r]: weight of row r of the 3-tap kernel in tap a of the 2-tap kernel for outputs of parity p.
FOLD = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))


class Upsample(nnx.Module):
    """Nearest-neighbour doubling and a 3x3 convolution to f channels, c unless given.

    Doubled pixels are equal, so the outputs of each parity are a 2x2 convolution of the small image with summed taps.
    Four of those cost 4/9 of the arithmetic, and the large input is never materialised.
    """

    def __init__(self, c: int, key: Array, f: int | None = None, bias: bool = True):
        self.conv = Conv(c, c if f is None else f, key, bias=bias)

    @typed
    def __call__(self, x: Float[Array, "b i j c"]) -> Float[Array, "b 2*i 2*j f"]:
        fold = jnp.asarray(FOLD)
        w = jnp.einsum("par,qes,rscf->pqaecf", fold, fold, self.conv.w[...]).astype(x.dtype)

        def phase(p: int, q: int) -> Array:
            padding = ((1 - p, p), (1 - q, q))
            return jax.lax.conv_general_dilated(x, w[p, q], (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

        y = jnp.stack([jnp.stack([phase(p, q) for q in (0, 1)]) for p in (0, 1)])
        y = rearrange(y, "p q b i j c -> b (i p) (j q) c")
        return y if self.conv.b is None else y + self.conv.b[...].astype(x.dtype)


@typed
def nearest(x: Float[Array, "b i j c"]) -> Float[Array, "b 2*i 2*j c"]:
    """Nearest-neighbour doubling."""
    return repeat(x, "b i j c -> b (i p) (j q) c", p=2, q=2)


@typed
def halve(x: Float[Array, "b i j c"]) -> Float[Array, "b i//2 j//2 c"]:
    """Means of squares of 2 x 2 positions."""
    return rearrange(x, "b (i p) (j q) c -> b i p j q c", p=2, q=2).mean((2, 4))


@typed
def blur_halve(x: Float[Array, "b i j c"]) -> Float[Array, "b i//2 j//2 c"]:
    """Every other position of x blurred by (1, 3, 3, 1) / 8 along both sides, with zeros outside (Zhang 2019); even
    sides."""

    def halved(x: Array, axis: int) -> Array:
        x = jnp.pad(x, [(1, 1) if n == axis else (0, 0) for n in range(4)])
        taps = [jax.lax.slice_in_dim(x, n, x.shape[axis] - 2 + (n > 0) + (n > 1), 2, axis) for n in range(4)]
        return (taps[0] + 3 * taps[1] + 3 * taps[2] + taps[3]) / 8

    return halved(halved(x, 1), 2)


@typed
def patchify(x: Float[Array, "b i j c"], size: int) -> Float[Array, "b i/{size} j/{size} c*{size}**2"]:
    """Squares of pixels become channels, in row-major order."""
    return rearrange(x, "b (i p) (j q) c -> b i j (p q c)", p=size, q=size)


@typed
def unpatchify(x: Float[Array, "b i j c"], size: int) -> Float[Array, "b i*{size} j*{size} c//{size}**2"]:
    """The inverse of `patchify`."""
    return rearrange(x, "b i j (p q c) -> b (i p) (j q) c", p=size, q=size)
