"""The Transformer that families, networks and text encoders share.

A stack is one `Block` whose arrays have a leading layer axis; `scan_stack` scans over it. Decoding unrolls the layers
instead (`unstack`, `apply_layers`): a scan would copy the weights and cache of each layer out of the stack at every
token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from t2i_jax.core.arrays import Bool, Float, typed
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import DEEPEST, Checked, Count, NotNegative, Positive, Range, Rate, Size, values
from t2i_jax.core.sharding import shard
from t2i_jax.core.types import AttentionKind, Remat
from t2i_jax.nn import kernels
from t2i_jax.nn.attention import MaskSpec, Rotary, attend, rotate
from t2i_jax.nn.layers import LayerNorm, Linear, RMSNorm, at_least_fp32, matmul, param, remat_elementwise, unit
from t2i_jax.nn.stationary import stays

Activation = Literal["swiglu", "geglu", "geglu_exact", "relu", "gelu", "gelu_tanh", "quick_gelu"]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
    "geglu_exact": partial(jax.nn.gelu, approximate=False),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
GATED = ("swiglu", "geglu", "geglu_exact")
"""Gated activations (Shazeer 2020): the MLP has a third matrix."""

_policies = jax.checkpoint_policies
REMAT: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "full": _policies.nothing_saveable,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(kernels.KEPT)
    ),
    "branches": _policies.save_only_these_names("branch"),
}
"""What a layer keeps for its backward pass: everything; only its input; also its matrix products, including residuals
of splash attention; also the outputs of its branches."""
REMATS: tuple[Remat, ...] = ("full", "dots", "branches")
"""Choices of `Compute.remat` besides none."""


@dataclasses.dataclass(frozen=True)
class Transformer(Checked):
    """Shape and kind of a stack of Transformer blocks: the one config of all families, networks and text encoders."""

    width: Size = 256
    depth: Annotated[int, Range(0, DEEPEST)] = 6
    """number of blocks; 0 where a network can do without, as the encoder of `models.masked`"""
    heads: Size = 4
    kv_heads: Count = 0
    """key-value heads, each shared by heads / kv_heads query heads (Ainslie et al. 2023); 0: as many as heads"""
    head_dim: Count = 0
    """0: width / heads"""
    mlp: Count = 0
    """width inside the MLP; 0: 4 width, with a gate 8/3 width rounded up to a multiple of 64"""
    norm: Literal["rms", "layer"] = "rms"
    eps: Positive = 1e-5
    post_norm: bool = False
    """normalise after the residual sum (BERT) instead of before each branch"""
    activation: Activation = "swiglu"
    bias: bool = False
    qkv_bias: bool | None = None
    """of queries, keys and values; None: like `bias`"""
    key_bias: bool = True
    """keys have the bias that queries and values have; else theirs stays at zero"""
    out_bias: bool | None = None
    """of the output of attention; None: like `bias`"""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head (Dehghani et al. 2023)"""
    cosine: bool = False
    """queries and keys have length 1; their products are multiplied by a learned factor per head, 4 at first and 100 at
    most (Liu et al. 2022, Swin Transformer V2, 3.2)"""
    scale: NotNegative = 0.0
    """factor on attention logits; 0: head_dim^-1/2, or 1 with `cosine`"""
    rope_values: bool = False
    """apply rotary positions to values too"""
    sandwich_norm: bool = False
    """also normalise the output of each branch (Ding et al. 2021, CogView, Sandwich-LN)"""
    layer_scale: bool = False
    """multiply the output of each branch by a learned vector (Touvron et al. 2021, LayerScale)"""
    pb_relax: bool = False
    """avoid overflow in low precision (Ding et al. 2021, CogView, PB-Relax): queries are divided by 32 before their
    products, which are scaled back in fp32; LayerNorm first divides by max |x| / 8"""
    dropout: Rate = 0.0
    """dropout rate on the output of each branch"""

    def __post_init__(self):
        super().__post_init__()
        if not self.head_dim and self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be split into heads {self.heads}; set head_dim")
        if self.heads % self.num_kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.qk_norm and self.cosine:
            raise ValueError("qk_norm and cosine: queries and keys are normalised in one way")

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads m."""
        return self.kv_heads or self.heads

    @property
    def head_size(self) -> int:
        """Head dimension h."""
        return self.head_dim or self.width // self.heads

    @property
    def mlp_dim(self) -> int:
        """MLP width f."""
        wide = -(-8 * self.width // 3 // 64) * 64 if self.activation in GATED else 4 * self.width
        return self.mlp or wide

    @property
    def biases(self) -> tuple[bool, bool]:
        """Whether queries, keys and values have a bias, and whether the output of attention has one."""
        qkv, out = (self.bias if b is None else b for b in (self.qkv_bias, self.out_bias))
        return qkv, out

    def check_plain(self, who: str, *fields: str) -> None:
        """Errors: `ConfigError` for one of `fields` that is not at its default, which blocks of `who` do not have."""
        given, plain = values(self), values(Transformer())
        if odd := [name for name in fields if given[name] != plain[name]]:
            raise ConfigError(f"transformer.{odd[0]} {given[odd[0]]!r}: blocks of {who} have no such part")

    def normalise(self, affine: bool = True) -> RMSNorm | LayerNorm:
        """The normalisation of a branch; affine: with a learned scale (and shift)."""
        if self.norm == "rms":
            return RMSNorm(self.width, self.eps, affine)
        return LayerNorm(self.width, self.eps, affine, relax=8.0 if self.pb_relax else 0.0)


class Cache(NamedTuple):
    """Key-value cache of a layer: k and v (b, m, s, h), filled up to position `at`.

    Heads precede positions, the order in which a decoding step reads them.
    """

    k: Array
    v: Array
    at: Array
    past: Array | None = None
    """(b, 2, s, d / 2): inputs of both branches at each position, for a `TokenShift`"""
    context: tuple[Array, Array] | None = None
    """keys and values (b, s', n, h) of the context"""

    @classmethod
    def empty(cls, layer: Transformer, b: int, s: int, dtype: DTypeLike = jnp.float32) -> Cache:
        """An empty cache with room for s positions."""
        shape = (b, layer.num_kv_heads, s, layer.head_size)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))

    def grow(self, s: int) -> Cache:
        """The same with room for s positions."""
        room = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, s - x.shape[2]), (0, 0)])
        return self._replace(k=room(self.k), v=room(self.v), past=None if self.past is None else room(self.past))

    def extend(
        self, k: Float[Array, "b t m h"], v: Float[Array, "b t m h"]
    ) -> tuple[Cache, Float[Array, "b s m h"], Float[Array, "b s m h"]]:
        """Write k and v at position `at`; returns the new cache and all keys and values."""
        write = lambda into, x: jax.lax.dynamic_update_slice_in_dim(
            into, x.astype(into.dtype).swapaxes(1, 2), self.at, 2
        )
        new = self._replace(k=write(self.k, k), v=write(self.v, v))
        return new, new.k.swapaxes(1, 2), new.v.swapaxes(1, 2)


