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

from t2i_jax.core.arrays import Bool, Float, Int, typed
from t2i_jax.core.conditions import Batch
from t2i_jax.core.fields import FREE, Checked, Count, Finite, Grid, NotNegative, Share, Size
from t2i_jax.core.sharding import shard
from t2i_jax.core.specs import BatchSpec
from t2i_jax.core.types import CachedNetwork, Capabilities, Compute, LossOutput
from t2i_jax.networks.condition import dropped_rows, ids, same_length, text_spec
from t2i_jax.nn.attention import Causal, Rotary, rotary_text_grid
from t2i_jax.nn.decode import DecodeLinear, prepare_layers_for_decode
from t2i_jax.nn.layers import Embedding, matmul, normal, param, transposed
from t2i_jax.nn.losses import chunked_cross_entropy, row_mean
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
from t2i_jax.sampling.options import ARSampler

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

    @typed
    def __call__(self, batch: Batch, drop: Bool[Array, " b"]) -> Int[Array, "b s"]:
        """`text` int (b, s) and optionally `text_mask` bool (b, s) -> ids (b, s); dropped rows are all padding."""
        text = ids(batch, "text", self.vocabulary)
        same_length("text", text.shape[1], self.length)
        real = jnp.asarray(batch.get("text_mask", text != self.padding))
        padding = self.vocabulary + jnp.arange(self.length) if self.unique_padding else self.padding
        return jnp.where(real & ~drop[:, None], text, padding).astype(jnp.int32)


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
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        return dataclasses.replace(super().capabilities, unconditional=self.condition_dropout > 0)

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
        dropped = dropped_rows(keys[0], self.condition_dropout, len(batch["codes"]), train)
        text = self.condition(batch, dropped)
        w, x = model(text, batch["codes"], keys[1] if train else None)
        both = lambda z: jnp.concatenate([model.image_logits(z), model.text_logits(z)], -1)
        text_score, image_score = (both, both) if self.one_softmax else (model.text_logits, model.image_logits)
        text = text[:, text.shape[1] - w.shape[1] :] + self.vocabulary * self.one_softmax
        _, text_nll, _ = chunked_cross_entropy(text_score, w, text, self.compute.loss_chunk)
        _, image_nll, correct = self._image_score(image_score, x, batch["codes"])
        of_text, of_image, accuracy = (row_mean(x.mean(-1), batch) for x in (text_nll, image_nll, correct))
        loss = (of_text + self.image_weight * of_image) / (1 + self.image_weight)
        bits = {"bits_per_token": of_image / math.log(2), "bits_per_text_token": of_text / math.log(2)}
        return LossOutput(loss, {"loss": loss, **bits, "accuracy": accuracy})

    @typed
    def log_likelihood(self, model: StreamNetwork, batch: Batch) -> Float[Array, " b"]:
        """log p(codes | text) of each image in nats: (b,) fp32."""
        _, x = model(self.condition(batch, jnp.zeros(len(batch["codes"]), bool)), batch["codes"])
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
        places = lambda key, *shape: param(normal(key, (*shape, d)), *(None,) * len(shape), "embed")
        learned = config.positions != "rotary"
        self.text_places = places(keys[2], self.prefix) if learned else None
        self.image_places = places(keys[3], config.length) if config.positions == "learned" else None
        axial = config.positions == "axial"
        self.row_places, self.column_places = (
            places(k, n) if axial else None for k, n in zip(jax.random.split(keys[3]), config.grid, strict=True)
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
        self, text: Int[Array, "b s"], codes: Int[Array, "b i j"], key: Array | None = None
    ) -> tuple[Float[Array, "b p d"], Float[Array, "b i*j d"]]:
        """z of text tokens, for `text_logits`, and of codes, for `image_logits`, each given all preceding tokens.

        text: ids int (b, s); codes: int (b, h, w); key: for dropout. z: (b, s or s - 1, d), without the first token if
        there is no start token, and (b, L, d).
        """
        config, keys = self.config, (None, None) if key is None else jax.random.split(key)
        codes = rearrange(codes, "b h w -> b (h w)")[:, :-1]  # the last code predicts nothing
        x = jnp.concatenate([self.embed_text(text), self.embed_codes(codes, self.cells(), 0)], 1)
        x = config.embedding_gradient * x + (1 - config.embedding_gradient) * jax.lax.stop_gradient(x)
        place = jnp.arange(x.shape[1])
        x = scan_stack(
            self.blocks,
            shard(drop(x, config.transformer.dropout, keys[0]), "batch", "length", None),
            mask=Causal() if config.attention == ("full",) else self.visible(place, place),
            rotary=self.rotary(place),
            shift=self.shift,
            key=keys[1],
            remat=config.compute.remat,
        )
        return x[:, : self.prefix - 1], x[:, self.prefix - 1 :]

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
        """Ids (b, s) as the first tokens of the stream, with the start token if there is one: (b, s or s + 1, d)."""
        if self.config.condition.start:
            text = jnp.pad(text, [(0, 0), (1, 0)], constant_values=self.config.condition.padding)
        x = self.text_tokens(text)
        x = x if self.text_places is None else x + self.text_places[...]
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
    def cells(self) -> Float[Array, "_ d"] | None:
        """Position embeddings of the codes: (L, d), or None."""
        if self.row_places is not None and self.column_places is not None:
            return rearrange(self.row_places[...][:, None] + self.column_places[...], "h w d -> (h w) d")
        return None if self.image_places is None else self.image_places[...]

    @property
    def shift(self) -> TokenShift | None:
        """The token shift of every branch."""
        return TokenShift(self.prefix, self.config.grid[1]) if self.config.token_shift else None

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
        dtype, shape = config.compute.dtype, config.transformer
        x = self.embed_text(config.condition(condition, dropped))
        first, following = prepare_layers_for_decode(self.blocks, dtype)
        b, s = x.shape[:2]
        caches = tuple(Cache.empty(shape, b, s, dtype) for _ in first)
        if config.token_shift:
            past = jnp.zeros((b, 2, s, shape.width // 4 * 2), dtype)
            caches = tuple(c._replace(past=past) for c in caches)
        mask, rotary = self.visible(place, place), self.rotary(place)
        x, caches = apply_layers(first, x, mask=mask, rotary=rotary, shift=self.shift, caches=caches)
        w = transposed(self.image_tokens.w) if self.image_head is None else self.image_head
        output = DecodeLinear(w, self.image_bias, dtype, jnp.float32)
        return self.image_logits(x[:, -1]), StreamDecodeState(caches, following, output, self.cells(), s)

    @typed
    def decode(
        self, state: StreamDecodeState, codes: Int[Array, " b"], i: Array | int
    ) -> tuple[Float[Array, "b v"], StreamDecodeState]:
        """Feed code i, int (b,): the logits (b, v) of code i + 1. The caches must have room for it."""
        place = jnp.reshape(self.prefix + i, (1,))
        x, caches = apply_layers(
            state.blocks,
            self.embed_codes(codes[:, None], state.cells, i),
            mask=self.visible(place, jnp.arange(state.caches[0].k.shape[2])),
            rotary=self.rotary(place),
            shift=self.shift,
            caches=state.caches,
        )
        return state.output(self.norm(x[:, 0])), dataclasses.replace(state, caches=caches)
