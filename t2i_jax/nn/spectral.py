"""Spectral normalisation, whose power iteration is state of the layer (Miyato et al. 2018, arXiv:1802.05957)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Float, typed
from t2i_jax.nn.layers import Conv, ModelState, normal, replace


class SpectralConv(nnx.Module):
    """A convolution with W / sigma in place of its kernel W, where sigma estimates the largest singular value of W as
    a matrix (k k c, f): (b, i, j, c) -> (b, i', j', f).

    Every call, in evaluation too, makes one step of the power iteration, v = W u / |W u| and then u = W^T v / |W^T v|,
    uses sigma = v^T W u and returns the layer with the new u and v. The gradient goes through sigma, with u and v
    constant. Products with W are fp32.
    """

    def __init__(self, conv: Conv, key: Array):
        *rows, f = conv.w.shape
        keys = jax.random.split(key)
        self.conv = conv
        self.u = ModelState(_unit(normal(keys[0], (f,), 1.0)))
        self.v = ModelState(_unit(normal(keys[1], tuple(rows), 1.0)))

    @typed
    def __call__(self, x: Float[Array, "b i j c"]) -> tuple[Float[Array, "b k l f"], SpectralConv]:
        kernel = self.conv.w[...]
        w = rearrange(kernel, "i j c f -> (i j c) f")
        v = _unit(jax.lax.stop_gradient(w) @ self.u[...])
        u = _unit(v @ jax.lax.stop_gradient(w))
        y = replace(self.conv, w=kernel / (v @ w @ u))(x)
        return y, replace(self, u=u, v=v.reshape(self.v.shape))


def _unit(x: Array) -> Array:
    return x / (jnp.sqrt(jnp.sum(x * x)) + 1e-12)
