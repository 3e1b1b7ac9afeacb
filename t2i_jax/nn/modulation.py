"""Embedding of a time or noise level, and modulation by shifts and scales."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t2i_jax.nn.layers import Linear


def sinusoid(t: Array, d: int, period: float = 10000.0) -> Array:
    """cos, then sin of t / period^(j / (d/2)), j < d/2: (b,) -> (b, d) fp32, with a trailing zero for odd d."""
    half = d // 2
    angles = t.astype(jnp.float32)[:, None] * jnp.exp(-math.log(period) * jnp.arange(half, dtype=jnp.float32) / half)
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
    return jnp.pad(waves, ((0, 0), (0, d % 2)))


class TimeEmbedding(nnx.Module):
    """Linear, SiLU, Linear of the sinusoidal embedding of a time: (b,) -> (b, d)."""

    def __init__(self, d: int, key: Array, *, waves: int = 256, std: float = 0.02):
        keys = jax.random.split(key)
        self.into = Linear(waves, d, keys[0], std=std, axes=(None, "mlp"))
        self.out = Linear(d, d, keys[1], std=std, axes=("mlp", "embed"))
        self.waves = waves

    def __call__(self, t: Array) -> Array:
        return self.out(jax.nn.silu(self.into(sinusoid(t, self.waves))))


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """x (b, ..., d) times 1 + scale (b, d), plus shift (b, d)."""
    between = (slice(None), *(None,) * (x.ndim - 2))
    return x * (1 + scale[between].astype(x.dtype)) + shift[between].astype(x.dtype)
