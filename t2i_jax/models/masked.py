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
from typing import Annotated, TypeVar

import jax
import jax.numpy as jnp
from einops import repeat
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Bool, Float, Shaped, typed
from t2i_jax.core.conditions import Batch
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import FREE, SAMPLED, Grid, Size
from t2i_jax.core.sharding import shard
from t2i_jax.core.types import Compute, LossOutput
from t2i_jax.heads import DiffusionHead, HeadFamily, ImageKeys, TokenHead
from t2i_jax.networks.condition import ClassEmbedder, Conditioning, dropped_rows
from t2i_jax.nn.attention import Padding, Rotary
from t2i_jax.nn.layers import Linear, normal, param
from t2i_jax.nn.losses import row_weights, weighted_mean
from t2i_jax.nn.positions import LearnedPositions, RotaryPositions
from t2i_jax.nn.tokens import from_tokens, to_tokens
from t2i_jax.nn.transformer import Transformer, scan_stack, stack
from t2i_jax.sampling.guidance import Branches
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

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Masked(HeadFamily[MaskedSampler]):
    """An encoder of known tokens, a decoder of all, a head, an order, and their training settings."""

    grid: Grid = (16, 16)
    """Rows and columns of tokens."""
    patch: Size = 1
    """Side of the square of codes that makes up a token; more than 1 needs a head that models vectors."""
    head: TokenHead = DiffusionHead()
    order: Annotated[Order, SAMPLED] = Sets()
    rate: MaskRate = MaskRate()
    """Distribution of the share of hidden tokens in training."""
    transformer: Transformer = Transformer(
        768, 12, 12, norm="layer", eps=1e-6, activation="gelu", bias=True, dropout=0.1
    )
    """The encoder; with a depth of 0 there is none, and only its width and norm count."""
    decoder: Transformer | None = None
    """None: like the encoder."""
    positions: LearnedPositions | RotaryPositions = LearnedPositions()
    """Learned vectors at the inputs of encoder, decoder and head, or rotated queries and keys in both."""
    buffer: Size = 64
    """Prefix length for a condition of one token, which is repeated; longer conditions take one position per token."""
    conditioning: Conditioning = Conditioning(ClassEmbedder(1000))
    """The class, a caption or features, as a prefix of the image."""
    size_buckets: Annotated[Size, FREE] = 4
    """Number of sequence lengths compiled for the encoder in the sampler, chosen by the number of known tokens. 1: the
    encoder always reads the full length."""
    compute: Compute = Compute()
    sampling: Annotated[MaskedSampler, FREE] = MaskedSampler()
    """Default options of `sample`."""

    def __post_init__(self):
        super().__post_init__()
        if self.order.by_confidence and not self.head.knows_probability:
            raise ValueError(
                f"order {type(self.order).__name__} needs a head that knows probabilities, as SoftmaxHead; "
                f"a {type(self.head).__name__} gives none"
            )
        if not self.decoding.depth:
            raise ConfigError("transformer.depth 0 is a model without encoder: it needs a `decoder` with layers")
        if isinstance(self.positions, LearnedPositions) and self.positions.count:
            raise ConfigError("positions.count: the tables of Masked have a row for each token")

    @property
    def condition_tokens(self) -> int:
        """Number of condition positions before the image."""
        return self.buffer if self.conditioning.what.length == 1 else self.conditioning.what.length

    @property
    def decoding(self) -> Transformer:
        """The decoder."""
        return self.decoder or self.transformer

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
        dropped = dropped_rows(keys[2], self.conditioning.dropout, b, train)
        z = model(batch, hidden, dropped, visible=self.rate.visible(self.length), key=keys[3] if train else None)
        each = self.head.loss(model.head, z, x, keys[4], train)
        loss = weighted_mean(each, hidden * row_weights(batch, b)[:, None])
        return LossOutput(loss, {"loss": loss, "hidden": hidden.mean()})

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

    def draw(
        self,
        model: MaskedNetwork,
        condition: Batch,
        x: Array,
        keep: Array,
        orders: Array,
        draws: ImageKeys,
        options: MaskedSchedule,
        both: Branches,
        progress: Progress | None,
    ) -> Array:
        """Tokens (b, L, *code): see `HeadFamily`. Each step predicts all hidden tokens, and the schedule says how many
        stay."""
        b, length, order = len(x), self.length, self.order
        slots, valid = model.read(both.rows(condition), both.dropped(b))
        orders = with_known_last(orders, keep)
        total = jnp.sum(~keep, 1)
        most = jnp.max(total)
        steps = most if order.one_at_a_time else jnp.minimum(most, options.iterations)
        step_places = jax.vmap(lambda row, n: row[n])

        visible_sizes, asked_sizes = self.sizes

        def look(size: int, x: Array, hidden: Array) -> Array:
            x, hidden = both.rows((x, hidden))
            return model.restore(model.encode(slots, valid, x, hidden, size), hidden)

        def ask(
            size: int, x: Array, z: Array, orders: Array, first: Array, last: Array, i: Array
        ) -> tuple[Array, Array]:
            """Codes with positions `first` to `last` of the order resampled, and their scores (b, L)."""
            number = first[:, None] + jnp.arange(size)
            places = step_places(orders, jnp.minimum(number, length - 1))
            asked, null = both.split(step_places(z, both.rows(places)))
            scale = options.guidance_at(length - jnp.maximum(after(i, last), 1) - 1, length)
            drawn, score = self.head.sample(model.head, asked, null, draws.at(i, places), scale, options)
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
            z = model.decode(y, valid)
            then = after(i, now)
            first = jnp.zeros_like(then) if order.by_confidence else then
            x, scores = _switch(asked_sizes, jnp.max(now - first), ask, x, z, orders, first, now, i)
            if order.by_confidence:
                fading = options.choice_temperature * (1 - (i + 1) / options.iterations)
                uniform = draws.at(i, jnp.broadcast_to(jnp.arange(length), (b, length))).uniform(1)
                gumbel = -jnp.log(-jnp.log(jnp.clip(uniform, 1e-7, 1 - 1e-7)))
                orders = by_confidence(orders, now, scores + fading[..., None] * gumbel)
            done = jnp.where(jnp.any(then > 0), i + 1, steps)
            report(progress, done, steps, from_tokens(x, self.grid, self.patch))
            return x, orders, then, i + 1

        start = (x, orders, total, jnp.zeros((), jnp.int32))
        x, *_ = jax.lax.while_loop(lambda state: jnp.any(state[2] > 0), step, start)
        return x


