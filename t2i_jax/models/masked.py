"""Masked generation in any order: a bidirectional Transformer predicts the tokens at hidden positions.

One family for MAR (Li et al. 2024, arXiv:2406.11838), Fluid (Fan et al. 2024), MaskGIT (Chang et al. 2022) and Muse
(Chang et al. 2023): an order sets when each position is predicted, a head turns the network's z into p(x_i | z_i). The
encoder sees condition tokens and known tokens only; the decoder sees mask tokens at hidden positions (He et al. 2022,
MAE). With no encoder layers it is the plain masked Transformer of MaskGIT.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jax import Array

from t2i_jax.core.conditions import Batch, Condition
from t2i_jax.core.family import BaseFamily
from t2i_jax.core.fields import DEEPEST, FREE, SAMPLED, Count, Grid, Positive, Range, Rate, Share, Size
from t2i_jax.core.sharding import shard
from t2i_jax.core.specs import BatchSpec, SampleSpec
from t2i_jax.core.types import Capabilities, Compute, LossOutput
from t2i_jax.heads import DiffusionHead, Head, ImageKeys, sample_spec
from t2i_jax.networks.condition import ClassEmbedder, check_vectors, dropped_rows
from t2i_jax.nn.attention import Padding
from t2i_jax.nn.kernels import Kind
from t2i_jax.nn.layers import LayerNorm, Linear, normal, param
from t2i_jax.nn.tokens import from_tokens, to_tokens
from t2i_jax.nn.transformer import Layer, apply_stack, stack
from t2i_jax.sampling.guidance import Branches, is_guided
from t2i_jax.sampling.inpainting import known_and_keep
from t2i_jax.sampling.options import SHAPES, MaskedSampler, MaskedSchedule
from t2i_jax.sampling.orders import (
    MaskRate,
    Order,
    Sets,
    by_confidence,
    hidden_by,
    orders_of,
    remaining,
    with_known_last,
)
from t2i_jax.sampling.progress import Progress, report

SIZES: dict[str, dict[str, Any]] = {
    "mar-b": dict(width=768, depth=12, heads=12, head=DiffusionHead(width=1024, depth=6)),  # 208 M
    "mar-l": dict(width=1024, depth=16, heads=16, head=DiffusionHead(width=1280, depth=8)),  # 478 M
    "mar-h": dict(width=1280, depth=20, heads=16, head=DiffusionHead(width=1536, depth=12)),  # 942 M
}
"""Published shapes, by name."""


@dataclasses.dataclass(frozen=True)
class Masked(BaseFamily):
    """An encoder of known tokens, a decoder of all, a head, an order, and their training settings."""

    grid: Grid = (16, 16)
    """Rows and columns of tokens."""
    patch: Size = 1
    """Side of the square of codes that makes up a token; more than 1 needs a head that models vectors."""
    head: Head = DiffusionHead()
    order: Annotated[Order, SAMPLED] = Sets()
    rate: MaskRate = MaskRate()
    """Distribution of the share of hidden tokens in training."""
    width: Size = 768
    """Width of the encoder; depth, heads and mlp are also the encoder's."""
    depth: Annotated[int, Range(0, DEEPEST)] = 12
    heads: Size = 12
    mlp: Count = 0
    """Hidden width of the MLP; 0: four times the width."""
    decoder_width: Count = 0
    """Width of the decoder; here and below, 0: as in the encoder."""
    decoder_depth: Annotated[int, Range(0, DEEPEST)] = 0
    decoder_heads: Count = 0
    decoder_mlp: Count = 0
    buffer: Size = 64
    """Prefix length for a condition of one token, which is repeated; longer conditions take one position per token."""
    condition: Condition = ClassEmbedder(1000)
    """Condition prepended to the image: classes, captions or features."""
    size_buckets: Annotated[Size, FREE] = 4
    """Number of sequence lengths compiled for the encoder in the sampler, chosen by the number of known tokens. 1: the
    encoder always reads the full length."""
    dropout: Rate = 0.1
    """Dropout on the output of each attention and MLP, in training."""
    condition_dropout: Share = 0.1
    """Share of training examples whose condition is replaced by the unconditional one, for guidance."""
    eps: Positive = 1e-6
    """Epsilon of the normalisation."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation; parameters, norms and losses are fp32."""
    remat: Annotated[Literal["none", "full", "dots", "branches"], FREE] = "none"
    """Activations that each layer stores for its backward pass."""
    kernel: Kind = "auto"
    """Attention kernel: "plain" matmuls, "cudnn" on GPUs, "splash" on TPUs; "auto": by platform."""
    sampling: Annotated[MaskedSampler, FREE] = MaskedSampler()
    """Default options of `sample`."""

    def __post_init__(self):
        super().__post_init__()
        if self.order.by_confidence and not self.head.knows_probability:
            raise ValueError(
                f"order {type(self.order).__name__} needs a head that knows probabilities, as SoftmaxHead; "
                f"a {type(self.head).__name__} gives none"
            )
        _ = self.sample_spec()  # rejects a patch that no token can be made of
        check_vectors(self.condition, self.width)
        if not (self.depth or self.decoder_depth):
            raise ValueError(
                "depth 0 is a model without encoder, and decoder_depth 0 is as deep as it: set one of them"
            )

    @classmethod
    def sized(cls, size: str, **fields: Any) -> Masked:
        """The configuration of a row of SIZES, with other fields as given. Raises ValueError for an unknown name."""
        if size not in SIZES:
            raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
        shape: dict[str, Any] = SIZES[size] | fields
        return cls(**shape)

    @property
    def length(self) -> int:
        """Tokens of an image."""
        return math.prod(self.grid)

    @property
    def condition_tokens(self) -> int:
        """Number of condition positions before the image."""
        return self.buffer if self.condition.length == 1 else self.condition.length

    @property
    def encoder(self) -> Layer:
        """One block of the encoder."""
        return self._layer(self.width, self.heads, self.mlp)

    @property
    def decoder(self) -> Layer:
        """One block of the decoder."""
        return self._layer(
            self.decoder_width or self.width, self.decoder_heads or self.heads, self.decoder_mlp or self.mlp
        )

    def _layer(self, width: int, heads: int, mlp: int) -> Layer:
        return Layer(
            width,
            heads,
            hidden=mlp,
            norm="layer",
            eps=self.eps,
            activation="gelu",
            bias=True,
            dropout=self.dropout,
            kernel=self.kernel,
        )

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        return Capabilities(
            family=True, unconditional=self.condition_dropout > 0, guidance=True, inpaint=True, token_head=True
        )

    @property
    def compute(self) -> Compute:
        """Settings of the computation."""
        return Compute(self.dtype, self.remat, self.kernel)

    def with_compute(self, compute: Compute) -> Masked:
        """The same model with other settings of the computation."""
        return dataclasses.replace(self, **self.compute.changes(compute, "dtype", "remat", attention="kernel"))

    def sample_spec(self) -> SampleSpec:
        """Shape and dtype of a sample."""
        return sample_spec(self.head, self.grid, self.patch)

    def condition_spec(self) -> BatchSpec:
        """Batch fields that `sample` reads."""
        return self.condition.batch_spec()

    def init(self, key: Array) -> MaskedNetwork:
        """A model with fresh parameters."""
        return MaskedNetwork(self, key)

    # -- training

    def loss(self, model: MaskedNetwork, batch: Batch, key: Array, train: bool = True) -> LossOutput:
        """Mean of -log p(x_i | known, c), or of the head's loss, over hidden positions; and metrics.

        batch: `codes` int (b, h, w) or float (b, h, w, k), the condition's fields, and optionally `weight` (b,), 0 for
        examples to ignore.
        """
        keys = jax.random.split(key, 5)
        x = to_tokens(batch["codes"], self.patch)
        b = len(x)
        orders = orders_of(self.order, jax.random.split(keys[0], b), self.length)
        hidden = hidden_by(orders, self.rate.draw(keys[1], b, self.length, train))
        dropped = dropped_rows(keys[2], self.condition_dropout, b, train)
        z = self.forward(
            model, batch, hidden, dropped, visible=self.rate.visible(self.length), key=keys[3] if train else None
        )
        each = self.head.loss(model.head, z, x, keys[4], train)
        weight = hidden * batch.get("weight", jnp.ones(b)).astype(jnp.float32)[:, None]
        loss = jnp.sum(each * weight) / jnp.maximum(weight.sum(), 1)
        return LossOutput(loss, {"loss": loss, "hidden": hidden.mean()})

    def forward(
        self,
        model: MaskedNetwork,
        batch: Batch,
        hidden: Array,
        dropped: Array | None = None,
        *,
        visible: int | None = None,
        key: Array | None = None,
    ) -> Array:
        """Inputs of the head, z (b, L, d), computed from the codes that `hidden` bool (b, L) leaves visible.

        dropped: bool (b,), rows without their condition. visible: upper bound on the visible tokens of a row; the
        encoder reads no more. key: for dropout.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        dropped = jnp.zeros(len(hidden), bool) if dropped is None else dropped
        condition = self.read(model, batch, dropped)
        size = self.length if visible is None else visible
        y = self.encode(model, condition, to_tokens(batch["codes"], self.patch), hidden, size, keys[0])
        return self.decode(model, condition[1], self.restore(model, y, hidden), keys[1])

    def read(self, model: MaskedNetwork, batch: Batch, dropped: Array) -> tuple[Array, Array]:
        """The condition tokens (b, s, d), and which of them are valid (b, s)."""
        tokens, valid = model.condition(batch, dropped, self.dtype)
        if self.condition.length == 1:
            tokens, valid = (
                repeat(tokens, "b 1 d -> b s d", s=self.condition_tokens),
                repeat(valid, "b 1 -> b s", s=self.condition_tokens),
            )
        return tokens, valid

    def encode(
        self,
        model: MaskedNetwork,
        condition: tuple[Array, Array],
        x: Array,
        hidden: Array,
        size: int,
        key: Array | None = None,
    ) -> Array:
        """Encode the condition and the visible tokens, in ascending position: (b, s + size, d).

        Rows with fewer visible tokens than `size` are filled with hidden ones, which the mask excludes.
        """
        slots, valid = condition
        places = jnp.argsort(hidden, axis=1, stable=True)[:, :size]
        seen = jnp.take_along_axis(~hidden, places, 1)
        x = jax.vmap(lambda x, p: x[p])(x, places)
        entered = model.entrance(x if self.head.code.is_discrete else x.astype(self.dtype)).astype(self.dtype)
        position = model.encoder_position[...].astype(self.dtype)
        y = jnp.concatenate(
            [slots + position[: self.condition_tokens], entered + position[self.condition_tokens :][places]], 1
        )
        y = shard(model.entrance_norm(y), "batch", "length", None)
        if model.encoder is not None:
            mask = Padding(jnp.concatenate([valid, seen], 1))
            y, _ = apply_stack(model.encoder, y, mask=mask, key=key, remat=self.remat)
        return model.encoder_norm(y)

    def restore(self, model: MaskedNetwork, y: Array, hidden: Array) -> Array:
        """Scatter the encoder's output among mask tokens: (b, s + size, d) -> (b, s + L, d')."""
        y = model.widen(y)
        places = jnp.cumsum(~hidden, 1) - 1  # rank of each visible position among the visible ones
        places = jnp.clip(places, 0, max(y.shape[1] - self.condition_tokens - 1, 0))
        if y.shape[1] == self.condition_tokens:  # nothing is visible
            tokens = jnp.zeros((*hidden.shape, y.shape[2]), y.dtype)
        else:
            tokens = jax.vmap(lambda y, p: y[p])(y[:, self.condition_tokens :], places)
        tokens = jnp.where(hidden[..., None], model.mask_token[...].astype(y.dtype), tokens)
        return shard(jnp.concatenate([y[:, : self.condition_tokens], tokens], 1), "batch", "length", None)

    def decode(self, model: MaskedNetwork, valid: Array, y: Array, key: Array | None = None) -> Array:
        """z of every position: (b, s + L, d') -> (b, L, d')."""
        real = jnp.pad(valid, ((0, 0), (0, self.length)), constant_values=True)
        mask = Padding(real) if self.condition.spec.has_padding else None
        y = y + model.decoder_position[...].astype(y.dtype)
        y, _ = apply_stack(model.decoder, y, mask=mask, key=key, remat=self.remat)
        return model.decoder_norm(y)[:, self.condition_tokens :] + model.head_position[...].astype(y.dtype)

    # -- sampling

    @property
    def sizes(self) -> tuple[list[int], list[int]]:
        """Compiled numbers of visible tokens, and of tokens to predict.

        Shapes are static and counts are not, so each step takes the smallest of these that holds its count.
        """
        n = self.length
        visible = sorted({-(-n * (k + 1) // self.size_buckets) for k in range(self.size_buckets)})
        asked = (
            [1] if self.order.one_at_a_time else sorted({min(4**k, n) for k in range(1 + math.ceil(math.log(n, 4)))})
        )
        return visible, asked

    def loop_trips(self, options: MaskedSampler) -> list[tuple[int, ...]]:
        """Index of the compiled sizes that each step takes when all tokens are sampled, for those with more than one
        size."""
        left = [self.length, *remaining(self.length, int(options.iterations), list(SHAPES)[int(options.shape)])]
        left = list(range(self.length, -1, -1)) if self.order.one_at_a_time else [int(n) for n in left]
        steps = [(self.length - now, now if self.order.by_confidence else now - then) for now, then in pairwise(left)]
        find = lambda counts: zip(self.sizes, counts, strict=True)
        return [tuple(bisect_left(s, n) for s, n in find(step) if len(s) > 1) for step in steps]

    def sample(
        self,
        model: MaskedNetwork,
        condition: Batch,
        keys: Array,
        options: MaskedSampler | None = None,
        *,
        known: Array | None = None,
        keep: Array | None = None,
        guided: bool | None = None,
        orders: Array | None = None,
        draws: Any = None,
        progress: Progress | None = None,
    ) -> Array:
        """Codes int32 (b, h, w) or float (b, h, w, k), one image per row of the condition and per key of `keys` (b,).

        An image depends only on its own key and condition, not on its batch. Guidance runs both branches as one batch
        of 2b. All options are traced: new values do not recompile, nor do other numbers of steps.

        known, keep: codes, and a bool (b, rows, columns) of tokens to copy from them, for inpainting or outpainting.
        guided: False skips the unconditional branch, whatever the options say, which halves the cost. None skips it if
            `condition_dropout` is 0, since no unconditional branch was trained.
        orders: int (b, L), each a permutation read from its end; replaces those that `order` samples.
        draws: source of the head's random numbers; replaces `heads.ImageKeys`.
        progress: its listener is called with (steps done, all steps, codes).
        """
        known, keep = known_and_keep(self.capabilities, self.sample_spec(), len(keys), known, keep)
        x = to_tokens(known, self.patch)
        options, guided = (options or self.sampling).arrays(), is_guided(self.capabilities, guided)
        return _sample(self, model, condition, keys, x, keep, orders, draws, options, guided, progress)


class MaskedNetwork(nnx.Module):
    """The parameters of a `Masked`."""

    def __init__(self, config: Masked, key: Array):
        keys = jax.random.split(key, 10)
        d, f, total = config.width, config.decoder.width, config.condition_tokens + config.length
        self.condition = config.condition.init(keys[0], d)
        self.entrance = config.head.entrance(keys[1], d)
        self.encoder_position = param(normal(keys[2], (total, d)), None, "embed")
        self.entrance_norm = LayerNorm(d, config.eps)
        self.encoder = stack(config.encoder, config.depth, keys[3]) if config.depth else None
        self.encoder_norm = LayerNorm(d, config.eps)
        self.widen = Linear(d, f, keys[4], std=None, axes=("embed", "mlp"))
        self.mask_token = param(normal(keys[5], (f,)), "embed")
        self.decoder_position = param(normal(keys[6], (total, f)), None, "embed")
        self.decoder = stack(config.decoder, config.decoder_depth or config.depth, keys[7])
        self.decoder_norm = LayerNorm(f, config.eps)
        self.head_position = param(normal(keys[8], (config.length, f)), None, "embed")
        self.head: Any = config.head.init(keys[9], f)


@partial(jax.jit, static_argnames=("config", "guided"))
def _sample(
    config: Masked,
    model: MaskedNetwork,
    condition: Batch,
    keys: Array,
    x: Array,
    keep: Array,
    orders: Array | None,
    draws: Any,
    options: MaskedSchedule,
    guided: bool,
    progress: Progress | None,
) -> Array:
    b, length, order = len(x), config.length, config.order
    both = Branches(guided)
    slots = config.read(model, both.rows(condition), both.dropped(b))
    keep = rearrange(keep, "b h w -> b (h w)")
    own = jax.vmap(jax.random.split)(keys)
    orders = orders_of(config.order, own[:, 0], length) if orders is None else orders
    draws = ImageKeys(own[:, 1]) if draws is None else draws
    orders = with_known_last(orders, keep)
    total = jnp.sum(~keep, 1)
    most = jnp.max(total)
    steps = most if order.one_at_a_time else jnp.minimum(most, options.iterations)
    step_places = jax.vmap(lambda row, n: row[n])

    visible_sizes, asked_sizes = config.sizes

    def look(size: int, x: Array, hidden: Array) -> Array:
        x, hidden = both.rows((x, hidden))
        return config.restore(model, config.encode(model, slots, x, hidden, size), hidden)

    def ask(size: int, x: Array, z: Array, orders: Array, first: Array, last: Array, i: Array) -> tuple[Array, Array]:
        """Codes with positions `first` to `last` of the order resampled, and their scores (b, L)."""
        number = first[:, None] + jnp.arange(size)
        places = step_places(orders, jnp.minimum(number, length - 1))
        asked, null = both.split(step_places(z, both.rows(places)))
        scale = options.guidance_at(length - jnp.maximum(after(i, last), 1) - 1, length)
        drawn, score = config.head.sample(model.head, asked, null, draws.at(i, places), scale, options)
        into = jnp.where(number < last[:, None], places, length)  # padding beyond the end is dropped
        write = jax.vmap(lambda row, p, value: row.at[p].set(value, mode="drop"))
        scores = jnp.zeros((b, length)) if score is None else write(jnp.zeros((b, length)), into, score)
        return write(x, into, drawn.astype(x.dtype)), scores

    def after(i: Array, now: Array) -> Array:
        """Number of tokens hidden after step i."""
        return jnp.maximum(now - 1, 0) if order.one_at_a_time else options.remaining(i, total, now)

    def step(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        x, orders, now, i = state
        hidden = hidden_by(orders, now)
        y = _switch(visible_sizes, jnp.max(length - now), look, x, hidden)
        z = config.decode(model, slots[1], y)
        then = after(i, now)
        first = jnp.zeros_like(then) if order.by_confidence else then
        x, scores = _switch(asked_sizes, jnp.max(now - first), ask, x, z, orders, first, now, i)
        if order.by_confidence:
            fading = options.choice_temperature * (1 - (i + 1) / options.iterations)
            uniform = draws.at(i, jnp.broadcast_to(jnp.arange(length), (b, length))).uniform(1)
            gumbel = -jnp.log(-jnp.log(jnp.clip(uniform, 1e-7, 1 - 1e-7)))
            orders = by_confidence(orders, now, scores + fading[..., None] * gumbel)
        done = jnp.where(jnp.any(then > 0), i + 1, steps)
        report(progress, done, steps, from_tokens(x, config.grid, config.patch))
        return x, orders, then, i + 1

    start = (x, orders, total, jnp.zeros((), jnp.int32))
    x, *_ = jax.lax.while_loop(lambda state: jnp.any(state[2] > 0), step, start)
    return from_tokens(x, config.grid, config.patch)


def _switch(sizes: list[int], count: Array, branch: Callable[..., Any], *arguments: Any) -> Any:
    """branch(size, *arguments) with the smallest of `sizes` that holds `count`; only that branch runs."""
    index = jnp.searchsorted(jnp.asarray(sizes), count)
    return jax.lax.switch(index, [partial(branch, size) for size in sizes], *arguments)
