"""Recurrent layers that read rows of different lengths in both directions."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Bool, Float
from t2i_jax.core.sharding import shard
from t2i_jax.nn.layers import Linear

Cell = Literal["lstm", "gru"]
GATES: dict[Cell, int] = {"lstm": 4, "gru": 3}
"""Gates of a cell, in PyTorch's order: i, f, g, o of an LSTM; r, z, n of a GRU."""


class Direction(nnx.Module):
    """The parameters of one direction; each gate has two biases, as in PyTorch, which a GRU needs for n."""

    def __init__(self, d: int, hidden: int, key: Array, cell: Cell):
        keys, width = jax.random.split(key), GATES[cell] * hidden
        std = (3 * hidden) ** -0.5  # that of PyTorch's uniform numbers
        self.inner = Linear(d, width, keys[0], std=std, axes=("embed", None))
        self.again = Linear(hidden, width, keys[1], std=std, axes=(None, None))


class Bidirectional(nnx.Module):
    """A bidirectional LSTM (Hochreiter & Schmidhuber 1997) or GRU (Cho et al. 2014), each direction of `hidden` units.

    i, f, o = sigmoid, g = tanh; c' = f c + i g; h' = o tanh(c'). GRU: r, z = sigmoid, n = tanh(W x + b + r (U h + u));
    h' = (1 - z) n + z h. States begin with zeros.
    """

    def __init__(self, d: int, hidden: int, key: Array, cell: Cell = "lstm"):
        self.directions = jax.vmap(lambda k: Direction(d, hidden, k, cell))(jax.random.split(key))
        self.hidden, self.cell = hidden, cell

    def __call__(
        self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"]
    ) -> tuple[Float[Array, "b s k"], Float[Array, "b k"]]:
        """Outputs of each position, forward and backward concatenated (k = 2 hidden), and the last state of both.

        mask: the first n positions of each row, which may be in any order. The backward direction begins at position
        n - 1; after the end outputs are 0, and so are all of a row with n = 0.
        """
        turned = lambda x: jnp.take_along_axis(x, _turned(mask)[..., None], 1)
        inputs = jax.vmap(lambda one, x: one.inner(x))(self.directions, jnp.stack([x, turned(x)]))
        start = shard(jnp.zeros((2, len(x), self.hidden), x.dtype), None, "batch", None)

        def step(state: tuple[Array, Array], inputs: Array) -> tuple[tuple[Array, Array], Array]:
            again = jax.vmap(lambda one, h: one.again(h))(self.directions, state[0])
            state = (_lstm if self.cell == "lstm" else _gru)(inputs, again, *state)
            state = shard(state[0], None, "batch", None), shard(state[1], None, "batch", None)
            return state, state[0]

        _, h = jax.lax.scan(step, (start, start), rearrange(inputs, "n b s d -> s n b d"))
        h = jnp.where(mask[..., None], rearrange(h, "s n b k -> n b s k"), 0)
        last = jnp.maximum(mask.sum(1) - 1, 0)[None, :, None, None]
        last = rearrange(jnp.take_along_axis(h, last, 2), "n b 1 k -> b (n k)")
        return jnp.concatenate([h[0], turned(h[1])], -1), last


def _turned(mask: Array) -> Array:
    """Positions (b, s) that reverse the first n of each row and keep the others."""
    n, at = mask.sum(1, keepdims=True), jnp.arange(mask.shape[1])[None]
    return jnp.where(at < n, n - 1 - at, at)


def _lstm(inputs: Array, again: Array, h: Array, c: Array) -> tuple[Array, Array]:
    i, f, g, o = jnp.split(inputs + again, 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _gru(inputs: Array, again: Array, h: Array, c: Array) -> tuple[Array, Array]:
    (r, z, n), (again_r, again_z, again_n) = jnp.split(inputs, 3, -1), jnp.split(again, 3, -1)
    r, z = jax.nn.sigmoid(r + again_r), jax.nn.sigmoid(z + again_z)
    return (1 - z) * jnp.tanh(n + r * again_n) + z * h, c
