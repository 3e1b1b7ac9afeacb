"""Next-token prediction of image tokens: p(x | c) = prod_i p(x_i | x_<i, c).

Parti (Yu et al. 2022) and LlamaGen (Sun et al. 2024): one causal Transformer over the tokens of a condition, then the
codes of an image in raster order. The sequence is [condition (s tokens)][x_0 .. x_{L-1}]; the logits of x_i are the
output at x_{i-1}, those of x_0 the output at the last condition token.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.conditions import Batch
from t2i_jax.core.family import BaseFamily
from t2i_jax.core.fields import FREE, Count, Grid, NotNegative, Range, Rate, Share, Size
from t2i_jax.core.sharding import shard
from t2i_jax.core.specs import BatchSpec, CodeSpec, SampleSpec
from t2i_jax.core.types import Capabilities, Compute, LossOutput
from t2i_jax.networks.condition import ClassEmbedder, Conditioning, check_vectors, dropped_rows
from t2i_jax.nn.attention import Causal, Rotary
from t2i_jax.nn.decode import DecodeLinear, prepare_layers_for_decode
from t2i_jax.nn.layers import Embedding, LayerNorm, RMSNorm, matmul, normal, param, transposed
from t2i_jax.nn.losses import chunked_cross_entropy
from t2i_jax.nn.positions import LearnedPositions, RotaryPositions
from t2i_jax.nn.transformer import REMATS, Block, Cache, Transformer, apply_stack, drop, stack
from t2i_jax.sampling import autoregressive
from t2i_jax.sampling.guidance import is_guided
from t2i_jax.sampling.options import ARSampler
from t2i_jax.sampling.progress import Progress


@dataclasses.dataclass(frozen=True)
class AR(BaseFamily):
    """A causal Transformer over the codes of an image, and its training settings."""

    vocabulary: Size = 1024
    """Number of codes of the codec."""
    grid: Grid = (8, 8)
    """Rows and columns of codes."""
    transformer: Transformer = Transformer(256, 6, 4, dropout=0.1)
    conditioning: Conditioning = Conditioning(ClassEmbedder(1000))
    """The class, a caption, features, ids of its own vocabulary (`PrefixTokens`), or vectors of this model's width
    used unchanged (`CrossAttnFeatures`). Its tokens precede the image (via "prefix", the default), or every layer
    cross-attends to them and the image gets a start token ("cross_attention"): an encoder-decoder as in dalle-mini
    and Parti (Yu et al. 2022, 2.1)."""
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
        if self.is_cross_attended or not condition.spec.gives_ids:
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
    def length(self) -> int:
        """Tokens of an image."""
        return math.prod(self.grid)

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
        return Capabilities(
            family=True,
            unconditional=self.conditioning.dropout > 0,
            guidance=True,
            token_by_token=True,
            likelihood=True,
            inpaint=True,
            inpaint_prefix=True,
            int8=True,
            remat=REMATS,
            attention=True,
            loss_chunk=True,
        )

    def sample_spec(self) -> SampleSpec:
        """Shape and dtype of a sample."""
        return SampleSpec(self.grid, CodeSpec("int32", sizes=(self.vocabulary,)))

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
        keys = jax.random.split(key)
        b = batch["codes"].shape[0]
        dropped = dropped_rows(keys[0], self.conditioning.dropout, b, train)
        z = self._features(model, batch, dropped, keys[1] if train else None)
        regular = {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss} if train else {}
        loss, nll, correct = self._score(model, z, batch, **regular)
        weight = batch.get("weight", jnp.ones(b)).astype(jnp.float32)
        mean = lambda x: jnp.sum(x.mean(-1) * weight) / jnp.maximum(weight.sum(), 1)
        loss = mean(loss)
        return LossOutput(loss, {"loss": loss, "bits_per_token": mean(nll) / math.log(2), "accuracy": mean(correct)})

    def log_likelihood(self, model: ARNetwork, batch: Batch) -> Array:
        """log p(codes | condition) of each image in nats: (b,) fp32."""
        z = self._features(model, batch, jnp.zeros(batch["codes"].shape[0], bool))
        return -self._score(model, z, batch)[1].sum(-1)

    def forward(self, model: ARNetwork, batch: Batch, dropped: Array | None = None) -> Array:
        """Logits (b, L, v) fp32 of every code given the preceding ones; `dropped` bool (b,) marks unconditional
        rows."""
        dropped = jnp.zeros(batch["codes"].shape[0], bool) if dropped is None else dropped
        return model.logits(self._features(model, batch, dropped))

    def _features(self, model: ARNetwork, batch: Batch, dropped: Array, key: Array | None = None) -> Array:
        """Outputs of the Transformer at the positions of the logits: (b, L, d)."""
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        prefix, valid, context = self._prefix(model, batch, dropped)
        codes = self._corrupted(rearrange(batch["codes"], "b h w -> b (h w)"), keys[2])
        x = jnp.concatenate([prefix, self._embed(model.tokens, codes[:, :-1])], 1)  # the last code predicts nothing
        s, t = prefix.shape[1], x.shape[1]
        x = drop(self._add_positions(model.positions, x, 0), self.token_dropout, keys[0])
        x, _ = apply_stack(
            model.blocks,
            shard(x, "batch", "length", None),
            rotary=self._rotary(s, 0, t),
            mask=self._causal(_pad(valid, t), s),
            **context,
            key=keys[1],
            remat=self.compute.remat,
        )
        return x[:, s - 1 :]

    def _corrupted(self, codes: Array, key: Array | None) -> Array:
        """Codes (b, L) with a share replaced at random, see `corruption`; unchanged without a key."""
        if key is None or self.corruption == 0:
            return codes
        share, where, what = jax.random.split(key, 3)
        rate = self.corruption * jax.random.uniform(share, (codes.shape[0], 1))
        replaced = jax.random.uniform(where, codes.shape) < rate
        return jnp.where(replaced, jax.random.randint(what, codes.shape, 0, self.vocabulary), codes)

    def _score(self, model: ARNetwork, z: Array, batch: Batch, **options: float) -> tuple[Array, ...]:
        codes = rearrange(batch["codes"], "b h w -> b (h w)")
        return chunked_cross_entropy(model.logits, z, codes, self.compute.loss_chunk, **options)

    def _embed(self, tokens: Embedding, codes: Array) -> Array:
        return shard(tokens(codes).astype(self.compute.dtype), "batch", "length", None)

    def _prefix(self, model: ARNetwork, batch: Batch, dropped: Array) -> tuple[Array, Array, dict[str, Any]]:
        """The tokens before the image (b, s, d), which of them are real (b, s), and the cross-attention inputs."""
        tokens, valid = model.condition(batch, dropped, self.compute.dtype)
        if self.conditioning.what.spec.gives_ids:  # embedded like the image's own codes
            return self._embed(model.tokens, tokens), valid, {}
        if model.start is None:
            return tokens, valid, {}
        start = jnp.broadcast_to(model.start[...].astype(self.compute.dtype), (len(tokens), 1, self.transformer.width))
        return start, jnp.ones((len(tokens), 1), bool), {"context": tokens, "context_mask": valid[:, None, None]}

    def _add_positions(self, positions: nnx.Param | None, x: Array, start: Array | int) -> Array:
        """x (b, t, d) plus the learned position vectors from `start` on, if positions are learned."""
        if positions is None:
            return x
        rows = jax.lax.dynamic_slice_in_dim(positions[...], start, x.shape[1])
        return x + shard(rows, None, "embed").astype(x.dtype)

    def _rotary(self, s: int, start: int, stop: int) -> Rotary | None:
        """cos and sin of positions `start` to `stop`: s condition tokens without a grid position, then the grid."""
        if not isinstance(self.positions, RotaryPositions):
            return None
        table = self.positions.table(self.grid, self.transformer.head_size, s)
        return table[0][start:stop], table[1][start:stop]

    def visible(self, valid: Array) -> Array:
        """The mask (b or 1, 1, t, t): each position sees itself and the valid (b, t) positions before it."""
        return self._causal(valid, valid.shape[1]).dense(valid.shape[1])

    def _causal(self, valid: Array, s: int) -> Causal:
        """The structured causal mask, with s condition tokens first."""
        padded = not self.is_cross_attended and self.conditioning.what.spec.has_padding
        return Causal(valid if padded else None, s, self.bidirectional_prefix)

    # -- sampling

    def sample(
        self,
        model: ARNetwork,
        condition: Batch,
        keys: Array,
        options: ARSampler | None = None,
        *,
        known: Array | None = None,
        keep: Array | None = None,
        guided: bool | None = None,
        segments: int = 0,
        progress: Progress | None = None,
    ) -> Array:
        """Codes int32 (b, h, w), one image per row of the condition and per key of `keys` (b,).

        An image depends only on its own key and condition, not on its batch. Guidance runs both branches as one batch
        of 2b. All options are traced: new values do not recompile.

        known, keep: codes (b, h, w), and a bool (b, h, w) of those to copy, to complete an image; they are the first
            ones in raster order.
        guided: False skips the unconditional branch, whatever the options say, which halves the cost. None skips it if
            `conditioning.dropout` is 0, since no unconditional branch was trained.
        segments: number of steps in which the cache grows; attention reads no more than the current size; static. Each
            segment compiles all layers again, so 0 means 4 for shallow models and fewer for deep ones.
        progress: its listener is called with (tokens so far, all tokens, codes (b, h, w)).
        """
        guided = is_guided(self.capabilities, guided)
        segments = segments or autoregressive.segments_of(self.transformer.depth)
        return autoregressive.sample(self, model, condition, keys, options, known, keep, guided, segments, progress)

    def prefix_logits(self, model: ARNetwork, condition: Batch, dropped: Array) -> Array:
        """Logits (b, s, v) at every condition token; the last are those of token 0."""
        return model.logits(self._embed_prefix(model, condition, dropped)[0])

    def prefill(self, model: ARNetwork, condition: Batch, dropped: Array) -> tuple[Array, ARDecodeState]:
        """Process the condition: the logits (b, v) of token 0, and the initial state for `decode`."""
        x, caches, blocks, valid, context_mask = self._embed_prefix(model, condition, dropped)
        s = valid.shape[1]
        output = transposed(model.tokens.w) if model.output is None else model.output
        state = ARDecodeState(
            caches=caches,
            tokens=model.tokens,
            blocks=blocks,
            norm=model.norm,
            output=DecodeLinear(output, model.output_bias, self.compute.dtype, jnp.float32),
            valid=valid,
            context_mask=context_mask,
            rotary=self._rotary(s, s, s + self.length),
            positions=model.positions,
        )
        return model.logits(x[:, -1]), state

    def _embed_prefix(
        self, model: ARNetwork, condition: Batch, dropped: Array
    ) -> tuple[Array, tuple[Cache, ...], tuple[Block, ...], Array, Array | None]:
        """Run the tokens before the image through the Transformer: outputs (b, s, d), caches, the layers for decoding,
        real tokens (b, s), and the context mask, if there is a context."""
        prefix, valid, context = self._prefix(model, condition, dropped)
        b, s = valid.shape
        if self.bidirectional_prefix > s:
            raise ValueError(f"bidirectional_prefix {self.bidirectional_prefix}: the condition has {s} tokens only")
        first, following = prepare_layers_for_decode(model.blocks, self.compute.dtype)
        caches = tuple(Cache.empty(self.transformer, b, s, self.compute.dtype) for _ in first)
        x, rotary = self._add_positions(model.positions, prefix, 0), self._rotary(s, 0, s)
        x, caches = apply_stack(first, x, rotary=rotary, mask=self.visible(valid), caches=caches, **context)
        return x, caches, following, valid, context.get("context_mask")

    def decode(self, state: ARDecodeState, codes: Array, i: Array | int) -> tuple[Array, ARDecodeState]:
        """Feed token i, int (b,), and return the logits (b, v) of token i + 1. The caches must have room for it."""
        s, capacity = state.valid.shape[1], state.caches[0].k.shape[2]
        seen = _pad(state.valid, capacity) & (jnp.arange(capacity) <= s + i)
        row = lambda table: jax.lax.dynamic_slice_in_dim(table, i, 1)
        x, caches = apply_stack(
            state.blocks,
            self._add_positions(state.positions, self._embed(state.tokens, codes[:, None]), s + i),
            rotary=None if state.rotary is None else (row(state.rotary[0]), row(state.rotary[1])),
            mask=seen[:, None, None],
            context_mask=state.context_mask,
            caches=state.caches,
        )
        return state.output(state.norm(x[:, 0])), dataclasses.replace(state, caches=caches)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ARDecodeState:
    """State of token-by-token decoding."""

    caches: tuple[Cache, ...]
    tokens: Embedding
    blocks: tuple[Block, ...]
    """One by one, in the layout that decodes fastest."""
    norm: RMSNorm | LayerNorm
    output: DecodeLinear
    valid: Array
    """Which tokens before the image are real (b, s)."""
    context_mask: Array | None
    """Mask of cross-attention (b, 1, 1, s')."""
    rotary: Rotary | None
    """cos and sin of the image's tokens, (L, h / 2) each."""
    positions: nnx.Param | None
    """Learned positions of the whole sequence, if any."""

    def grow(self, count: int) -> ARDecodeState:
        """The state with caches for `count` tokens of the image."""
        return dataclasses.replace(self, caches=tuple(c.grow(self.valid.shape[1] + count) for c in self.caches))


class ARNetwork(nnx.Module):
    """The parameters of an `AR`."""

    def __init__(self, config: AR, key: Array):
        keys, shape = jax.random.split(key, 4), config.transformer
        d, cross = shape.width, config.is_cross_attended
        self.condition = config.conditioning.what.init(keys[0], d)
        self.tokens = Embedding(config.vocabulary, d, keys[1])
        self.start = param(normal(jax.random.fold_in(key, 4), (d,)), "embed") if cross else None
        learned = config.positions if isinstance(config.positions, LearnedPositions) else None
        rows = (learned and learned.count) or config.prefix_length + config.length - 1
        self.positions = None if learned is None else param(jnp.zeros((rows, d)), None, "embed")
        self.blocks = stack(shape, keys[2], config.compute.attention, d if cross else 0)
        # Every layer adds to the residual stream: scaled weights keep its variance near 1 (Radford et al. 2019).
        for branch in (self.blocks.attention, self.blocks.mlp):
            branch.out.w = param(branch.out.w[...] / math.sqrt(2 * shape.depth), *branch.out.w.axes)
        self.norm = shape.normalise()
        output = normal(keys[3], (d, config.vocabulary), 0.0 if config.zero_output else 0.02)
        self.output = None if config.tied else param(output, "embed", "vocab")
        self.output_bias = param(jnp.zeros(config.vocabulary), "vocab") if config.output_bias else None

    def logits(self, z: Array) -> Array:
        """(..., d) -> (..., v) fp32."""
        w = transposed(self.tokens.w) if self.output is None else self.output
        logits = matmul(self.norm(z), w, jnp.float32)
        return logits if self.output_bias is None else logits + self.output_bias[...]


def _pad(valid: Array, length: int) -> Array:
    """valid (b, s) extended with True to (b, length): condition tokens may be padding, image tokens never are."""
    return jnp.pad(valid, ((0, 0), (0, length - valid.shape[1])), constant_values=True)
