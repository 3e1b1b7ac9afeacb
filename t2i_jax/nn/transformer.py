"""The Transformer block that several networks share, and stacks of it.

A stack is one `Block` whose arrays carry a leading layer axis; `apply_stack` scans over it. Decoding unrolls the layers
instead (`unstack`): a scan would copy every layer's weights and cache out of the stack at each token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from t2i_jax.nn.attention import Rotary, attend, rotate
from t2i_jax.nn.layers import LayerNorm, Linear, RMSNorm
from t2i_jax.parallel import shard

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
GATED = ("swiglu", "geglu")
"""Activations of a gate (Shazeer 2020): the MLP has a third matrix."""

_policies = jax.checkpoint_policies
REMAT: dict[str, Any] = {
    "none": None,
    "full": _policies.nothing_saveable,
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "branches": _policies.save_only_these_names("branch"),
}
"""What a layer keeps for its backward pass: everything; only its input; also its matrix products; also its branches."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """Shape and kind of a Transformer block."""

    width: int = 256
    heads: int = 4
    kv_heads: int = 0
    """key-value heads, each shared by heads / kv_heads query heads; 0: as many as heads"""
    head_dim: int = 0
    """0: width / heads"""
    hidden: int = 0
    """width inside the MLP; 0: 4 width, with a gate 8/3 width rounded up to a multiple of 64"""
    norm: Literal["rms", "layer"] = "rms"
    eps: float = 1e-5
    post_norm: bool = False
    """normalise after the residual sum (BERT) instead of before each branch"""
    activation: Literal["swiglu", "geglu", "relu", "gelu", "gelu_tanh", "quick_gelu"] = "swiglu"
    bias: bool = False
    qk_norm: bool = False
    """RMS-normalise queries and keys per head"""
    scale: float = 0.0
    """what attention logits are multiplied by; 0: head_dim^-1/2"""
    dropout: float = 0.0
    """rate on what each branch adds, in training"""

    def __post_init__(self):
        if not self.head_dim and self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be split into heads {self.heads}; set head_dim")
        if self.heads % self.groups:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        for field, known in (("norm", ("rms", "layer")), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, field) not in known:
                raise ValueError(f"{field} '{getattr(self, field)}': it is one of {', '.join(known)}")

    @property
    def groups(self) -> int:
        """Key-value heads m."""
        return self.kv_heads or self.heads

    @property
    def head(self) -> int:
        """Head dimension h."""
        return self.head_dim or self.width // self.heads

    @property
    def inner(self) -> int:
        """MLP width f."""
        wide = -(-8 * self.width // 3 // 64) * 64 if self.activation in GATED else 4 * self.width
        return self.hidden or wide

    def normalise(self) -> RMSNorm | LayerNorm:
        return (RMSNorm if self.norm == "rms" else LayerNorm)(self.width, self.eps)


class Cache(NamedTuple):
    """Keys and values seen so far: k and v (b, m, s, h), filled up to position `at`.

    The cache of a stack has (l, b, m, s, h), and `layer` says whose turn it is. Heads stand before positions: it is the
    order in which a decoding step reads them.
    """

    k: Array
    v: Array
    at: Array
    layer: Array | None = None

    @classmethod
    def empty(cls, layer: Layer, b: int, s: int, dtype: Any = jnp.float32, depth: int | None = None) -> Cache:
        """Room for s positions of one layer, or of a stack of `depth`."""
        shape = (*(() if depth is None else (depth,)), b, layer.groups, s, layer.head)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))

    def grow(self, s: int) -> Cache:
        """The same with room for s positions."""
        room = lambda x: jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, s - x.shape[-2]), (0, 0)])
        return self._replace(k=room(self.k), v=room(self.v))

    def extend(self, k: Array, v: Array) -> tuple[Cache, Array, Array]:
        """Write k and v (b, t, m, h) at position `at`; returns the new cache and all keys and values (b, s, m, h)."""
        first = () if self.layer is None else (self.layer,)

        def write(into, x):
            x = x.astype(into.dtype).swapaxes(1, 2)
            x = x if self.layer is None else x[None]
            return jax.lax.dynamic_update_slice(into, x, (*first, 0, 0, self.at, 0))

        def read(c):
            c = c if self.layer is None else jax.lax.dynamic_index_in_dim(c, self.layer, 0, keepdims=False)
            return c.swapaxes(1, 2)

        new = self._replace(k=write(self.k, k), v=write(self.v, v))
        return new, read(new.k), read(new.v)


class Attention(nnx.Module):
    """Self-attention: (b, t, d) -> (b, t, d).

    Queries, keys and values come from one matrix (d, m (g + 2) h). Its columns are sorted by key-value head, each with
    its g queries, its key, its value, so that a split over heads never cuts across the three.
    """

    def __init__(self, config: Layer, key: Array):
        n, m, h = config.heads, config.groups, config.head
        keys = jax.random.split(key)
        self.qkv = Linear(config.width, (n + 2 * m) * h, keys[0], bias=config.bias, axes=("embed", "heads"))
        self.out = Linear(n * h, config.width, keys[1], bias=config.bias, axes=("heads", "embed"))
        self.q_norm = RMSNorm(h, config.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(h, config.eps) if config.qk_norm else None
        self.kv_heads, self.head_dim, self.scale = m, h, config.scale or h**-0.5

    def __call__(
        self,
        x: Array,
        rotary: Rotary | None = None,
        mask: Array | None = None,
        cache: Cache | None = None,
        bias: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        y = rearrange(self.qkv(x), "b t (m g h) -> b t m g h", m=self.kv_heads, h=self.head_dim)
        q, k, v = rearrange(y[..., :-2, :], "b t m g h -> b t (m g) h"), y[..., -2, :], y[..., -1, :]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k, v = (shard(a, "batch", None, "heads", None) for a in (q, k, v))
        if cache is not None:
            cache, k, v = cache.extend(k, v)
        y = attend(q, k.astype(q.dtype), v.astype(q.dtype), mask, self.scale, bias)
        return self.out(rearrange(y, "b t n h -> b t (n h)")), cache


class MLP(nnx.Module):
    """act(x W_in) W_out for every position, or (act(x W_gate) * x W_in) W_out with a gate: (b, t, d) -> (b, t, d)."""

    def __init__(self, config: Layer, key: Array):
        keys = jax.random.split(key, 3)
        d, f, bias = config.width, config.inner, config.bias
        self.gate = Linear(d, f, keys[0], bias=bias) if config.activation in GATED else None
        self.into = Linear(d, f, keys[1], bias=bias)
        self.out = Linear(f, d, keys[2], bias=bias, axes=("mlp", "embed"))
        self.activation = config.activation

    def __call__(self, x: Array) -> Array:
        act = ACTIVATIONS[self.activation]
        y = act(self.into(x)) if self.gate is None else act(self.gate(x)) * self.into(x)
        return self.out(shard(y, "batch", None, "mlp"))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `post_norm` norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: Layer, key: Array):
        keys = jax.random.split(key)
        self.attention_norm, self.attention = config.normalise(), Attention(config, keys[0])
        self.mlp_norm, self.mlp = config.normalise(), MLP(config, keys[1])
        self.post_norm, self.dropout = config.post_norm, config.dropout

    def __call__(
        self,
        x: Array,
        *,
        rotary: Rotary | None = None,
        mask: Array | None = None,
        cache: Cache | None = None,
        key: Array | None = None,
        bias: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        """x (b, t, d) at the positions of `rotary`, looking where `mask` (b or 1, 1 or n, t, s) says.

        `bias` (b or 1, n, t, s) is added to the attention logits.

        With a cache the keys and values of x are written at `cache.at`, and s is the length of the cache: the mask has
        to hide what is not yet written. Without a key nothing is dropped. Returns x (b, t, d) and the new cache, whose
        `at` the caller moves on.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        before = lambda norm, y: y if self.post_norm else norm(y)
        after = lambda norm, y: norm(y) if self.post_norm else y

        y, cache = self.attention(before(self.attention_norm, x), rotary, mask, cache, bias)
        x = after(self.attention_norm, x + checkpoint_name(drop(y, self.dropout, keys[0]), "branch"))
        y = self.mlp(before(self.mlp_norm, x))
        x = after(self.mlp_norm, x + checkpoint_name(drop(y, self.dropout, keys[1]), "branch"))
        return shard(x, "batch", "length", None), cache


