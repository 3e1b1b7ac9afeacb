"""Next-token prediction of image tokens: p(x | c) = prod_i p(x_i | x_<i, c).

Parti (Yu et al. 2022) and LlamaGen (Sun et al. 2024): one causal Transformer over the tokens of a condition, then the
codes of an image in raster order. The sequence is [condition (s tokens)][x_0 .. x_{L-1}]; the logits of x_i are the
output at x_{i-1}, those of x_0 the output at the last condition token.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from t2i_jax.core.arrays import Bool, Float, Int, typed
from t2i_jax.core.conditions import Batch
from t2i_jax.core.fields import FREE, Count, Grid, NotNegative, Range, Rate, Share, Size
from t2i_jax.core.sharding import shard
from t2i_jax.core.specs import BatchSpec
from t2i_jax.core.types import CachedNetwork, Capabilities, Compute, LossOutput
from t2i_jax.networks.condition import ClassEmbedder, Conditioning, check_vectors, dropped_rows
from t2i_jax.nn.attention import Causal, Rotary
from t2i_jax.nn.decode import DecodeLinear, prepare_layers_for_decode
from t2i_jax.nn.layers import Embedding, matmul, normal, param, position_table, transposed
from t2i_jax.nn.losses import chunked_cross_entropy, row_mean
from t2i_jax.nn.positions import LearnedPositions, RotaryPositions
from t2i_jax.nn.transformer import Block, Cache, Transformer, apply_layers, drop, scale_residuals, scan_stack, stack
from t2i_jax.sampling.autoregressive import Autoregressive
from t2i_jax.sampling.options import ARSampler


@dataclasses.dataclass(frozen=True)
class AR(Autoregressive):
    """A causal Transformer over the codes of an image, and its training settings.

    >>> model = AR(vocabulary=512, grid=(8, 8))
    >>> model.sample_spec().grid, str(model.sample_spec().code), sorted(model.condition_spec())
    ((8, 8), '512 codes', ['label'])
    """

    vocabulary: Size = 1024
    """Number of codes of the codec."""
    grid: Grid = (8, 8)
    """Rows and columns of codes."""
    transformer: Transformer = Transformer(256, 6, 4, dropout=0.1)
    conditioning: Conditioning = Conditioning(ClassEmbedder(1000))
    """The class, a caption, features, ids of its own vocabulary (`PrefixTokens`), or vectors used unchanged
    (`CrossAttnFeatures`). Its tokens precede the image (via "prefix", the default), and have this model's width; or
    every layer cross-attends to them, of any width, and the image gets a start token ("cross_attention"): an
    encoder-decoder as in dalle-mini and Parti (Yu et al. 2022, 2.1), or embeddings of neighbours as in RARM (Blattmann
    et al. 2022)."""
    positions: RotaryPositions | LearnedPositions = RotaryPositions()
    tied: bool = False
    """Use the token table also as the output matrix."""
    zero_output: bool = False
    """Initialise the output matrix to zeros, so that all codes start equally likely."""
    output_bias: bool = False
    bidirectional_prefix: Count = 0
    """Number of leading positions that attend to each other in both directions (`n_unmasked` of Esser et al. 2021)."""
    token_dropout: Rate = 0.1
    """Dropout on the embedded sequence, in training."""
    corruption: Share = 0.0
    """Maximum share of corrupted input codes. Each training image has a share between 0 and this replaced by random
    codes, so that its first codes do not suffice and the model must read the condition (after `pkeep` of Esser et al.
    2021)."""
    label_smoothing: Annotated[float, Range(low=0, below=1)] = 0.0
    z_loss: NotNegative = 0.0
    """Weight of (log Z)^2."""
    compute: Compute = Compute()
    sampling: Annotated[ARSampler, FREE] = ARSampler()
    """Default options of `sample`."""

    def __post_init__(self):
        super().__post_init__()
        condition = self.conditioning.what
        if self.is_cross_attended:
            check_vectors(condition)
        elif not condition.spec.gives_ids:
            check_vectors(condition, self.transformer.width)
        if self.conditioning.dropout and not condition.spec.has_null:
            raise ValueError("conditioning.dropout > 0 needs unconditional vectors: trained_null or kept_null")
        places = self.prefix_length + self.length - 1
        if isinstance(self.positions, LearnedPositions) and 0 < self.positions.count < places:
            raise ValueError(
                f"positions.count={self.positions.count} places for {self.prefix_length} tokens before the image and "
                f"{self.length} codes of grid={self.grid}: {places} are needed"
            )

    @property
    def is_cross_attended(self) -> bool:
        """Whether layers cross-attend to the condition's tokens, which do not precede the image."""
        return self.conditioning.route("AR", "prefix", "cross_attention") == "cross_attention"

    @property
    def prefix_length(self) -> int:
        """Tokens before the image."""
        return 1 if self.is_cross_attended else self.conditioning.what.length

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        rotary = isinstance(self.positions, RotaryPositions)
        return dataclasses.replace(super().capabilities, unconditional=self.conditioning.dropout > 0, any_size=rotary)

    def sized(self, grid: tuple[int, int]) -> AR:
        """The same family for another grid of codes, where positions are rotary."""
        return dataclasses.replace(self, grid=grid)

    def condition_spec(self) -> BatchSpec:
        """Batch fields that `sample` reads; given tokens are codes."""
        spec, last = self.conditioning.what.batch_spec(), self.vocabulary - 1
        if not self.conditioning.what.spec.gives_ids:
            return spec
        return {name: dataclasses.replace(field, high=last) for name, field in spec.items()}

    def init(self, key: Array) -> ARNetwork:
        """A model with fresh parameters."""
        return ARNetwork(self, key)

    # -- training

    def loss(self, model: ARNetwork, batch: Batch, key: Array, train: bool = True) -> LossOutput:
        """Mean cross-entropy of the codes, -1/L sum_i log p(x_i | x_<i, c), and metrics.

        batch: `codes` int (b, h, w), the condition's fields, and optionally `weight` (b,), 0 for examples to ignore.
        train: False turns off dropout, dropped conditions, corruption, smoothing and the z-loss; static.
        """
        keys = jax.random.split(key, 3)
        dropped = dropped_rows(keys[0], self.conditioning.dropout, len(batch["codes"]), train)
        read = {**batch, "codes": self._corrupted(batch["codes"], keys[2])} if train else batch
        z = model(read, dropped, keys[1] if train else None)
        regular = {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss} if train else {}
        loss, nll, correct = (row_mean(x.mean(-1), batch) for x in self._score(model, z, batch["codes"], **regular))
        return LossOutput(loss, {"loss": loss, "bits_per_token": nll / math.log(2), "accuracy": correct})

    @typed
    def log_likelihood(self, model: ARNetwork, batch: Batch) -> Float[Array, " b"]:
        """log p(codes | condition) of each image in nats: (b,) fp32."""
        return -self._score(model, model(batch), batch["codes"])[1].sum(-1)

    def _score(self, model: ARNetwork, z: Array, codes: Array, **options: float) -> tuple[Array, ...]:
        codes = rearrange(codes, "b h w -> b (h w)")
        return chunked_cross_entropy(model.logits, z, codes, self.compute.loss_chunk, **options)

    def _corrupted(self, codes: Array, key: Array) -> Array:
        """Codes (b, h, w) with a share replaced at random, see `corruption`."""
        if self.corruption == 0:
            return codes
        share, where, what = jax.random.split(key, 3)
        rate = self.corruption * jax.random.uniform(share, (len(codes), 1, 1))
        replaced = jax.random.uniform(where, codes.shape) < rate
        return jnp.where(replaced, jax.random.randint(what, codes.shape, 0, self.vocabulary), codes)