class TokenShift(NamedTuple):
    """Token shift: channels of a branch's input come from preceding neighbours, as in DALLE-pytorch (after Peng 2021).

    In the prefix, half of the channels come from the previous position. In the raster grid after it, a quarter comes
    from the cell above, a quarter from the cell on the left, with zeros outside of the grid.
    """

    prefix: int
    columns: int

    def __call__(self, x: Array, cache: Cache | None, branch: int) -> tuple[Array, Cache | None]:
        """Shift x (b, t, d), which begins at position `cache.at`, or at 0 without a cache; the cache stores what later
        positions need."""
        t, quarter = x.shape[1], x.shape[2] // 4
        first, past = jnp.zeros((), jnp.int32), x[..., : 2 * quarter]
        if cache is not None and cache.past is not None:
            first = cache.at
            kept = jax.lax.dynamic_update_slice(
                cache.past, past[:, None].astype(cache.past.dtype), (0, branch, first, 0)
            )
            cache, past = cache._replace(past=kept), kept[:, branch]
        place = first + jnp.arange(t)
        cell = place - self.prefix
        above = jnp.where(cell < 0, place - 1, jnp.where(cell >= self.columns, place - self.columns, -1))
        left = jnp.where((cell < 0) | (cell % self.columns > 0), place - 1, -1)
        take = lambda y, n: jnp.where(n[:, None] >= 0, y[:, jnp.maximum(n, 0)], 0).astype(x.dtype)
        parts = (take(past[..., :quarter], above), take(past[..., quarter:], left), x[..., 2 * quarter :])
        return jnp.concatenate(parts, -1), cache