def drop(x: Array, rate: float, key: Array | None) -> Array:
    """Zero a share `rate` of x and scale up the rest (Srivastava et al. 2014); x itself without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def stack(config: Layer, depth: int, key: Array) -> Block:
    """`depth` blocks as one whose arrays have a leading layer axis."""
    return jax.vmap(lambda k: Block(config, k))(jax.random.split(key, depth))


def depth_of(blocks: Block) -> int:
    return jax.tree.leaves(blocks)[0].shape[0]


def unstack(blocks: Block) -> tuple[Block, ...]:
    """The blocks of a stack one by one; outside of a decoding loop this is done once."""
    return tuple(jax.tree.map(lambda a, i=i: a[i], blocks) for i in range(depth_of(blocks)))


def apply_stack(
    blocks: Block | tuple[Block, ...],
    x: Array,
    *,
    rotary: Rotary | None = None,
    mask: Array | None = None,
    caches: Any = None,
    key: Array | None = None,
    bias: Array | None = None,
    remat: str = "none",
) -> tuple[Array, Any]:
    """Apply a stack (scanned) or a tuple of blocks (unrolled) to x (b, t, d).

    `caches`: for a stack one `Cache` with a layer axis, for a tuple a tuple of caches; `remat`: a key of REMAT. Returns
    x (b, t, d) and the caches with `at` moved on by t, or None where none were given.
    """
    if remat not in REMAT:
        raise ValueError(f"remat '{remat}': it is one of {', '.join(REMAT)}")
    t = x.shape[1]
    run = lambda block, x, cache, key: block(x, rotary=rotary, mask=mask, cache=cache, key=key, bias=bias)
    if remat != "none":
        run = jax.checkpoint(run, policy=REMAT[remat], prevent_cse=isinstance(blocks, tuple))

    if isinstance(blocks, tuple):
        after = []
        keys = [None] * len(blocks) if key is None else jax.random.split(key, len(blocks))
        for block, cache, k in zip(blocks, caches or [None] * len(blocks), keys, strict=True):
            x, cache = run(block, x, cache, k)
            after.append(cache)
        return x, None if caches is None else tuple(c._replace(at=c.at + t) for c in after)

    def step(carry, layer):
        x, cache = carry
        block, i, k = layer
        x, cache = run(block, x, None if cache is None else cache._replace(layer=i), k)
        return (x, None if cache is None else cache._replace(layer=None)), None

    depth = depth_of(blocks)
    keys = None if key is None else jax.random.split(key, depth)
    (x, caches), _ = jax.lax.scan(step, (x, caches), (blocks, jnp.arange(depth), keys))
    return x, None if caches is None else caches._replace(at=caches.at + t)
