"""One stream of text and image tokens: p(w, x) = prod_i p(w_i | w_<i) prod_i p(x_i | w, x_<i).

DALL-E (Ramesh et al. 2021, arXiv:2102.12092), CogView (Ding et al. 2021, arXiv:2105.13290), minDALL-E: the sequence is
[start][text (s tokens)][x_0 .. x_{L-1}] in one causal Transformer, and the loss covers both parts. Text and image have
their own tables and heads: text positions predict text only and image positions codes only, as if the other part of a
joint vocabulary were masked. A joint table is the concatenation of the two; `one_softmax` normalises over both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.conditions import Batch
from t2i_jax.core.family import BaseFamily
from t2i_jax.core.fields import FREE, Checked, Count, Finite, Grid, NotNegative, Share, Size
from t2i_jax.core.sharding import shard
from t2i_jax.core.specs import BatchSpec, CodeSpec, SampleSpec
from t2i_jax.core.types import Capabilities, Compute, LossOutput
from t2i_jax.networks.condition import dropped_rows, ids, same_length, text_spec
from t2i_jax.nn.attention import Causal, Rotary, rotary_text_grid
from t2i_jax.nn.decode import DecodeLinear, prepare_layers_for_decode
from t2i_jax.nn.layers import Embedding, LayerNorm, RMSNorm, matmul, normal, param, transposed
from t2i_jax.nn.losses import chunked_cross_entropy
from t2i_jax.nn.transformer import REMATS, Block, Cache, TokenShift, Transformer, apply_stack, drop, stack
from t2i_jax.sampling import autoregressive
from t2i_jax.sampling.guidance import is_guided
from t2i_jax.sampling.options import ARSampler
from t2i_jax.sampling.progress import Progress

Attention = Literal["full", "row", "column", "window"]
WINDOW = 5  # rows and columns of a window, its last cell the query's own


@dataclasses.dataclass(frozen=True)
class StreamText(Checked):
    """The first part of the stream: ids of a caption, padded to a fixed length."""

    vocabulary: Size = 16384
    length: Size = 64
    start: bool = False
    """add a start token, with the id of padding, before the text, so that the first text token is predicted too"""
    padding: Count = 0
    """id of padding if there is no `text_mask`"""
    unique_padding: bool = False
    """give each position a padding id of its own, after the vocabulary (Ramesh et al. 2021, 2.2)"""

    def batch_spec(self) -> BatchSpec:
        """Batch fields that it reads."""
        return text_spec(self.vocabulary, self.length, mask=False)

    @property
    def num_embeddings(self) -> int:
        """Number of ids."""
        return self.vocabulary + (self.length if self.unique_padding else 0)

    @property
    def prefix_length(self) -> int:
        """Tokens before the image."""
        return self.length + self.start

    def __call__(self, batch: Batch, drop: Array) -> Array:
        """`text` int (b, s) and optionally `text_mask` bool (b, s) -> ids (b, s); dropped rows are all padding."""
        text = ids(batch, "text", self.vocabulary)
        same_length("text", text.shape[1], self.length)
        real = jnp.asarray(batch.get("text_mask", text != self.padding))
        padding = self.vocabulary + jnp.arange(self.length) if self.unique_padding else self.padding
        return jnp.where(real & ~drop[:, None], text, padding).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Stream(BaseFamily):
    """A causal Transformer over a caption and the codes of its image, and its training settings."""

    vocabulary: Size = 1024
    """Number of codes of the codec."""
    grid: Grid = (8, 8)
    """Rows and columns of codes."""
    condition: StreamText = StreamText()
    transformer: Transformer = Transformer(256, 6, 4, norm="layer", activation="gelu", bias=True)
    """With `rope_values`, `sandwich_norm`, `pb_relax` (CogView) and `layer_scale` (DALLE-pytorch)."""
    token_shift: bool = False
    """Each branch reads some channels from preceding neighbours."""
    attention: tuple[Attention, ...] = ("full",)
    """Attention pattern of image tokens over the image, cycling over the layers (Child et al. 2019); all text is
    visible."""
    positions: Literal["learned", "axial", "rotary"] = "learned"
    """One vector per position, one per row and one per column, or rotated queries, keys and values."""
    tied: bool = False
    """Use the token tables also as output matrices."""
    output_bias: bool = False
    one_softmax: bool = False
    """Normalise over codes and text ids jointly in training (Ding et al. 2021, 2.1: one vocabulary, codes first);
    sampling draws codes only."""
    image_weight: NotNegative = 7.0
    """w of the loss (text + w image) / (1 + w), both means over tokens (Ramesh et al. 2021, 2.2); the number of codes
    per text token weights all tokens equally, as CogView does."""
    embedding_gradient: Finite = 1.0
    """Factor of the gradient of the embedded tokens; CogView uses 0.1."""
    condition_dropout: Share = 0.1
    """Share of training examples whose text is replaced by padding, for guidance; 0: there is no unconditional
    branch."""
    compute: Compute = Compute()
    sampling: Annotated[ARSampler, FREE] = ARSampler()
    """Default options of `sample`."""

    def __post_init__(self):
        super().__post_init__()
        if not self.attention:
            raise ValueError("attention=(): at least one kind")
        if self.token_shift and self.transformer.width % 4:
            raise ValueError(f"token_shift: moves quarters of the width {self.transformer.width}, no multiple of 4")

    @property
    def length(self) -> int:
        """Tokens of an image."""
        return math.prod(self.grid)

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        return Capabilities(
            family=True,
            unconditional=self.condition_dropout > 0,
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
        """Batch fields that `sample` reads."""
        return self.condition.batch_spec()

    def init(self, key: Array) -> StreamNetwork:
        """A model with fresh parameters."""
        return StreamNetwork(self, key)

    # -- training

    def loss(self, model: StreamNetwork, batch: Batch, key: Array, train: bool = True) -> LossOutput:
        """(text + w image) / (1 + w), the mean cross-entropies of both parts, and metrics.

        batch: `codes` int (b, h, w), `text` (b, s), and optionally `text_mask` (b, s) and `weight` (b,), 0 for examples
        to ignore. train: False turns off dropout and dropped texts; static.
        """
        keys = jax.random.split(key)
        b = batch["codes"].shape[0]
        text = self.condition(batch, dropped_rows(keys[0], self.condition_dropout, b, train))
        w, x = self._features(model, text, batch["codes"], keys[1] if train else None)
        both = lambda z: jnp.concatenate([model.image_logits(z), model.text_logits(z)], -1)
        text_score, image_score = (both, both) if self.one_softmax else (model.text_logits, model.image_logits)
        text = text[:, text.shape[1] - w.shape[1] :] + self.vocabulary * self.one_softmax
        _, text_nll, _ = chunked_cross_entropy(text_score, w, text, self.compute.loss_chunk)
        _, image_nll, correct = self._image_score(image_score, x, batch["codes"])
        weight = batch.get("weight", jnp.ones(b)).astype(jnp.float32)
        mean = lambda x: jnp.sum(x.mean(-1) * weight) / jnp.maximum(weight.sum(), 1)
        loss = (mean(text_nll) + self.image_weight * mean(image_nll)) / (1 + self.image_weight)
        bits = {"bits_per_token": mean(image_nll) / math.log(2), "bits_per_text_token": mean(text_nll) / math.log(2)}
        return LossOutput(loss, {"loss": loss, **bits, "accuracy": mean(correct)})

    def log_likelihood(self, model: StreamNetwork, batch: Batch) -> Array:
        """log p(codes | text) of each image in nats: (b,) fp32."""
        text = self.condition(batch, jnp.zeros(batch["codes"].shape[0], bool))
        _, x = self._features(model, text, batch["codes"])
        return -self._image_score(model.image_logits, x, batch["codes"])[1].sum(-1)

    def forward(self, model: StreamNetwork, batch: Batch, dropped: Array | None = None) -> tuple[Array, Array]:
        """Logits fp32 of text tokens and of codes, each given all preceding tokens.

        Text: (b, s or s - 1, rows), without the first token if there is no start token; codes: (b, L, v). `dropped`
        bool (b,) marks rows without their text.
        """
        dropped = jnp.zeros(batch["codes"].shape[0], bool) if dropped is None else dropped
        w, x = self._features(model, self.condition(batch, dropped), batch["codes"])
        return model.text_logits(w), model.image_logits(x)

    def joint(self, text: Array, image: Array) -> Array:
        """Both parts of `forward` as logits (b, t, rows + v) over one vocabulary, text first.

        Tokens that a position cannot predict get the lowest finite number.
        """
        lowest = jnp.finfo(jnp.float32).min
        wide = lambda x, *sides: jnp.pad(x, [(0, 0), (0, 0), sides], constant_values=lowest)
        return jnp.concatenate([wide(text, 0, image.shape[-1]), wide(image, text.shape[-1], 0)], 1)

    def _image_score(self, score: Callable[[Array], Array], x: Array, codes: Array) -> tuple[Array, ...]:
        return chunked_cross_entropy(score, x, rearrange(codes, "b h w -> b (h w)"), self.compute.loss_chunk)

    def _features(
        self, model: StreamNetwork, text: Array, codes: Array, key: Array | None = None
    ) -> tuple[Array, Array]:
        """Outputs of the Transformer at the positions of text logits and of code logits: (b, s', d), (b, L, d)."""
        keys = (None, None) if key is None else jax.random.split(key)
        codes = rearrange(codes, "b h w -> b (h w)")[:, :-1]  # the last code predicts nothing
        x = jnp.concatenate([self._text(model, text), self._image(model.image_tokens, model.cells(), codes, 0)], 1)
        x = self.embedding_gradient * x + (1 - self.embedding_gradient) * jax.lax.stop_gradient(x)
        place = jnp.arange(x.shape[1])
        x, _ = apply_stack(
            model.blocks,
            shard(drop(x, self.transformer.dropout, keys[0]), "batch", "length", None),
            mask=Causal() if self.attention == ("full",) else self._visible(place, place),
            rotary=self._rotary(place),
            shift=self._shift,
            key=keys[1],
            remat=self.compute.remat,
        )
        return x[:, : self.condition.prefix_length - 1], x[:, self.condition.prefix_length - 1 :]

    # -- embeddings, masks and positions

    def _text(self, model: StreamNetwork, text: Array) -> Array:
        """Text ids (b, s) as the first tokens of the stream."""
        if self.condition.start:
            text = jnp.pad(text, [(0, 0), (1, 0)], constant_values=self.condition.padding)
        x = model.text_tokens(text)
        x = x if model.text_places is None else x + model.text_places[...]
        return shard(x.astype(self.compute.dtype), "batch", "length", None)

    def _image(self, tokens: Embedding, places: Array | None, codes: Array, first: Array | int) -> Array:
        """Codes (b, t) of the grid positions from `first` on as tokens of the stream."""
        x = tokens(codes)
        here = lambda table: jax.lax.dynamic_slice_in_dim(table, first, codes.shape[1])
        x = x if places is None else x + shard(here(places), None, "embed")
        return shard(x.astype(self.compute.dtype), "batch", "length", None)

    @property
    def _shift(self) -> TokenShift | None:
        return TokenShift(self.condition.prefix_length, self.grid[1]) if self.token_shift else None

    def _visible(self, q: Array, k: Array) -> Array:
        """Mask from positions q (t,) to positions k (s,): (1, 1, t, s), or (n, 1, 1, t, s) for n masks that cycle over
        the layers."""
        q, k = q[:, None], k[None]
        past, columns = k <= q, self.grid[1]
        (q_row, q_column), (k_row, k_column) = (jnp.divmod(p - self.condition.prefix_length, columns) for p in (q, k))
        down, right = q_row - k_row, q_column - k_column
        near = {
            "full": True,
            "row": down == 0,
            "column": right == 0,
            "window": (down < WINDOW) & (right >= 0) & (right < WINDOW),
        }
        masks = jnp.stack([past & (near[kind] | (k < self.condition.prefix_length)) for kind in self.attention])
        return masks[:, None, None] if len(masks) > 1 else masks[:, None]

    def _rotary(self, place: Array) -> Rotary | None:
        """cos and sin at positions `place`."""
        if self.positions != "rotary":
            return None
        angles = rotary_text_grid(self.condition.prefix_length, self.grid, self.transformer.head_size)
        return jnp.cos(angles)[place], jnp.sin(angles)[place]

    # -- sampling

    def sample(
        self,
        model: StreamNetwork,
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
        """Codes int32 (b, h, w), one image per row of `text` and per key of `keys` (b,); see
        `sampling.autoregressive.sample`.

        guided: None skips the unconditional branch if `condition_dropout` is 0.
        """
        guided = is_guided(self.capabilities, guided)
        segments = segments or autoregressive.segments_of(self.transformer.depth)
        return autoregressive.sample(self, model, condition, keys, options, known, keep, guided, segments, progress)

    def prefill(self, model: StreamNetwork, condition: Batch, dropped: Array) -> tuple[Array, StreamDecodeState]:
        """Process the text: the logits (b, v) of code 0, and the initial state for `decode`."""
        x, place = self._text(model, self.condition(condition, dropped)), jnp.arange(self.condition.prefix_length)
        first, following = prepare_layers_for_decode(model.blocks, self.compute.dtype)
        b, s = x.shape[:2]
        caches = tuple(Cache.empty(self.transformer, b, s, self.compute.dtype) for _ in first)
        if self.token_shift:
            past = jnp.zeros((b, 2, s, self.transformer.width // 4 * 2), self.compute.dtype)
            caches = tuple(c._replace(past=past) for c in caches)
        x, caches = apply_stack(
            first,
            x,
            mask=self._visible(place, place),
            rotary=self._rotary(place),
            shift=self._shift,
            caches=caches,
        )
        w = transposed(model.image_tokens.w) if model.image_head is None else model.image_head
        state = StreamDecodeState(
            caches=caches,
            blocks=following,
            tokens=model.image_tokens,
            places=model.cells(),
            norm=model.norm,
            output=DecodeLinear(w, model.image_bias, self.compute.dtype, jnp.float32),
            text=s,
        )
        return model.image_logits(x[:, -1]), state

    def decode(self, state: StreamDecodeState, codes: Array, i: Array | int) -> tuple[Array, StreamDecodeState]:
        """Feed code i, int (b,), and return the logits (b, v) of code i + 1. The caches must have room for it."""
        place = jnp.reshape(self.condition.prefix_length + i, (1,))
        x, caches = apply_stack(
            state.blocks,
            self._image(state.tokens, state.places, codes[:, None], i),
            mask=self._visible(place, jnp.arange(state.caches[0].k.shape[2])),
            rotary=self._rotary(place),
            shift=self._shift,
            caches=state.caches,
        )
        return state.output(state.norm(x[:, 0])), dataclasses.replace(state, caches=caches)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamDecodeState:
    """State of token-by-token decoding."""

    caches: tuple[Cache, ...]
    blocks: tuple[Block, ...]
    """One by one, in the layout that decodes fastest."""
    tokens: Embedding
    places: Array | None
    """Position embeddings of the codes (L, d)."""
    norm: RMSNorm | LayerNorm
    output: DecodeLinear
    text: int = dataclasses.field(metadata={"static": True})
    """Tokens before the image."""

    def grow(self, count: int) -> StreamDecodeState:
        """The state with caches for `count` tokens of the image."""
        return dataclasses.replace(self, caches=tuple(c.grow(self.text + count) for c in self.caches))


class StreamNetwork(nnx.Module):
    """The parameters of a `Stream`."""

    def __init__(self, config: Stream, key: Array):
        keys, shape = jax.random.split(key, 7), config.transformer
        d, depth = shape.width, shape.depth
        self.text_tokens = Embedding(config.condition.num_embeddings, d, keys[0])
        self.image_tokens = Embedding(config.vocabulary, d, keys[1])
        places = lambda key, *shape: param(normal(key, (*shape, d)), *(None,) * len(shape), "embed")
        learned = config.positions != "rotary"
        self.text_places = places(keys[2], config.condition.prefix_length) if learned else None
        self.image_places = places(keys[3], config.length) if config.positions == "learned" else None
        axial = config.positions == "axial"
        self.row_places, self.column_places = (
            places(k, n) if axial else None for k, n in zip(jax.random.split(keys[3]), config.grid, strict=True)
        )
        self.blocks = stack(shape, keys[4], config.compute.attention)
        # Every layer adds to the residual stream: scaled weights keep its variance near 1 (Radford et al. 2019).
        for branch in (self.blocks.attention, self.blocks.mlp):
            branch.out.w = param(branch.out.w[...] / math.sqrt(2 * depth), *branch.out.w.axes)
        if shape.layer_scale:  # earlier layers start with larger scales (Touvron et al. 2021, 3.2)
            layer = jnp.arange(1, depth + 1)
            scale = jnp.where(layer <= 18, 0.1, jnp.where(layer <= 24, 1e-5, 1e-6))[:, None]
            for name in ("attention_scale", "mlp_scale"):
                setattr(self.blocks, name, param(jnp.broadcast_to(scale, (depth, d)), None))
        self.norm = shape.normalise()
        matrix = lambda key, v: None if config.tied else param(normal(key, (d, v)), "embed", "vocab")
        bias = lambda v: param(jnp.zeros(v), "vocab") if config.output_bias else None
        self.text_head, self.text_bias = (
            matrix(keys[5], config.condition.num_embeddings),
            bias(config.condition.num_embeddings),
        )
        self.image_head, self.image_bias = matrix(keys[6], config.vocabulary), bias(config.vocabulary)

    def cells(self) -> Array | None:
        """Position embeddings of the codes: (L, d), or None."""
        if self.row_places is not None and self.column_places is not None:
            return rearrange(self.row_places[...][:, None] + self.column_places[...], "h w d -> (h w) d")
        return None if self.image_places is None else self.image_places[...]

    def text_logits(self, z: Array) -> Array:
        """(..., d) -> (..., rows of the text table) fp32."""
        return self._logits(z, self.text_tokens, self.text_head, self.text_bias)

    def image_logits(self, z: Array) -> Array:
        """(..., d) -> (..., v) fp32."""
        return self._logits(z, self.image_tokens, self.image_head, self.image_bias)

    def _logits(self, z: Array, tokens: Embedding, head: nnx.Param | None, bias: nnx.Param | None) -> Array:
        logits = matmul(self.norm(z), transposed(tokens.w) if head is None else head, jnp.float32)
        return logits if bias is None else logits + bias[...]
