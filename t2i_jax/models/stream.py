"""One stream of text and image tokens: p(w, x) = prod_i p(w_i | w_<i) prod_i p(x_i | w, x_<i).

DALL-E (Ramesh et al. 2021, arXiv:2102.12092), CogView (Ding et al. 2021, arXiv:2105.13290), minDALL-E: the sequence is
[start][text (s tokens)][x_0 .. x_{L-1}] in one causal Transformer, and the loss covers both parts. Text and image have
their own tables and heads: text positions predict text only and image positions codes only, as if the other part of a
joint vocabulary were masked. A joint table is the concatenation of the two; `one_softmax` normalises over both.

CogLM, the first stage of CogView2 (Ding et al. 2022, arXiv:2204.14217), reads the text in both directions and predicts
codes alone, p(x | w): [text][start of image][x_0 .. x_{L-1}].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Bool, Float, Int, typed
from t2i_jax.core.conditions import Batch
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import FREE, LARGEST, Checked, Count, Finite, Grid, NotNegative, Range, Share, Size
from t2i_jax.core.sharding import shard
from t2i_jax.core.specs import BatchSpec
from t2i_jax.core.types import CachedNetwork, Capabilities, Compute, LossOutput
from t2i_jax.networks.condition import dropped_rows, ids, same_length, text_spec
from t2i_jax.networks.understanding import Understanding, sees, targets, weights
from t2i_jax.nn.attention import Causal, MaskSpec, Rotary, rotary_text_grid
from t2i_jax.nn.decode import DecodeLinear, prepare_layers_for_decode
from t2i_jax.nn.layers import Embedding, ModelState, matmul, normal, param, position_table, transposed
from t2i_jax.nn.losses import chunked_cross_entropy, row_mean, row_weights, weighted_mean
from t2i_jax.nn.transformer import (
    Block,
    Cache,
    TokenShift,
    Transformer,
    apply_layers,
    drop,
    scale_residuals,
    scan_stack,
    stack,
)
from t2i_jax.sampling.autoregressive import Autoregressive
from t2i_jax.sampling.options import ARSampler, StreamSampler
from t2i_jax.sampling.tokens import sample_in_clusters

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
    bidirectional: bool = False
    """text tokens see each other in both directions, no padding is seen, and no text is predicted (Ding et al. 2022)"""
    end: Annotated[int, Range(-1, LARGEST)] = -1
    """id of a token that is added between text and image; -1: none"""

    def __post_init__(self):
        super().__post_init__()
        if self.end >= self.vocabulary:
            raise ConfigError(f"StreamText.end {self.end}: one of the {self.vocabulary} ids, or -1 for none")

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
        return self.text_length + (self.end >= 0)

    @property
    def text_length(self) -> int:
        """Tokens of text, with the start token."""
        return self.length + self.start

    @typed
    def __call__(self, batch: Batch, drop: Bool[Array, " b"]) -> Int[Array, "b s"]:
        """`text` int (b, s) and optionally `text_mask` bool (b, s) -> ids (b, s); dropped rows are all padding."""
        text, real = ids(batch, "text", self.vocabulary), self.real(batch, drop)
        padding = self.vocabulary + jnp.arange(self.length) if self.unique_padding else self.padding
        return jnp.where(real, text, padding).astype(jnp.int32)

    @typed
    def real(self, batch: Batch, drop: Bool[Array, " b"]) -> Bool[Array, "b s"]:
        """Which ids (b, s) are no padding."""
        same_length("text", batch["text"].shape[1], self.length)
        return jnp.asarray(batch.get("text_mask", batch["text"] != self.padding)) & ~drop[:, None]


@dataclasses.dataclass(frozen=True)
class Stream(Autoregressive):
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
    places: Annotated[tuple[int, int], Range(0, LARGEST)] = (0, 0)
    """Rows of the tables of learned positions, of text and of codes; 0: as many as tokens. The token between text and
    image has the last one of the text's."""
    understanding: Understanding | None = None
    """Another task of some examples in training: the caption and parts of the image from the image; with bidirectional
    text and `one_softmax` only."""
    clusters: Count = 0
    """Clusters of similar codes, numbered in the model's state, for `StreamSampler.top_clusters`; 0: none."""
    compute: Compute = Compute()
    sampling: Annotated[ARSampler, FREE] = ARSampler()
    """Default options of `sample`."""

    def __post_init__(self):
        super().__post_init__()
        if not self.attention:
            raise ValueError("attention=(): at least one kind")
        if self.token_shift and self.transformer.width % 4:
            raise ValueError(f"token_shift: moves quarters of the width {self.transformer.width}, no multiple of 4")
        if self.condition.bidirectional and self.attention != ("full",):
            raise ValueError(f"attention {self.attention}: with bidirectional text every layer has full attention")
        for count, tokens in zip(self.places, (self.condition.prefix_length, self.length), strict=True):
            if 0 < count < tokens:
                raise ValueError(f"places={self.places}: a table of {count} positions for {tokens} tokens")
        if self.understanding is not None:
            if not (self.condition.bidirectional and self.condition.end >= 0 and self.one_softmax):
                raise ConfigError("understanding: it needs bidirectional text with an end token, and one_softmax")
            if self.condition.start or self.positions != "learned":
                raise ConfigError("understanding: it needs learned positions, and no start token in generation")
            self.understanding.corners(self.grid)  # rejects patches that are too large
        if self.clusters > self.vocabulary:
            raise ValueError(f"clusters {self.clusters}: more than the {self.vocabulary} codes")

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        return dataclasses.replace(super().capabilities, unconditional=self.condition_dropout > 0)

    def condition_spec(self) -> BatchSpec:
        """Batch fields that `sample` reads."""
        return self.condition.batch_spec()

    def init(self, key: Array) -> StreamNetwork:
        """A model with fresh parameters."""
        return StreamNetwork(self, key)

    # -- sampling

    def check(self, options: ARSampler) -> None:
        """Errors: `ConfigError` for clusters of codes that the model does not have."""
        if not self.clusters and isinstance(options, StreamSampler) and np.any(np.asarray(options.top_clusters)):
            raise ConfigError("top_clusters: the codes of this model are in no clusters")

    @property
    def draws(self) -> int:
        """Uniform numbers that a code is drawn with."""
        return 2 if self.clusters else 1

    def draw(self, model: nnx.Module, logits: Array, options: ARSampler, uniform: Array) -> Array:
        """Codes int32 (b,) from guided logits (b, v) and uniform numbers (draws, b); traced."""
        labels = model.clusters if isinstance(model, StreamNetwork) else None
        if labels is None or not isinstance(options, StreamSampler):
            return super().draw(model, logits, options, uniform)
        return sample_in_clusters(logits, options, uniform, labels[...], self.clusters)

    def with_options(self, condition: Batch, options: ARSampler, b: int) -> Batch:
        """The condition of b images, with `text_weight` (b,) of the options."""
        if not isinstance(options, StreamSampler):
            return condition
        return {**condition, "text_weight": jnp.broadcast_to(jnp.asarray(options.text_weight, jnp.float32), (b,))}

    # -- training

    def loss(self, model: StreamNetwork, batch: Batch, key: Array, train: bool = True) -> LossOutput:
        """(text + w image) / (1 + w), the mean cross-entropies of both parts, and metrics; of a bidirectional text the
        codes' alone; of a batch with `understanding` the mean over all tokens that are predicted.

        batch: `codes` int (b, h, w), `text` (b, s), and optionally `text_mask` (b, s) and `weight` (b,), 0 for examples
        to ignore. train: False turns off dropout and dropped texts; static.
        """
        keys = jax.random.split(key)
        dropped = dropped_rows(keys[0], self.condition_dropout, len(batch["codes"]), train)
        text, real = self.condition(batch, dropped), self.condition.real(batch, dropped)
        if self.understanding is not None and train:
            return self._both_tasks(model, batch, text, real, self.understanding, keys[1])
        w, x = model(text, batch["codes"], keys[1] if train else None, real=real)
        both = lambda z: jnp.concatenate([model.image_logits(z), model.text_logits(z)], -1)
        text_score, image_score = (both, both) if self.one_softmax else (model.text_logits, model.image_logits)
        _, image_nll, correct = self._image_score(image_score, x, batch["codes"])
        of_image, accuracy = (row_mean(x.mean(-1), batch) for x in (image_nll, correct))
        if self.condition.bidirectional:
            metrics = {"loss": of_image, "bits_per_token": of_image / math.log(2), "accuracy": accuracy}
            return LossOutput(of_image, metrics)
        text = text[:, text.shape[1] - w.shape[1] :] + self.vocabulary * self.one_softmax
        _, text_nll, _ = chunked_cross_entropy(text_score, w, text, self.compute.loss_chunk)
        of_text = row_mean(text_nll.mean(-1), batch)
        loss = (of_text + self.image_weight * of_image) / (1 + self.image_weight)
        bits = {"bits_per_token": of_image / math.log(2), "bits_per_text_token": of_text / math.log(2)}
        return LossOutput(loss, {"loss": loss, **bits, "accuracy": accuracy})

    def _both_tasks(
        self, model: StreamNetwork, batch: Batch, text: Array, real: Array, task: Understanding, key: Array
    ) -> LossOutput:
        """The loss of a batch of whose examples some have the other task."""
        keys, b = jax.random.split(key, 3), len(text)
        codes, other = rearrange(batch["codes"], "b h w -> b (h w)"), jax.random.bernoulli(keys[0], task.share, (b,))
        patches = task.draw(keys[1], b, self.grid)
        z = model.both_tasks(text, real, codes, other, task.start, patches.inside, keys[2])
        score = lambda z: jnp.concatenate([model.image_logits(z), model.text_logits(z)], -1)
        wanted, weight = targets(text, codes, self.vocabulary), weights(other, real, patches)
        weight = weight * row_weights(batch, b)[:, None]
        _, nll, correct = chunked_cross_entropy(score, z, wanted, self.compute.loss_chunk)
        loss, generated = weighted_mean(nll, weight), weight * ~other[:, None]
        bits = weighted_mean(nll, generated) / math.log(2)
        return LossOutput(loss, {"loss": loss, "bits_per_token": bits, "accuracy": weighted_mean(correct, generated)})

    @typed
    def log_likelihood(self, model: StreamNetwork, batch: Batch) -> Float[Array, " b"]:
        """log p(codes | text) of each image in nats: (b,) fp32."""
        none = jnp.zeros(len(batch["codes"]), bool)
        _, x = model(self.condition(batch, none), batch["codes"], real=self.condition.real(batch, none))
        return -self._image_score(model.image_logits, x, batch["codes"])[1].sum(-1)

    def _image_score(self, score: Callable[[Array], Array], x: Array, codes: Array) -> tuple[Array, ...]:
        return chunked_cross_entropy(score, x, rearrange(codes, "b h w -> b (h w)"), self.compute.loss_chunk)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamDecodeState:
    """State of token-by-token decoding."""

    caches: tuple[Cache, ...]
    blocks: tuple[Block, ...]
    """One by one, in the layout that decodes fastest."""
    output: DecodeLinear
    cells: Array | None
    """Position embeddings of the codes (L, d)."""
    valid: Array | None
    """Which tokens before the image are no padding (b, s), if that is not seen."""
    weight: Array | None
    """`StreamSampler.text_weight` (b,)."""
    prefix: int = dataclasses.field(metadata={"static": True})
    """Tokens before the image."""

    def grow(self, count: int) -> StreamDecodeState:
        """The state with caches for `count` tokens of the image."""
        return dataclasses.replace(self, caches=tuple(c.grow(self.prefix + count) for c in self.caches))


