"""Embedding of a time or noise level, and modulation by shifts and scales."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Float, Num, typed
from t2i_jax.nn.layers import Linear


@typed
def sinusoid(t: Num[Array, " b"], d: int, period: float = 10000.0) -> Float[Array, "b {d}"]:
    """cos, then sin of t / period^(j / (d/2)), j < d/2, in fp32, with a trailing zero for odd d."""
    half = d // 2
    angles = t.astype(jnp.float32)[:, None] * jnp.exp(-math.log(period) * jnp.arange(half, dtype=jnp.float32) / half)
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
    return jnp.pad(waves, ((0, 0), (0, d % 2)))


Smooth = Literal["silu", "gelu", "gelu_tanh"]
SMOOTH: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}
"""Activations of convolutional networks that read a time."""


class TimeEmbedding(nnx.Module):
    """Linear, activation, Linear of the sinusoidal embedding of a time."""

    def __init__(self, d: int, key: Array, *, frequency_dim: int = 256, std: float = 0.02, activation: Smooth = "silu"):
        keys = jax.random.split(key)
        self.into = Linear(frequency_dim, d, keys[0], std=std, axes=(None, "mlp"))
        self.out = Linear(d, d, keys[1], std=std, axes=("mlp", "embed"))
        self.frequency_dim, self.activation = frequency_dim, activation

    @typed
    def __call__(self, t: Num[Array, " b"]) -> Float[Array, "b d"]:
        return self.out(SMOOTH[self.activation](self.into(sinusoid(t, self.frequency_dim))))


@typed
def modulate(
    x: Float[Array, "b *t d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
) -> Float[Array, "b *t d"]:
    """x times 1 + scale, plus shift."""
    between = (slice(None), *(None,) * (x.ndim - 2))
    return x * (1 + scale[between].astype(x.dtype)) + shift[between].astype(x.dtype)