class Attention(nnx.Module):
    """Self-attention.

    Queries, keys and values come from one matrix (d, m (g + 2) h). Its columns are grouped by key-value head, each with
    its g queries, its key and its value, so that sharding over heads never separates them.
    """

    def __init__(self, config: Transformer, key: Array, kernel: AttentionKind = "auto"):
        n, m, h = config.heads, config.num_kv_heads, config.head_size
        keys = jax.random.split(key)
        qkv_bias, out_bias = config.biases
        self.qkv = Linear(config.width, (n + 2 * m) * h, keys[0], bias=qkv_bias, axes=("embed", "heads"))
        self.out = Linear(n * h, config.width, keys[1], bias=out_bias, axes=("heads", "embed"))
        self.q_norm = RMSNorm(h, config.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(h, config.eps) if config.qk_norm else None
        self.log_factor = param(jnp.full(n, math.log(4.0)), None) if config.cosine else None
        self.kv_heads, self.head_dim = m, h
        self.scale = config.scale or (1.0 if config.cosine else h**-0.5)
        self.key_bias = config.key_bias
        self.turn_values, self.relax = config.rope_values, 32 if config.pb_relax else 1
        self.kernel: AttentionKind = kernel

    @typed
    def read(
        self, x: Float[Array, "b t d"]
    ) -> tuple[Float[Array, "b t n h"], Float[Array, "b t m h"], Float[Array, "b t m h"]]:
        """Queries, keys and values of x."""

        def apart(a: Array) -> list[Array]:
            a = rearrange(a, "... (m g h) -> ... m g h", m=self.kv_heads, h=self.head_dim)
            return jnp.split(a, (a.shape[-2] - 2, a.shape[-2] - 1), -2)

        if not isinstance(self.qkv, Linear) or stays(self.qkv):  # weights transposed for decoding, or stationary
            q, k, v = (rearrange(a, "b t m g h -> b t (m g) h") for a in apart(self.qkv(x)))
            return q, k, v
        # Split the matrix, not its output, which is far larger for many rows.
        qkv = self.qkv
        parts = lambda i: qkv.columns(lambda a: rearrange(apart(a)[i], "... m g h -> ... (m g h)"))
        # Without gradient, the bias of keys stays at the zeros that it begins with.
        read = lambda i, part: part(x) if i != 1 or self.key_bias else matmul(x, part.w)
        q, k, v = (rearrange(read(i, parts(i)), "b t (n h) -> b t n h", h=self.head_dim) for i in range(3))
        return q, k, v

    @typed
    def normalised(
        self, q: Float[Array, "b t n h"], k: Float[Array, "b t m h"]
    ) -> tuple[Float[Array, "b t n h"], Float[Array, "b t m h"]]:
        """Queries and keys with the lengths that their products are taken at."""
        if self.q_norm is not None and self.k_norm is not None:
            return self.q_norm(q), self.k_norm(k)
        if self.log_factor is None:
            return q, k
        factor = jnp.exp(jnp.minimum(self.log_factor[...], math.log(100.0)))[:, None]
        return (unit(at_least_fp32(q)) * factor).astype(q.dtype), unit(at_least_fp32(k)).astype(k.dtype)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        rotary: Rotary | None = None,
        mask: Bool[Array, "_ _ _ s"] | MaskSpec | None = None,
        cache: Cache | None = None,
        bias: Float[Array, "_ n t s"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        q, k, v = self.read(x)
        q, k = self.normalised(q, k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
            v = rotate(v, *rotary) if self.turn_values else v
        q, k, v = (shard(a, "batch", None, "heads", None) for a in (q, k, v))
        if cache is not None:
            cache, k, v = cache.extend(k, v)
        k, v, scale = k.astype(q.dtype), v.astype(q.dtype), self.scale * self.relax
        y = attend(q / self.relax, k, v, mask, scale, bias, self.kernel)
        return self.out(rearrange(y, "b t n h -> b t (n h)")), cache


class CrossAttention(nnx.Module):
    """Positions attend to other vectors. Keys and values come from one matrix, head by head."""

    def __init__(self, config: Transformer, context: int, key: Array):
        n, h = config.heads, config.head_size
        keys = jax.random.split(key, 3)
        qkv_bias, out_bias = config.biases
        self.q = Linear(config.width, n * h, keys[0], bias=qkv_bias, axes=("embed", "heads"))
        self.kv = Linear(context, 2 * n * h, keys[1], bias=qkv_bias, axes=("embed", "heads"))
        self.out = Linear(n * h, config.width, keys[2], bias=out_bias, axes=("heads", "embed"))
        self.heads = n

    @typed
    def read(self, context: Float[Array, "b s k"]) -> tuple[Float[Array, "b s n h"], Float[Array, "b s n h"]]:
        """Keys and values, shared by all positions."""
        kv = rearrange(self.kv(context), "b s (n a h) -> a b s n h", n=self.heads, a=2)
        return shard(kv[0], "batch", None, "heads", None), shard(kv[1], "batch", None, "heads", None)

    def attend(
        self, x: Float[Array, "b t d"], kv: tuple[Array, Array], mask: Bool[Array, "b 1 _ s"] | None = None
    ) -> Float[Array, "b t d"]:
        """Attend from x to keys and values of `read`; mask: True where a position may attend."""
        q = shard(rearrange(self.q(x), "b t (n h) -> b t n h", n=self.heads), "batch", None, "heads", None)
        return self.out(rearrange(attend(q, *kv, mask), "b t n h -> b t (n h)"))

    def __call__(
        self, x: Float[Array, "b t d"], context: Float[Array, "b s k"], mask: Bool[Array, "b 1 _ s"] | None = None
    ) -> Float[Array, "b t d"]:
        return self.attend(x, self.read(context), mask)


class MLP(nnx.Module):
    """act(x W_in) W_out at every position, or (act(x W_gate) * x W_in) W_out with a gate."""

    def __init__(self, config: Transformer, key: Array):
        keys = jax.random.split(key, 3)
        d, f, bias = config.width, config.mlp_dim, config.bias
        self.gate = Linear(d, f, keys[0], bias=bias) if config.activation in GATED else None
        self.into = Linear(d, f, keys[1], bias=bias)
        self.out = Linear(f, d, keys[2], bias=bias, axes=("mlp", "embed"))
        self.activation = config.activation

    @typed
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        act = ACTIVATIONS[self.activation]
        gated = remat_elementwise(lambda gate, y: act(gate) * y)
        y = remat_elementwise(act)(self.into(x)) if self.gate is None else gated(self.gate(x), self.into(x))
        return self.out(shard(y, "batch", None, "mlp"))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `post_norm` norm(x + attention(x)), then norm(x + mlp(x)).

    alone: the first attention, too, is to the context, and positions do not see each other.
    """

    def __init__(
        self,
        config: Transformer,
        key: Array,
        kernel: AttentionKind = "auto",
        context: int = 0,
        alone: bool = False,
    ):
        keys = jax.random.split(key)
        self.attention_norm = config.normalise()
        self.attention: Attention | CrossAttention = (
            CrossAttention(config, context, keys[0]) if alone else Attention(config, keys[0], kernel)
        )
        self.mlp_norm, self.mlp = config.normalise(), MLP(config, keys[1])
        self.cross_norm = config.normalise() if context else None
        self.cross = CrossAttention(config, context, jax.random.fold_in(key, 2)) if context else None
        self.attention_out_norm = config.normalise() if config.sandwich_norm else None
        self.mlp_out_norm = config.normalise() if config.sandwich_norm else None
        self.attention_scale = param(jnp.ones(config.width), None) if config.layer_scale else None
        self.mlp_scale = param(jnp.ones(config.width), None) if config.layer_scale else None
        self.post_norm, self.dropout = config.post_norm, config.dropout

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        rotary: Rotary | None = None,
        mask: Bool[Array, "_ _ _ s"] | MaskSpec | None = None,
        cache: Cache | None = None,
        key: Array | None = None,
        bias: Float[Array, "_ n t s"] | None = None,
        shift: TokenShift | None = None,
        context: Float[Array, "b p k"] | None = None,
        context_mask: Bool[Array, "b 1 1 p"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        """Apply the block to x at the positions of `rotary`, with `mask` (b or 1, 1 or n, t, s).

        `bias` is added to the attention logits; `shift` is the token shift of each branch's input. Cross-attention
        reads `context` where `context_mask` is True; a cache keeps its keys and values, so later calls omit it.

        With a cache the keys and values of x are written at `cache.at`, and s is the length of the cache: the mask has
        to hide positions not yet written. No dropout without a key. Returns x and the new cache; the caller
        advances its `at`.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        before = lambda norm, y: y if self.post_norm else norm(y)
        after = lambda norm, y: norm(y) if self.post_norm else y
        mixed = lambda y, cache, branch: (y, cache) if shift is None else shift(y, cache, branch)

        def branch(y: Array, norm: RMSNorm | LayerNorm | None, scale: nnx.Param | None, key: Array | None) -> Array:
            y = drop(y, self.dropout, key)
            y = y if norm is None else norm(y)
            return checkpoint_name(y if scale is None else y * scale[...].astype(y.dtype), "branch")

        y, cache = mixed(before(self.attention_norm, x), cache, 0)
        if isinstance(self.attention, CrossAttention):
            if context is None:
                raise ValueError("attention to the context has nothing to look at: there is no context")
            y = self.attention(y, context, context_mask)
        else:
            y, cache = self.attention(y, rotary, mask, cache, bias)
        x = after(self.attention_norm, x + branch(y, self.attention_out_norm, self.attention_scale, keys[0]))
        if self.cross is not None:
            if context is not None:
                kv = self.cross.read(context)
                cache = None if cache is None else cache._replace(context=kv)
            elif cache is not None and cache.context is not None:
                kv = cache.context
            else:
                raise ValueError("cross-attention has nothing to look at: no context, and none in the cache")
            y = self.cross.attend(before(self.cross_norm, x), kv, context_mask)
            last = None if key is None else jax.random.fold_in(key, 2)
            x = after(self.cross_norm, x + branch(y, None, None, last))
        y, cache = mixed(before(self.mlp_norm, x), cache, 1)
        x = after(self.mlp_norm, x + branch(self.mlp(y), self.mlp_out_norm, self.mlp_scale, keys[1]))
        return shard(x, "batch", "length", None), cache


@typed
def drop(x: Float[Array, "*b"], rate: float, key: Array | None) -> Float[Array, "*b"]:
    """Dropout with probability `rate` (Srivastava et al. 2014); x itself without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def stack(
    config: Transformer, key: Array, kernel: AttentionKind = "auto", context: int = 0, alone: bool = False
) -> Block:
    """The blocks as one whose arrays have a leading layer axis.

    kernel: implementation of self-attention over whole sequences. context: width of the vectors that cross-attention
    reads, between attention and MLP; 0: no cross-attention. alone: the first attention reads them, too. Errors:
    `ConfigError` for a depth of 0.
    """
    if not config.depth:
        raise ConfigError("transformer.depth 0: at least one block is needed here")
    return jax.vmap(lambda k: Block(config, k, kernel, context, alone))(jax.random.split(key, config.depth))


def depth_of(blocks: Block) -> int:
    """The number of blocks in a stack."""
    return jax.tree.leaves(blocks)[0].shape[0]


def scale_residuals(blocks: Block) -> None:
    """Divide the output matrices of the branches of new blocks by sqrt(2 depth).

    Every layer adds to the residual stream: scaled weights keep its variance near 1 (Radford et al. 2019).
    """
    for branch in (blocks.attention, blocks.mlp):
        branch.out.w = param(branch.out.w[...] / math.sqrt(2 * depth_of(blocks)), *branch.out.w.axes)


def unstack(blocks: Block) -> tuple[Block, ...]:
    """The blocks of a stack as a tuple; done once, outside of the decoding loop."""
    return tuple(jax.tree.map(lambda a, i=i: a[i], blocks) for i in range(depth_of(blocks)))


@typed
def scan_stack(
    blocks: Block,
    x: Float[Array, "b t d"],
    *,
    rotary: Rotary | None = None,
    mask: Array | MaskSpec | None = None,
    key: Array | None = None,
    bias: Array | None = None,
    shift: TokenShift | None = None,
    context: Array | None = None,
    context_mask: Array | None = None,
    remat: str = "none",
) -> Float[Array, "b t d"]:
    """Apply a stack of blocks to x; arguments as of `Block`.

    `mask` may be a structured mask (`nn.attention`); with five dimensions it holds masks that the layers use in turn.
    `remat`: a key of `REMAT`.
    """
    if remat not in REMAT:
        raise ValueError(f"remat '{remat}': it is one of {', '.join(REMAT)}")
    rules = dict(rotary=rotary, bias=bias, shift=shift, context=context, context_mask=context_mask)
    run = lambda block, x, key, i: block(x, mask=_mask_of(mask, i), key=key, **rules)[0]
    if remat != "none":
        run = jax.checkpoint(run, policy=REMAT[remat], prevent_cse=False)
    depth = depth_of(blocks)
    keys = None if key is None else jax.random.split(key, depth)
    layers = blocks, keys, jnp.arange(depth)
    return jax.lax.scan(lambda x, layer: (run(layer[0], x, *layer[1:]), None), x, layers)[0]


@typed
def apply_layers(
    blocks: tuple[Block, ...],
    x: Float[Array, "b t d"],
    caches: tuple[Cache, ...],
    *,
    rotary: Rotary | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    shift: TokenShift | None = None,
    context: Array | None = None,
    context_mask: Array | None = None,
) -> tuple[Float[Array, "b t d"], tuple[Cache, ...]]:
    """Apply the blocks of `unstack` to x, each with its cache; returns also the caches advanced by t.

    `mask` with five dimensions holds masks that the layers use in turn; the other arguments are as of `Block`.
    """
    after = []
    for i, (block, cache) in enumerate(zip(blocks, caches, strict=True)):
        x, new = block(
            x,
            rotary=rotary,
            mask=_mask_of(mask, i),
            cache=cache,
            bias=bias,
            shift=shift,
            context=context,
            context_mask=context_mask,
        )
        after.append(new._replace(at=new.at + x.shape[1]))
    return x, tuple(after)


def _mask_of(mask: Array | MaskSpec | None, i: Array | int) -> Array | MaskSpec | None:
    """The mask of layer i."""
    return mask[i % len(mask)] if isinstance(mask, Array) and mask.ndim == 5 else mask
