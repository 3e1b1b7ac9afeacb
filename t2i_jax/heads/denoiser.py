"""The MLP of denoising heads, with layers modulated by time and z (Li et al. 2024, 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Float, Num, typed
from t2i_jax.nn.layers import LayerNorm, Linear
from t2i_jax.nn.modulation import TimeEmbedding, modulate


class DenoisingBlock(nnx.Module):
    """x + gate MLP(modulate(norm(x))), with shift, scale and gate computed from c."""

    def __init__(self, width: int, key: Array):
        keys = jax.random.split(key, 3)
        self.norm = LayerNorm(width, 1e-6)
        self.into = Linear(width, width, keys[0], std=None)
        self.out = Linear(width, width, keys[1], std=None, axes=("mlp", "embed"))
        self.modulation = Linear(width, 3 * width, keys[2], std=0.0)

    @typed
    def __call__(self, x: Float[Array, "n f"], c: Float[Array, "n f"]) -> Float[Array, "n f"]:
        shift, scale, gate = jnp.split(self.modulation(c), 3, -1)
        y = modulate(self.norm(x), shift, scale)
        return x + gate * self.out(jax.nn.silu(self.into(y)))


class Denoiser(nnx.Module):
    """`out` numbers, fp32, from a noised code x, its time t and the network's z, `embed`ded; zeros before training."""

    def __init__(self, k: int, out: int, width: int, depth: int, d: int, key: Array):
        keys = jax.random.split(key, 6)
        self.time = TimeEmbedding(width, keys[0])
        self.condition = Linear(d, width, keys[1], std=None)
        self.into = Linear(k, width, keys[2], std=None, axes=(None, "mlp"))
        self.blocks = jax.vmap(lambda key: DenoisingBlock(width, key))(jax.random.split(keys[3], depth))
        self.norm = LayerNorm(width, 1e-6, affine=False)
        self.modulation = Linear(width, 2 * width, keys[4], std=0.0)
        self.out = Linear(width, out, keys[5], std=0.0, axes=("embed", None))

    @typed
    def embed(self, z: Float[Array, "n d"]) -> Float[Array, "n f"]:
        """The contribution of z to the condition; the same at all times."""
        return self.condition(z)

    @typed
    def __call__(
        self, x: Float[Array, "n k"], t: Num[Array, " n"], embedded: Float[Array, "n f"]
    ) -> Float[Array, "n o"]:
        dtype = embedded.dtype
        c = jax.nn.silu(self.time(t).astype(dtype) + embedded)
        h, _ = jax.lax.scan(lambda h, block: (block(h, c), None), self.into(x.astype(dtype)), self.blocks)
        shift, scale = jnp.split(self.modulation(c), 2, -1)
        return self.out(modulate(self.norm(h), shift, scale)).astype(jnp.float32)