class MaskedNetwork(nnx.Module):
    """The encoder of known tokens and the decoder of all, from codes to the inputs of the head."""

    def __init__(self, config: Masked, key: Array):
        self.config, keys = config, jax.random.split(key, 10)
        encoder, decoder, kernel = config.transformer, config.decoding, config.compute.attention
        d, f, total = encoder.width, decoder.width, config.condition_tokens + config.length
        learned = isinstance(config.positions, LearnedPositions)
        table = lambda key, rows, width: param(normal(key, (rows, width)), None, "embed") if learned else None
        self.condition = config.conditioning.what.init(keys[0], d)
        self.entrance = config.head.entrance(keys[1], d)
        self.encoder_position = table(keys[2], total, d)
        self.entrance_norm = encoder.normalise()
        self.encoder = stack(encoder, keys[3], kernel) if encoder.depth else None
        self.encoder_norm = encoder.normalise()
        self.widen = Linear(d, f, keys[4], std=None, axes=("embed", "mlp"))
        self.mask_token = param(normal(keys[5], (f,)), "embed")
        self.decoder_position = table(keys[6], total, f)
        self.decoder = stack(decoder, keys[7], kernel)
        self.decoder_norm = decoder.normalise()
        self.head_position = table(keys[8], config.length, f)
        self.head = config.head.init(keys[9], f)

    @typed
    def __call__(
        self,
        batch: Batch,
        hidden: Bool[Array, "b t"],
        dropped: Bool[Array, " b"] | None = None,
        *,
        visible: int | None = None,
        key: Array | None = None,
    ) -> Float[Array, "b t d"]:
        """Inputs of the head, z (b, L, d), computed from the codes that `hidden` bool (b, L) leaves visible.

        batch: `codes`, and the condition's fields. dropped: bool (b,), rows without their condition. visible: upper
        bound on the visible tokens of a row; the encoder reads no more. key: for dropout.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        slots, valid = self.read(batch, jnp.zeros(len(hidden), bool) if dropped is None else dropped)
        size = self.config.length if visible is None else visible
        y = self.encode(slots, valid, to_tokens(batch["codes"], self.config.patch), hidden, size, keys[0])
        return self.decode(self.restore(y, hidden), valid, keys[1])

    @typed
    def read(self, batch: Batch, dropped: Bool[Array, " b"]) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        """The condition tokens (b, s, d), and which of them are valid (b, s); dropped: bool (b,)."""
        tokens, valid = self.condition(batch, dropped, self.config.compute.dtype)
        count = self.config.condition_tokens // tokens.shape[1]  # a single token fills the buffer
        return repeat(tokens, "b s d -> b (s n) d", n=count), repeat(valid, "b s -> b (s n)", n=count)

    @typed
    def encode(
        self,
        slots: Float[Array, "b s d"],
        valid: Bool[Array, "b s"],
        x: Shaped[Array, "b t *k"],
        hidden: Bool[Array, "b t"],
        size: int,
        key: Array | None = None,
    ) -> Float[Array, "b _ d"]:
        """Encode the condition tokens (b, s, d) and the visible ones of x, in ascending position: (b, s + size, d).

        Rows with fewer visible tokens than `size` are filled with hidden ones, which the mask excludes.
        """
        config, dtype = self.config, self.config.compute.dtype
        places = jnp.argsort(hidden, axis=1, stable=True)[:, :size]
        seen = jnp.take_along_axis(~hidden, places, 1)
        x = jax.vmap(lambda x, p: x[p])(x, places)
        entered = self.entrance(x if config.head.code.is_discrete else x.astype(dtype)).astype(dtype)
        y = jnp.concatenate([slots, entered], 1)
        prefix = jnp.broadcast_to(jnp.arange(slots.shape[1]), slots.shape[:2])
        at = jnp.concatenate([prefix, slots.shape[1] + places], 1)  # numbers in the sequence of condition and image
        if self.encoder_position is not None:
            y = y + self.encoder_position[...].astype(y.dtype)[at]
        y = shard(self.entrance_norm(y), "batch", "length", None)
        if self.encoder is not None:
            mask, rotary = Padding(jnp.concatenate([valid, seen], 1)), self.rotary(config.transformer)
            rotary = None if rotary is None else (rotary[0][at], rotary[1][at])
            y = scan_stack(self.encoder, y, rotary=rotary, mask=mask, key=key, remat=config.compute.remat)
        return self.encoder_norm(y)

    def rotary(self, transformer: Transformer) -> Rotary | None:
        """cos and sin of the whole sequence (s + L, h / 2), if positions are rotary."""
        config = self.config
        if not isinstance(config.positions, RotaryPositions):
            return None
        return config.positions.table(config.grid, transformer.head_size, config.condition_tokens)

    @typed
    def restore(self, y: Float[Array, "b n d"], hidden: Bool[Array, "b t"]) -> Float[Array, "b _ f"]:
        """Scatter the encoder's output among mask tokens: (b, s + size, d) -> (b, s + L, d')."""
        y, s = self.widen(y), self.config.condition_tokens
        places = jnp.cumsum(~hidden, 1) - 1  # rank of each visible position among the visible ones
        places = jnp.clip(places, 0, max(y.shape[1] - s - 1, 0))
        if y.shape[1] == s:  # nothing is visible
            tokens = jnp.zeros((*hidden.shape, y.shape[2]), y.dtype)
        else:
            tokens = jax.vmap(lambda y, p: y[p])(y[:, s:], places)
        tokens = jnp.where(hidden[..., None], self.mask_token[...].astype(y.dtype), tokens)
        return shard(jnp.concatenate([y[:, :s], tokens], 1), "batch", "length", None)

    @typed
    def decode(
        self, y: Float[Array, "b n f"], valid: Bool[Array, "b s"], key: Array | None = None
    ) -> Float[Array, "b n-s f"]:
        """z of every position: (b, s + L, d') -> (b, L, d'); valid: bool (b, s)."""
        config = self.config
        real = jnp.pad(valid, ((0, 0), (0, config.length)), constant_values=True)
        mask = Padding(real) if config.conditioning.what.spec.has_padding else None
        y = y if self.decoder_position is None else y + self.decoder_position[...].astype(y.dtype)
        rotary = self.rotary(config.decoding)
        y = scan_stack(self.decoder, y, rotary=rotary, mask=mask, key=key, remat=config.compute.remat)
        z = self.decoder_norm(y)[:, config.condition_tokens :]
        return z if self.head_position is None else z + self.head_position[...].astype(y.dtype)


def _switch(sizes: list[int], count: Array, branch: Callable[..., T], *arguments: object) -> T:
    """branch(size, *arguments) with the smallest of `sizes` that holds `count`; only that branch runs."""
    index = jnp.searchsorted(jnp.asarray(sizes), count)
    return jax.lax.switch(index, [partial(branch, size) for size in sizes], *arguments)
