"""A convolution with its norm and its activation, and sequences of such blocks.

Layers with running statistics return themselves renewed, and so do blocks of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Float, typed
from t2i_jax.nn.batch_norm import BatchNorm
from t2i_jax.nn.conv import Upsample
from t2i_jax.nn.layers import Conv, replace
from t2i_jax.nn.spectral import SpectralConv

Gate = Literal["glu", "relu"]
"""An activation that may halve the channels: see `gated`."""
Activation = Literal["glu", "relu", "leaky", "none"]
ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "glu": jax.nn.glu,
    "relu": jax.nn.relu,
    "leaky": lambda x: jax.nn.leaky_relu(x, 0.2),
    "none": lambda x: x,
}


def channels_before(activation: Activation, f: int) -> int:
    """Channels that an activation needs to give f: a gated linear unit multiplies one half by the sigmoid of the other
    (Dauphin et al. 2017)."""
    return 2 * f if activation == "glu" else f


class Renewing(Protocol):
    """A layer that returns itself with new running statistics."""

    def __call__(self, x: Array, train: bool) -> tuple[Array, Self]: ...


L = TypeVar("L", bound=Renewing)


def in_turn(layers: Sequence[L], x: Array, train: bool) -> tuple[Array, nnx.List[L]]:
    """The output of layers, each of which reads that of the one before it, and the renewed layers."""
    after = []
    for layer in layers:
        x, renewed = layer(x, train)
        after.append(renewed)
    return x, nnx.List(after)


class ConvBlock(nnx.Module):
    """Convolution, BatchNorm if there is one, activation: (b, i, j, c) -> (b, i', j', f), and the block renewed."""

    def __init__(
        self, conv: Conv | Upsample | SpectralConv, norm: BatchNorm | None = None, activation: Activation = "none"
    ):
        self.conv, self.norm = conv, norm
        self.activation: Activation = activation

    def __call__(self, x: Array, train: bool) -> tuple[Array, ConvBlock]:
        y, conv = self.conv(x) if isinstance(self.conv, SpectralConv) else (self.conv(x), self.conv)
        y, norm = (y, None) if self.norm is None else self.norm(y, train)
        return ACTIVATIONS[self.activation](y), replace(self, conv=conv, norm=norm)


class NormedResidual(nnx.Module):
    """x + norm(conv(gate(norm(conv(x))))), channels kept: (b, i, j, c) -> (b, i, j, c), and the block renewed.

    With "relu" as the gate the sum passes a ReLU too, as in StackGAN.
    """

    def __init__(self, c: int, gate: Gate, key: Array):
        keys, f = jax.random.split(key, 4), channels_before(gate, c)
        self.inner = ConvBlock(Conv(c, f, keys[0], bias=False), BatchNorm(f, keys[1]), gate)
        self.outer = ConvBlock(Conv(c, c, keys[2], bias=False), BatchNorm(c, keys[3]))
        self.gate: Gate = gate

    def __call__(self, x: Array, train: bool) -> tuple[Array, NormedResidual]:
        y, inner = self.inner(x, train)
        y, outer = self.outer(y, train)
        y = jax.nn.relu(x + y) if self.gate == "relu" else x + y
        return y, replace(self, inner=inner, outer=outer)


@typed
def with_vector(h: Float[Array, "b i j w"], code: Float[Array, "b c"], first: bool) -> Float[Array, "b i j w+c"]:
    """Features (b, i, j, w) with a vector (b, c) at every position, before or after their own channels."""
    spread = jnp.broadcast_to(code.astype(h.dtype)[:, None, None], (*h.shape[:3], code.shape[-1]))
    return jnp.concatenate([spread, h] if first else [h, spread], -1)