class Prefix(NamedTuple):
    """What the network reads before the image."""

    tokens: Array
    """(b, s, d)"""
    valid: Array
    """(b, s): False for padding"""
    context: Array | None = None
    """vectors for cross-attention (b, s', d)"""
    context_mask: Array | None = None
    """(b, 1, 1, s')"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ARDecodeState:
    """State of token-by-token decoding."""

    caches: tuple[Cache, ...]
    blocks: tuple[Block, ...]
    """One by one, in the layout that decodes fastest."""
    output: DecodeLinear
    valid: Array
    """Which tokens before the image are real (b, s)."""
    context_mask: Array | None
    """Mask of cross-attention (b, 1, 1, s')."""
    rotary: Rotary | None
    """cos and sin of the image's tokens, (L, h / 2) each."""

    def grow(self, count: int) -> ARDecodeState:
        """The state with caches for `count` tokens of the image."""
        return dataclasses.replace(self, caches=tuple(c.grow(self.valid.shape[1] + count) for c in self.caches))


class ARNetwork(CachedNetwork[ARDecodeState]):
    """The causal Transformer of an `AR`, from the tokens of its condition to the logits of codes."""

    def __init__(self, config: AR, key: Array):
        keys, shape = jax.random.split(key, 4), config.transformer
        d, cross = shape.width, config.is_cross_attended
        self.config = config
        self.condition = config.conditioning.what.init(keys[0], d)
        self.tokens = Embedding(config.vocabulary, d, keys[1])
        self.start = param(normal(jax.random.fold_in(key, 4), (d,)), "embed") if cross else None
        learned = config.positions if isinstance(config.positions, LearnedPositions) else None
        rows = (learned and learned.count) or config.prefix_length + config.length - 1
        prefix = config.prefix_length
        self.positions = None if learned is None else position_table(jnp.zeros((rows, d)), config.grid, prefix=prefix)
        context = config.conditioning.what.token_width(d) if cross else 0
        self.blocks = stack(shape, keys[2], config.compute.attention, context)
        scale_residuals(self.blocks)
        self.norm = shape.normalise()
        output = normal(keys[3], (d, config.vocabulary), 0.0 if config.zero_output else 0.02)
        self.output = None if config.tied else param(output, "embed", "vocab")
        self.output_bias = param(jnp.zeros(config.vocabulary), "vocab") if config.output_bias else None

    @typed
    def __call__(
        self, batch: Batch, dropped: Bool[Array, " b"] | None = None, key: Array | None = None
    ) -> Float[Array, "b t d"]:
        """z (b, L, d) of each code given the preceding ones; `logits` turns it into the code's distribution.

        batch: `codes` int (b, h, w), and the condition's fields. dropped: bool (b,), rows without their condition.
        key: for dropout.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        codes = rearrange(batch["codes"], "b h w -> b (h w)")
        prefix = self.read(batch, jnp.zeros(len(codes), bool) if dropped is None else dropped)
        x = jnp.concatenate([prefix.tokens, self.embed(codes[:, :-1])], 1)  # the last code predicts nothing
        s, t = prefix.tokens.shape[1], x.shape[1]
        x = drop(self.add_positions(x, 0), self.config.token_dropout, keys[0])
        x = scan_stack(
            self.blocks,
            shard(x, "batch", "length", None),
            rotary=self.rotary(s, 0, t),
            mask=self.causal(_pad(prefix.valid, t), s),
            context=prefix.context,
            context_mask=prefix.context_mask,
            key=keys[1],
            remat=self.config.compute.remat,
        )
        return x[:, s - 1 :]

    @typed
    def logits(self, z: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """(..., d) -> (..., v) fp32."""
        w = transposed(self.tokens.w) if self.output is None else self.output
        logits = matmul(self.norm(z), w, jnp.float32)
        return logits if self.output_bias is None else logits + self.output_bias[...]

    def read(self, batch: Batch, dropped: Array) -> Prefix:
        """The tokens before the image, or a start token and what layers cross-attend to; dropped: bool (b,)."""
        dtype = self.config.compute.dtype
        tokens, valid = self.condition(batch, dropped, dtype)
        if self.config.conditioning.what.spec.gives_ids:  # embedded like the image's own codes
            return Prefix(self.embed(tokens), valid)
        if self.start is None:
            return Prefix(tokens, valid)
        start = jnp.broadcast_to(self.start[...].astype(dtype), (len(tokens), 1, self.config.transformer.width))
        return Prefix(start, jnp.ones((len(tokens), 1), bool), tokens, valid[:, None, None])

    @typed
    def embed(self, codes: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Codes (b, t) -> (b, t, d)."""
        return shard(self.tokens(codes).astype(self.config.compute.dtype), "batch", "length", None)

    @typed
    def add_positions(self, x: Float[Array, "b t d"], start: Array | int) -> Float[Array, "b t d"]:
        """x (b, t, d) plus the learned position vectors from `start` on, if positions are learned."""
        if self.positions is None:
            return x
        rows = jax.lax.dynamic_slice_in_dim(self.positions[...], start, x.shape[1])
        return x + shard(rows, None, "embed").astype(x.dtype)

    def rotary(self, s: int, start: int, stop: int) -> Rotary | None:
        """cos and sin of positions `start` to `stop`: s condition tokens without a grid position, then the grid."""
        config = self.config
        if not isinstance(config.positions, RotaryPositions):
            return None
        table = config.positions.table(config.grid, config.transformer.head_size, s)
        return table[0][start:stop], table[1][start:stop]

    @typed
    def causal(self, valid: Bool[Array, "b t"], s: int) -> Causal:
        """Each position sees itself and the valid (b, t) ones before it; the first s precede the image."""
        padded = not self.config.is_cross_attended and self.config.conditioning.what.spec.has_padding
        return Causal(valid if padded else None, s, self.config.bidirectional_prefix)

    @typed
    def prefill(self, condition: Batch, dropped: Bool[Array, " b"]) -> tuple[Float[Array, "b v"], ARDecodeState]:
        """Process the condition: the logits (b, v) of code 0, and the initial state for `decode`."""
        z, state = self.prefix(condition, dropped)
        return self.logits(z[:, -1]), state

    @typed
    def prefix(self, condition: Batch, dropped: Bool[Array, " b"]) -> tuple[Float[Array, "b s d"], ARDecodeState]:
        """z (b, s, d) of the tokens before the image, the last that of code 0, and the initial state for `decode`."""
        config, prefix = self.config, self.read(condition, dropped)
        b, s = prefix.valid.shape
        if config.bidirectional_prefix > s:
            raise ValueError(f"bidirectional_prefix {config.bidirectional_prefix}: the condition has {s} tokens only")
        first, following = prepare_layers_for_decode(self.blocks, config.compute.dtype)
        z, caches = apply_layers(
            first,
            self.add_positions(prefix.tokens, 0),
            rotary=self.rotary(s, 0, s),
            mask=self.causal(prefix.valid, s).dense(s),
            caches=tuple(Cache.empty(config.transformer, b, s, config.compute.dtype) for _ in first),
            context=prefix.context,
            context_mask=prefix.context_mask,
        )
        w = transposed(self.tokens.w) if self.output is None else self.output
        output = DecodeLinear(w, self.output_bias, config.compute.dtype, jnp.float32)
        rotary = self.rotary(s, s, s + config.length)
        return z, ARDecodeState(caches, following, output, prefix.valid, prefix.context_mask, rotary)

    @typed
    def decode(
        self, state: ARDecodeState, codes: Int[Array, " b"], i: Array | int
    ) -> tuple[Float[Array, "b v"], ARDecodeState]:
        """Feed code i, int (b,): the logits (b, v) of code i + 1. The caches must have room for it."""
        s, capacity = state.valid.shape[1], state.caches[0].k.shape[2]
        seen = _pad(state.valid, capacity) & (jnp.arange(capacity) <= s + i)
        row = lambda table: jax.lax.dynamic_slice_in_dim(table, i, 1)
        x, caches = apply_layers(
            state.blocks,
            self.add_positions(self.embed(codes[:, None]), s + i),
            rotary=None if state.rotary is None else (row(state.rotary[0]), row(state.rotary[1])),
            mask=seen[:, None, None],
            context_mask=state.context_mask,
            caches=state.caches,
        )
        return state.output(self.norm(x[:, 0])), dataclasses.replace(state, caches=caches)


def _pad(valid: Array, length: int) -> Array:
    """valid (b, s) extended with True to (b, length): condition tokens may be padding, image tokens never are."""
    return jnp.pad(valid, ((0, 0), (0, length - valid.shape[1])), constant_values=True)
