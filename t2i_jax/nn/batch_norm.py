"""Batch normalisation, a layer with running statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t2i_jax.nn.layers import ModelState, at_least_fp32, normal, param, replace


class BatchNorm(nnx.Module):
    """Normalises channels over batch and positions (Ioffe & Szegedy 2015): (b, ..., c) -> (b, ..., c).

    Training uses the statistics of the batch, the global one on a mesh, and returns a new module whose running
    statistics are `decay` old + (1 - decay) new; otherwise the running statistics are used. `affine=False` omits scale
    and shift.
    """

    def __init__(self, c: int, key: Array, eps: float = 1e-5, decay: float = 0.9, affine: bool = True):
        self.w = param(1 + normal(key, (c,)), None) if affine else None
        self.b = param(jnp.zeros(c), None) if affine else None
        self.mean = ModelState(jnp.zeros(c))
        self.var = ModelState(jnp.ones(c))
        self.eps, self.decay = eps, decay

    def __call__(self, x: Array, train: bool) -> tuple[Array, BatchNorm]:
        y, axes = at_least_fp32(x), tuple(range(x.ndim - 1))
        mean, var, after = self.mean[...], self.var[...], self
        if train:
            mean = y.mean(axes)
            var = jnp.mean((y - mean) ** 2, axes)
            count = y.size // y.shape[-1]
            lerp = lambda old, new: self.decay * old + (1 - self.decay) * jax.lax.stop_gradient(new)
            unbiased = var * count / max(count - 1, 1)
            after = replace(self, mean=lerp(self.mean[...], mean), var=lerp(self.var[...], unbiased))
        scale = jax.lax.rsqrt(var + self.eps)
        if self.w is None or self.b is None:
            y = (y - mean) * scale
        else:
            y = (y - mean) * (scale * self.w[...]) + self.b[...]
        return y.astype(x.dtype), after