class StreamNetwork(CachedNetwork[StreamDecodeState]):
    """The causal Transformer of a `Stream`, from ids and codes to the logits of both."""

    def __init__(self, config: Stream, key: Array):
        keys, shape = jax.random.split(key, 7), config.transformer
        d, rows = shape.width, config.condition.num_embeddings
        self.config, self.prefix = config, config.condition.prefix_length
        self.text_tokens = Embedding(rows, d, keys[0])
        self.image_tokens = Embedding(config.vocabulary, d, keys[1])
        places = lambda key, n, *maps: position_table(normal(key, (n, d)), *maps)
        learned = config.positions != "rotary"
        self.text_places = places(keys[2], config.places[0] or self.prefix) if learned else None
        own = config.positions == "learned"
        self.image_places = places(keys[3], config.places[1] or config.length, config.grid) if own else None
        labels = jnp.arange(config.vocabulary, dtype=jnp.int32) % max(config.clusters, 1)
        self.clusters = ModelState(labels) if config.clusters else None
        axial = config.positions == "axial"
        self.row_places, self.column_places = (
            places(k, n, (n, 1)) if axial else None for k, n in zip(jax.random.split(keys[3]), config.grid, strict=True)
        )
        self.blocks = stack(shape, keys[4], config.compute.attention)
        scale_residuals(self.blocks)
        if shape.layer_scale:  # earlier layers start with larger scales (Touvron et al. 2021, 3.2)
            layer = jnp.arange(1, shape.depth + 1)
            scale = jnp.where(layer <= 18, 0.1, jnp.where(layer <= 24, 1e-5, 1e-6))[:, None]
            scales = (param(jnp.broadcast_to(scale, (shape.depth, d)), None) for _ in range(2))
            self.blocks.attention_scale, self.blocks.mlp_scale = scales
        self.norm = shape.normalise()
        matrix = lambda key, v: None if config.tied else param(normal(key, (d, v)), "embed", "vocab")
        bias = lambda v: param(jnp.zeros(v), "vocab") if config.output_bias else None
        self.text_head, self.text_bias = matrix(keys[5], rows), bias(rows)
        self.image_head, self.image_bias = matrix(keys[6], config.vocabulary), bias(config.vocabulary)

    @typed
    def __call__(
        self,
        text: Int[Array, "b s"],
        codes: Int[Array, "b i j"],
        key: Array | None = None,
        *,
        real: Bool[Array, "b s"] | None = None,
        text_weight: Float[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b p d"], Float[Array, "b i*j d"]]:
        """z of text tokens, for `text_logits`, and of codes, for `image_logits`, each given all preceding tokens.

        text: ids int (b, s); codes: int (b, h, w); key: for dropout. real: which text is no padding, for bidirectional
        text; None: all. text_weight: as in `StreamSampler`. z: (b, s or s - 1, d), without the first token if there is
        no start token, and (b, L, d).
        """
        codes = rearrange(codes, "b h w -> b (h w)")[:, :-1]  # the last code predicts nothing
        x = jnp.concatenate([self.embed_text(text), self.embed_codes(codes, self.cells(), 0)], 1)
        t = x.shape[1]
        x = self.apply_blocks(x, self.causal(real, t), self.bias(text_weight, t, t), key)
        return x[:, : self.config.condition.text_length - 1], x[:, self.prefix - 1 :]

    def apply_blocks(self, x: Array, mask: Array | MaskSpec, bias: Array | None, key: Array | None) -> Array:
        """z of embedded tokens (b, t, d); key: for dropout."""
        config, place = self.config, jnp.arange(x.shape[1])
        keys = (None, None) if key is None else jax.random.split(key)
        x = config.embedding_gradient * x + (1 - config.embedding_gradient) * jax.lax.stop_gradient(x)
        return scan_stack(
            self.blocks,
            shard(drop(x, config.transformer.dropout, keys[0]), "batch", "length", None),
            mask=mask,
            bias=bias,
            rotary=self.rotary(place),
            shift=self.shift,
            key=keys[1],
            remat=config.compute.remat,
        )

    @typed
    def both_tasks(
        self,
        text: Int[Array, "b s"],
        real: Bool[Array, "b s"],
        codes: Int[Array, "b l"],
        other: Bool[Array, " b"],
        start: int,
        inside: Bool[Array, "b l"],
        key: Array,
    ) -> Float[Array, "b n d"]:
        """z (b, s + 1 + L, d) of text, the token after it, and codes; of `other` rows (b,) of the token `start`, text
        and codes, `inside` patches or not: see `networks.understanding`."""
        s, t = self.prefix, self.prefix + codes.shape[1]
        understood = self.text_tokens(jnp.pad(text, ((0, 0), (1, 0)), constant_values=start))
        understood = understood + (0 if self.text_places is None else self.text_places[:s])
        first = jnp.where(other[:, None, None], understood.astype(self.config.compute.dtype), self.embed_text(text))
        x = jnp.concatenate([first, self.embed_codes(codes, self.cells(), 0)], 1)
        generated = Causal(self.valid(real, t), s, self.config.condition.text_length).dense(t)
        mask = jnp.where(other[:, None, None, None], sees(inside, s), generated)
        return self.apply_blocks(x, mask, None, key)

    @typed
    def text_logits(self, z: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """(..., d) -> (..., rows of the text table) fp32."""
        return self._logits(z, self.text_tokens, self.text_head, self.text_bias)

    @typed
    def image_logits(self, z: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """(..., d) -> (..., v) fp32."""
        return self._logits(z, self.image_tokens, self.image_head, self.image_bias)

    def _logits(self, z: Array, tokens: Embedding, head: nnx.Param | None, bias: nnx.Param | None) -> Array:
        logits = matmul(self.norm(z), transposed(tokens.w) if head is None else head, jnp.float32)
        return logits if bias is None else logits + bias[...]

    @typed
    def embed_text(self, text: Int[Array, "b s"]) -> Float[Array, "b p d"]:
        """Ids (b, s) as the first tokens of the stream, with the tokens before and after text if there are any: (b, s
        to s + 2, d)."""
        if self.config.condition.start:
            text = jnp.pad(text, [(0, 0), (1, 0)], constant_values=self.config.condition.padding)
        if self.config.condition.end >= 0:
            text = jnp.pad(text, [(0, 0), (0, 1)], constant_values=self.config.condition.end)
        x = self.text_tokens(text)
        places = self.prefix_places()
        x = x if places is None else x + places
        return shard(x.astype(self.config.compute.dtype), "batch", "length", None)

    @typed
    def embed_codes(
        self, codes: Int[Array, "b t"], cells: Float[Array, "_ d"] | None, first: Array | int
    ) -> Float[Array, "b t d"]:
        """Codes (b, t) of the grid positions from `first` on as tokens of the stream: (b, t, d)."""
        x = self.image_tokens(codes)
        here = lambda table: jax.lax.dynamic_slice_in_dim(table, first, codes.shape[1])
        x = x if cells is None else x + shard(here(cells), None, "embed")
        return shard(x.astype(self.config.compute.dtype), "batch", "length", None)

    @typed
    def prefix_places(self) -> Float[Array, "p d"] | None:
        """Position embeddings of the tokens before the image: (p, d), or None."""
        if self.text_places is None:
            return None
        table, text = self.text_places[...], self.config.condition.text_length
        return jnp.concatenate([table[:text], table[len(table) - self.prefix + text :]])

    @typed
    def cells(self) -> Float[Array, "_ d"] | None:
        """Position embeddings of the codes: (L, d), or None."""
        if self.row_places is not None and self.column_places is not None:
            return rearrange(self.row_places[...][:, None] + self.column_places[...], "h w d -> (h w) d")
        return None if self.image_places is None else self.image_places[: self.config.length]

    @property
    def shift(self) -> TokenShift | None:
        """The token shift of every branch."""
        return TokenShift(self.prefix, self.config.grid[1]) if self.config.token_shift else None

    def causal(self, real: Array | None, t: int) -> Array | Causal:
        """Mask of the first t tokens; real: bool (b, s), text that is no padding, for bidirectional text."""
        if self.config.attention != ("full",):
            return self.visible(jnp.arange(t), jnp.arange(t))
        if not self.config.condition.bidirectional:
            return Causal()
        return Causal(self.valid(real, t), self.prefix, self.config.condition.text_length)

    def valid(self, real: Array | None, t: int) -> Array | None:
        """Which of the first t tokens are no padding (b, t); real: of the text (b, s)."""
        if real is None or not self.config.condition.bidirectional:
            return None
        start = self.config.condition.start
        return jnp.pad(real, ((0, 0), (start, t - start - real.shape[1])), constant_values=True)

    def bias(self, weight: Array | None, t: int, s: int) -> Array | None:
        """What is added to attention scores (b, n, t, s): `weight` (b,) to those of text."""
        if weight is None:
            return None
        to_text = weight[:, None, None, None] * (jnp.arange(s) < self.config.condition.text_length)
        return jnp.broadcast_to(to_text, (len(weight), self.config.transformer.heads, t, s))

    @typed
    def visible(self, q: Int[Array, " t"], k: Int[Array, " s"]) -> Bool[Array, "*n 1 1 t s"]:
        """Mask from positions q (t,) to positions k (s,): (1, 1, t, s), or (n, 1, 1, t, s) for n masks that cycle over
        the layers."""
        q, k = q[:, None], k[None]
        (q_row, q_column), (k_row, k_column) = (jnp.divmod(p - self.prefix, self.config.grid[1]) for p in (q, k))
        down, right = q_row - k_row, q_column - k_column
        near = {
            "full": True,
            "row": down == 0,
            "column": right == 0,
            "window": (down < WINDOW) & (right >= 0) & (right < WINDOW),
        }
        masks = jnp.stack([(k <= q) & (near[kind] | (k < self.prefix)) for kind in self.config.attention])
        return masks[:, None, None] if len(masks) > 1 else masks[:, None]

    def rotary(self, place: Array) -> Rotary | None:
        """cos and sin at positions `place`."""
        if self.config.positions != "rotary":
            return None
        angles = rotary_text_grid(self.prefix, self.config.grid, self.config.transformer.head_size)
        return jnp.cos(angles)[place], jnp.sin(angles)[place]

    @typed
    def prefill(self, condition: Batch, dropped: Bool[Array, " b"]) -> tuple[Float[Array, "b v"], StreamDecodeState]:
        """Process the text: the logits (b, v) of code 0, and the initial state for `decode`."""
        config, place = self.config, jnp.arange(self.prefix)
        dtype, shape, weight = config.compute.dtype, config.transformer, condition.get("text_weight")
        x = self.embed_text(config.condition(condition, dropped))
        first, following = prepare_layers_for_decode(self.blocks, dtype)
        b, s = x.shape[:2]
        caches = tuple(Cache.empty(shape, b, s, dtype) for _ in first)
        if config.token_shift:
            past = jnp.zeros((b, 2, s, shape.width // 4 * 2), dtype)
            caches = tuple(c._replace(past=past) for c in caches)
        mask, bias = self.causal(config.condition.real(condition, dropped), s), self.bias(weight, s, s)
        mask = mask.dense(s) if isinstance(mask, Causal) else mask
        rotary = self.rotary(place)
        x, caches = apply_layers(first, x, mask=mask, bias=bias, rotary=rotary, shift=self.shift, caches=caches)
        w = transposed(self.image_tokens.w) if self.image_head is None else self.image_head
        output = DecodeLinear(w, self.image_bias, dtype, jnp.float32)
        valid = self.valid(config.condition.real(condition, dropped), s)
        state = StreamDecodeState(caches, following, output, self.cells(), valid, weight, s)
        return self.image_logits(x[:, -1]), state

    @typed
    def decode(
        self, state: StreamDecodeState, codes: Int[Array, " b"], i: Array | int
    ) -> tuple[Float[Array, "b v"], StreamDecodeState]:
        """Feed code i, int (b,): the logits (b, v) of code i + 1. The caches must have room for it."""
        place, capacity = jnp.reshape(self.prefix + i, (1,)), state.caches[0].k.shape[2]
        mask = self.visible(place, jnp.arange(capacity))
        if state.valid is not None:
            seen = jnp.pad(state.valid, ((0, 0), (0, capacity - state.prefix)), constant_values=True)
            mask = mask & seen[:, None, None]
        x, caches = apply_layers(
            state.blocks,
            self.embed_codes(codes[:, None], state.cells, i),
            mask=mask,
            bias=self.bias(state.weight, 1, capacity),
            rotary=self.rotary(place),
            shift=self.shift,
            caches=state.caches,
        )
        return state.output(self.norm(x[:, 0])), dataclasses.replace(state, caches=caches)
