"""Masked generation in any order: a bidirectional Transformer predicts the tokens at hidden positions.

One family for MAR (Li et al. 2024, arXiv:2406.11838), Fluid (Fan et al. 2024), MaskGIT (Chang et al. 2022) and Muse
(Chang et al. 2023): an order sets when each position is predicted, a head turns the network's z into p(x_i | z_i).
`Masked.reads` says which network it is. The encoder of `MaskedNetwork` reads condition tokens and known tokens only,
its decoder mask tokens at hidden positions (He et al. 2022, MAE). `MaskedTransformer` is one stack that reads mask
tokens, too (Devlin et al. 2019, BERT), as those of MaskGIT and Muse.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal, TypeVar

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
from t2i_jax.core.types import Capabilities, Compute, LossOutput
from t2i_jax.heads import DiffusionHead, HeadFamily, ImageKeys, SoftmaxHead, TokenHead
from t2i_jax.networks.condition import ClassEmbedder, ClassTokens, Conditioning, dropped_rows
from t2i_jax.nn.attention import Padding, Rotary
from t2i_jax.nn.layers import Embedding, Linear, matmul, normal, param, position_table
from t2i_jax.nn.losses import row_mean, row_weights, weighted_mean
from t2i_jax.nn.positions import LearnedPositions, RotaryPositions
from t2i_jax.nn.tokens import from_tokens, to_tokens
from t2i_jax.nn.transformer import ACTIVATIONS, Transformer, drop, scan_stack, stack
from t2i_jax.sampling.guidance import Branches
from t2i_jax.sampling.options import MaskedSampler, MaskedSchedule
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
from t2i_jax.sampling.progress import Progress, known_so_far, report

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Masked(HeadFamily[MaskedSampler]):
    """A bidirectional Transformer, a head, an order, and their training settings.

    >>> from t2i_jax.heads import FlowHead, SoftmaxHead
    >>> str(Masked(head=SoftmaxHead(512)).sample_spec().code)
    '512 codes'
    >>> str(Masked(head=FlowHead(dim=4)).sample_spec().code)
    'codes of 4 numbers'
    """

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
    """The one stack, with reads "all"; else the encoder, and with a depth of 0 there is none, and only its width and
    norm count."""
    decoder: Transformer | None = None
    """None: like the encoder."""
    reads: Literal["known", "all"] = "known"
    """What `transformer` reads: known tokens, and the decoder all; or all, with mask tokens at hidden positions and no
    decoder."""
    tied: bool = False
    """The output matrix is the table of codes, after one more layer, LN(f(W z + b)) with the activation f of the blocks
    (the inner one if that is gated), as in BERT and MaskGIT. In training it also has the rows of classes and of the
    mask token, which are no codes: they are in the softmax, and get their part of label smoothing. It needs reads "all"
    and a `SoftmaxHead`."""
    positions: LearnedPositions | RotaryPositions = LearnedPositions()
    """Learned vectors at the inputs of encoder, decoder and head, or rotated queries and keys in both."""
    buffer: Size = 64
    """Prefix length for a condition of one token, which is repeated; longer conditions take one position per token."""
    conditioning: Conditioning = Conditioning(ClassEmbedder(1000))
    """The class, a caption or features, as a prefix of the image (via "prefix", the default). With reads "all" every
    layer may cross-attend to it instead ("cross_attention"), as in Muse."""
    size_buckets: Annotated[Size, FREE] = 4
    """Number of sequence lengths compiled for an encoder of known tokens in the sampler, chosen by their number. 1: it
    always reads the full length."""
    average: Literal["tokens", "images"] = "tokens"
    """The loss is the mean over all hidden tokens of a batch, or over its images of the mean of each (MaskGIT)."""
    compute: Compute = Compute()
    sampling: Annotated[MaskedSampler, FREE] = MaskedSampler()
    """Default options of `sample`."""

    def __post_init__(self):
        super().__post_init__()
        if self.order.by_confidence and not self.head.knows_probability:
            raise ValueError(
                f"order {type(self.order).__name__} needs a head with probabilities, as SoftmaxHead; "
                f"a {type(self.head).__name__} gives none"
            )
        if self.reads == "all" and (self.decoder or not self.transformer.depth):
            raise ConfigError('reads "all": one stack reads everything; it needs layers, and there is no decoder')
        if not self.decoding.depth:
            raise ConfigError("transformer.depth 0 is a model without encoder: it needs a `decoder` with layers")
        if self.tied and not (self.reads == "all" and isinstance(self.head, SoftmaxHead)):
            raise ConfigError('tied: the table is the output matrix with reads "all" and a SoftmaxHead only')
        if isinstance(self.positions, LearnedPositions) and self.positions.count:
            raise ConfigError("positions.count: the tables of Masked have a row for each token")

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        return dataclasses.replace(super().capabilities, any_size=isinstance(self.positions, RotaryPositions))

    def sized(self, grid: tuple[int, int]) -> Masked:
        """The same family for other rows and columns of codes, where positions are rotary. Errors: `ConfigError` for
        sides that tokens do not divide."""
        if any(side % self.patch for side in grid):
            raise ConfigError(f"grid {grid[0]}x{grid[1]}: sides are multiples of patch {self.patch}")
        return dataclasses.replace(self, grid=(grid[0] // self.patch, grid[1] // self.patch))

    @property
    def routes(self) -> tuple[str, ...]:
        """How the network may read the condition."""
        return ("prefix", "cross_attention") if self.reads == "all" else ("prefix",)

    @property
    def is_cross_attended(self) -> bool:
        """Whether layers cross-attend to the condition's tokens, which do not precede the image."""
        return self.conditioning.via == "cross_attention"

    @property
    def condition_tokens(self) -> int:
        """Number of condition positions before the image."""
        if self.is_cross_attended:
            return 0
        return self.buffer if self.conditioning.what.length == 1 else self.conditioning.what.length

    @property
    def decoding(self) -> Transformer:
        """The decoder."""
        return self.decoder or self.transformer

    def init(self, key: Array) -> HiddenTokenNetwork:
        """A model with fresh parameters."""
        return MaskedTransformer(self, key) if self.reads == "all" else MaskedNetwork(self, key)

    # -- training

    def loss(self, model: HiddenTokenNetwork, batch: Batch, key: Array, train: bool = True) -> LossOutput:
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
        loss = self.mean_loss(self.head.loss(model.output(), z, x, keys[4], train), hidden, batch)
        return LossOutput(loss, {"loss": loss, "hidden": hidden.mean()})

    @typed
    def mean_loss(self, each: Float[Array, "b t"], hidden: Bool[Array, "b t"], batch: Batch) -> Float[Array, ""]:
        """The mean of the losses `each` of tokens at hidden positions, by `average`."""
        if self.average == "images":
            return row_mean(jnp.sum(each * hidden, 1) / jnp.maximum(hidden.sum(1), 1), batch)
        return weighted_mean(each, hidden * row_weights(batch, len(each))[:, None])

    # -- sampling

    @property
    def sizes(self) -> tuple[list[int], list[int]]:
        """Compiled numbers of visible tokens, and of tokens to predict.

        Shapes are static and counts are not, so each step takes the smallest of these that holds its count.
        """
        n, buckets = self.length, self.size_buckets if self.reads == "known" else 1
        visible = sorted({-(-n * (k + 1) // buckets) for k in range(buckets)})
        set_sizes = (
            [1] if self.order.one_at_a_time else sorted({min(4**k, n) for k in range(1 + math.ceil(math.log(n, 4)))})
        )
        return visible, set_sizes

    def loop_trips(self, options: MaskedSampler) -> list[tuple[int, ...]]:
        """Index of the compiled sizes that each step takes when all tokens are sampled, for those with more than one
        size."""
        left = [self.length, *remaining(self.length, options)]
        left = list(range(self.length, -1, -1)) if self.order.one_at_a_time else [int(n) for n in left]
        steps = [(self.length - now, now if self.order.by_confidence else now - then) for now, then in pairwise(left)]
        find = lambda counts: zip(self.sizes, counts, strict=True)
        return [tuple(bisect_left(s, n) for s, n in find(step) if len(s) > 1) for step in steps]

    def draw(
        self,
        model: HiddenTokenNetwork,
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
        slots, valid = model.read(*both.conditions(condition, b))
        orders = with_known_last(orders, keep)
        total = jnp.sum(~keep, 1)
        most = jnp.max(total)
        steps = most if order.one_at_a_time else options.trips(most)
        start = 0 if order.one_at_a_time else options.start
        step_places = jax.vmap(lambda row, n: row[n])

        visible_sizes, set_sizes = self.sizes

        def masked_sequence(size: int, x: Array, hidden: Array) -> Array:
            x, hidden = both.rows((x, hidden))
            return model.masked_sequence(slots, valid, x, hidden, size)

        def sample_set(
            size: int, x: Array, z: Array, orders: Array, first: Array, last: Array, i: Array
        ) -> tuple[Array, Array]:
            """Codes with positions `first` to `last` of the order resampled, and their scores (b, L)."""
            number = first[:, None] + jnp.arange(size)
            places = step_places(orders, jnp.minimum(number, length - 1))
            here, null = both.split(step_places(z, both.rows(places)))
            scale = options.guidance_at(length - jnp.maximum(after(i, last), 1) - 1, length)
            drawn, score = self.head.sample(model.output(whole=False), here, null, draws.at(i, places), scale, options)
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
            y = _switch(visible_sizes, jnp.max(length - now), masked_sequence, x, hidden)
            z = model.decode(y, slots, valid)
            then = after(i, now)
            first = jnp.zeros_like(then) if order.by_confidence else then
            x, scores = _switch(set_sizes, jnp.max(now - first), sample_set, x, z, orders, first, now, i)
            if order.by_confidence:
                fading = options.choice_temperature * (1 - (i + 1) / options.iterations)
                uniform = draws.at(i, jnp.broadcast_to(jnp.arange(length), (b, length))).uniform(1)
                gumbel = -jnp.log(-jnp.log(jnp.clip(uniform, 1e-7, 1 - 1e-7)))
                orders = by_confidence(orders, now, scores + fading[..., None] * gumbel)
            done = jnp.where(jnp.any(then > 0), i + 1 - start, steps)
            # By confidence all are drawn, and those that stay hidden are drawn again.
            shown = x if order.by_confidence else known_so_far(x, ~hidden_by(orders, then))
            report(progress, done, steps, from_tokens(shown, self.grid, self.patch))
            return x, orders, then, i + 1

        first = (x, orders, total, jnp.asarray(start, jnp.int32))
        x, *_ = jax.lax.while_loop(lambda state: jnp.any(state[2] > 0), step, first)
        return x


class HiddenTokenNetwork(nnx.Module):
    """What both networks have in common: from the codes of known tokens to the inputs of the head."""

    def __init__(self, config: Masked, key: Array):
        self.config = config
        self.condition = config.conditioning.what.init(key, config.transformer.width)

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
        y = self.masked_sequence(slots, valid, to_tokens(batch["codes"], self.config.patch), hidden, size, keys[0])
        return self.decode(y, slots, valid, keys[1])

    @typed
    def read(self, batch: Batch, dropped: Bool[Array, " b"]) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        """The condition tokens (b, s, d), and which of them are valid (b, s); dropped: bool (b,)."""
        tokens, valid = self.condition(batch, dropped, self.config.compute.dtype)
        if self.config.is_cross_attended:
            return tokens, valid
        count = self.config.condition_tokens // tokens.shape[1]  # a single token fills the buffer
        return repeat(tokens, "b s d -> b (s n) d", n=count), repeat(valid, "b s -> b (s n)", n=count)

    def rotary(self, transformer: Transformer) -> Rotary | None:
        """cos and sin of the whole sequence (s + L, h / 2), if positions are rotary."""
        config = self.config
        if not isinstance(config.positions, RotaryPositions):
            return None
        return config.positions.table(config.grid, transformer.head_size, config.condition_tokens)

    def padding(self, valid: Array) -> Padding | None:
        """The mask of the whole sequence (b, s + L), where the condition before the image may be padding."""
        if self.config.is_cross_attended or not self.config.conditioning.what.spec.has_padding:
            return None
        return Padding(jnp.pad(valid, ((0, 0), (0, self.config.length)), constant_values=True))

    @abc.abstractmethod
    def masked_sequence(
        self, slots: Array, valid: Array, x: Array, hidden: Array, size: int, key: Array | None = None
    ) -> Array:
        """The sequence (b, s + L, d') of condition tokens (b, s, d) and all tokens of x (b, L, *code), with mask tokens
        at the hidden positions; size: upper bound on the visible tokens of a row."""

    @abc.abstractmethod
    def decode(self, y: Array, slots: Array, valid: Array, key: Array | None = None) -> Array:
        """z (b, L, d') of every position from what `masked_sequence` gives."""

    @abc.abstractmethod
    def output(self, whole: bool = True) -> nnx.Module:
        """The module of the head; whole: with the columns of its softmax that are no codes."""


class MaskedNetwork(HiddenTokenNetwork):
    """The encoder of known tokens and the decoder of all, from codes to the inputs of the head."""

    def __init__(self, config: Masked, key: Array):
        keys = jax.random.split(key, 10)
        super().__init__(config, keys[0])
        encoder, decoder, kernel = config.transformer, config.decoding, config.compute.attention
        d, f, prefix = encoder.width, decoder.width, config.condition_tokens
        learned = isinstance(config.positions, LearnedPositions)
        table = lambda key, prefix, width: (
            position_table(normal(key, (prefix + config.length, width)), config.grid, prefix=prefix)
            if learned
            else None
        )
        self.entrance = config.head.entrance(keys[1], d)
        self.encoder_position = table(keys[2], prefix, d)
        self.entrance_norm = encoder.normalise()
        self.encoder = stack(encoder, keys[3], kernel) if encoder.depth else None
        self.encoder_norm = encoder.normalise()
        self.widen = Linear(d, f, keys[4], std=None, axes=("embed", "mlp"))
        self.mask_token = param(normal(keys[5], (f,)), "embed")
        self.decoder_position = table(keys[6], prefix, f)
        self.decoder = stack(decoder, keys[7], kernel)
        self.decoder_norm = decoder.normalise()
        self.head_position = table(keys[8], 0, f)
        self.head = config.head.init(keys[9], f)

    def output(self, whole: bool = True) -> nnx.Module:
        """The module of the head."""
        return self.head

    @typed
    def masked_sequence(
        self,
        slots: Float[Array, "b s d"],
        valid: Bool[Array, "b s"],
        x: Shaped[Array, "b t *k"],
        hidden: Bool[Array, "b t"],
        size: int,
        key: Array | None = None,
    ) -> Float[Array, "b _ f"]:
        """`encode`, and its output among mask tokens."""
        return self.restore(self.encode(slots, valid, x, hidden, size, key), hidden)

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
        self,
        y: Float[Array, "b n f"],
        slots: Float[Array, "b s d"],
        valid: Bool[Array, "b s"],
        key: Array | None = None,
    ) -> Float[Array, "b n-s f"]:
        """z of every position: (b, s + L, d') -> (b, L, d'); valid: bool (b, s)."""
        config = self.config
        y = y if self.decoder_position is None else y + self.decoder_position[...].astype(y.dtype)
        mask, rotary = self.padding(valid), self.rotary(config.decoding)
        y = scan_stack(self.decoder, y, rotary=rotary, mask=mask, key=key, remat=config.compute.remat)
        z = self.decoder_norm(y)[:, config.condition_tokens :]
        return z if self.head_position is None else z + self.head_position[...].astype(y.dtype)


class MaskedTransformer(HiddenTokenNetwork):
    """One stack that reads the condition and all tokens of the image, with mask tokens at hidden positions."""

    def __init__(self, config: Masked, key: Array):
        keys = jax.random.split(key, 7)
        super().__init__(config, keys[0])
        shape, prefix = config.transformer, config.condition_tokens
        d, cross, learned = shape.width, config.is_cross_attended, isinstance(config.positions, LearnedPositions)
        self.entrance = config.head.entrance(keys[1], d)
        self.mask_token = param(normal(keys[2], (d,)), "embed")
        table = normal(keys[3], (prefix + config.length, d)) if learned else None
        self.position = None if table is None else position_table(table, config.grid, prefix=prefix)
        self.entrance_norm = shape.normalise()
        self.blocks = stack(shape, keys[4], config.compute.attention, d if cross else 0)
        self.norm = None if shape.post_norm else shape.normalise()
        self.transform = Linear(d, d, keys[5], axes=("embed", None)) if config.tied else None
        self.transform_norm = shape.normalise() if config.tied else None
        self.output_bias = param(jnp.zeros(sum(map(len, self.tables()))), None) if config.tied else None
        self.head = None if config.tied else config.head.init(keys[6], d)

    def tables(self, whole: bool = True) -> list[Array]:
        """The rows (n, d) of a tied output matrix: codes, and with `whole` classes and the mask token."""
        assert isinstance(self.entrance, Embedding), "a SoftmaxHead embeds codes by a table"
        classes = [self.condition.table.w[...]] if isinstance(self.condition, ClassTokens) else []
        return [self.entrance.w[...], *(*classes, self.mask_token[...][None]) * whole]

    def output(self, whole: bool = True) -> nnx.Module:
        """The module of the head; whole: with the columns of its softmax that are no codes."""
        if self.head is not None:
            return self.head
        assert self.output_bias is not None
        return TiedOutput(self.tables(whole), self.output_bias[...])

    @typed
    def masked_sequence(
        self,
        slots: Float[Array, "b s d"],
        valid: Bool[Array, "b s"],
        x: Shaped[Array, "b t *k"],
        hidden: Bool[Array, "b t"],
        size: int,
        key: Array | None = None,
    ) -> Float[Array, "b _ d"]:
        """The inputs of the stack; it reads every position, whatever `size` is."""
        dtype = self.config.compute.dtype
        y = self.entrance(x if self.config.head.code.is_discrete else x.astype(dtype)).astype(dtype)
        y = jnp.where(hidden[..., None], self.mask_token[...].astype(dtype), y)
        y = y if self.config.is_cross_attended else jnp.concatenate([slots, y], 1)
        y = y if self.position is None else y + self.position[...].astype(dtype)
        return shard(drop(self.entrance_norm(y), self.config.transformer.dropout, key), "batch", "length", None)

    @typed
    def states(
        self,
        y: Float[Array, "b n d"],
        slots: Float[Array, "b s d"],
        valid: Bool[Array, "b s"],
        key: Array | None = None,
    ) -> Float[Array, "b n d"]:
        """The output of the stack at every position, those of the condition included."""
        cross, shape = self.config.is_cross_attended, self.config.transformer
        return scan_stack(
            self.blocks,
            y,
            rotary=self.rotary(shape),
            mask=self.padding(valid),
            context=slots if cross else None,
            context_mask=valid[:, None, None] if cross else None,
            key=key,
            remat=self.config.compute.remat,
        )

    @typed
    def decode(
        self,
        y: Float[Array, "b n d"],
        slots: Float[Array, "b s d"],
        valid: Bool[Array, "b s"],
        key: Array | None = None,
    ) -> Float[Array, "b _ d"]:
        """z (b, L, d) of every position of the image."""
        return self.finish(self.states(y, slots, valid, key)[:, self.config.condition_tokens :])

    @typed
    def finish(self, y: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """The inputs of the head from the output of the stack."""
        y = y if self.norm is None else self.norm(y)
        if self.transform is None or self.transform_norm is None:
            return y
        activation = ACTIVATIONS[self.config.transformer.activation]
        return shard(self.transform_norm(activation(self.transform(y))), "batch", "length", None)


class TiedOutput(nnx.Module):
    """Logits z [E_1; E_2; ...]^T + b of tables E (n, d), fp32."""

    def __init__(self, tables: Sequence[Array], bias: Array):
        self.tables = nnx.List([nnx.Variable(table) for table in tables])
        self.bias = nnx.Variable(bias[: sum(map(len, tables))])

    def __call__(self, z: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        parts = [matmul(z, table.replace(table[...].T), jnp.float32) for table in self.tables]
        return jnp.concatenate(parts, -1) + self.bias[...]


def _switch(sizes: list[int], count: Array, branch: Callable[..., T], *arguments: object) -> T:
    """branch(size, *arguments) with the smallest of `sizes` that holds `count`; only that branch runs."""
    index = jnp.searchsorted(jnp.asarray(sizes), count)
    return jax.lax.switch(index, [partial(branch, size) for size in sizes], *arguments)
