"""Next-token prediction of image tokens: p(x | c) = prod_i p(x_i | x_<i, c).

Parti (Yu et al. 2022) and LlamaGen (Sun et al. 2024): one causal Transformer over the tokens of a condition, then the
codes of an image in raster order. The sequence is [condition (s tokens)][x_0 .. x_{L-1}]; the logits of x_i are the
output at x_{i-1}, those of x_0 the output at the last condition token.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.conditions import Batch, Condition
from t2i_jax.core.family import BaseFamily
from t2i_jax.core.fields import FREE, Count, Grid, Layers, NotNegative, Positive, Range, Rate, Share, Size
from t2i_jax.core.sharding import shard
from t2i_jax.core.specs import BatchSpec, CodeSpec, SampleSpec
from t2i_jax.core.types import Capabilities, Compute, LossOutput
from t2i_jax.networks.condition import ClassEmbedder, check_vectors, dropped_rows
from t2i_jax.nn.attention import Causal, Rotary, rotary_2d, with_prefix
from t2i_jax.nn.decode import DecodeLinear, prepare_layers_for_decode
from t2i_jax.nn.kernels import Kind
from t2i_jax.nn.layers import Embedding, LayerNorm, RMSNorm, matmul, normal, param, transposed
from t2i_jax.nn.losses import chunked_cross_entropy
from t2i_jax.nn.transformer import Block, Cache, Layer, apply_stack, drop, stack
from t2i_jax.sampling import autoregressive
from t2i_jax.sampling.guidance import is_guided
from t2i_jax.sampling.options import ARSampler
from t2i_jax.sampling.progress import Progress

SIZES: dict[str, dict[str, int]] = {
    "1M": dict(width=128, depth=4, heads=4, mlp=384),
    "5M": dict(width=256, depth=6, heads=4, mlp=704),
    "30M": dict(width=512, depth=9, heads=8, mlp=1408),
    "llamagen-b": dict(width=768, depth=12, heads=12, mlp=2048),  # 0.1 B
    "llamagen-l": dict(width=1024, depth=24, heads=16, mlp=2816),  # 0.3 B
    "llamagen-xl": dict(width=1280, depth=36, heads=20, mlp=3584),  # 0.8 B
    "llamagen-1b": dict(width=2048, depth=22, heads=32, mlp=5632),
    "llamagen-xxl": dict(width=1536, depth=48, heads=24, mlp=4096),  # 1.4 B
    "llamagen-3b": dict(width=3200, depth=24, heads=32, mlp=8704),
    "llamagen-xxxl": dict(width=2560, depth=48, heads=40, mlp=6912),  # 3.9 B
    "llamagen-7b": dict(width=4096, depth=32, heads=32, mlp=11008),
    "20B": dict(width=6144, depth=52, heads=48, kv_heads=8, mlp=16384),  # the size of the largest Parti
}
"""Published and own shapes, by name; parameter counts exclude the condition."""


@dataclasses.dataclass(frozen=True)
class AR(BaseFamily):
    """A causal Transformer over the codes of an image, and its training settings."""

    vocabulary: Size = 1024
    """Number of codes of the codec."""
    grid: Grid = (8, 8)
    """Rows and columns of codes."""
    width: Size = 256
    depth: Layers = 6
    heads: Size = 4
    kv_heads: Count = 0
    """Key and value heads, shared by groups of query heads (Ainslie et al. 2023); 0: as many as `heads`."""
    mlp: Count = 0
    """Hidden width of the MLP; 0: 8/3 of the width, rounded up, with SwiGLU, else 4 times the width."""
    activation: Literal["swiglu", "gelu", "gelu_tanh", "quick_gelu"] = "swiglu"
    norm: Literal["rms", "layer"] = "rms"
    eps: Positive = 1e-5
    """Epsilon of the normalisation."""
    bias: bool = False
    """Use learned biases in attention and MLP."""
    qk_norm: bool = False
    """Normalise queries and keys per head (Dehghani et al. 2023)."""
    condition: Condition = ClassEmbedder(1000)
    """Condition of the image: classes, captions or features; ids of its own vocabulary (`PrefixTokens`); or vectors of
    this model's width, used unchanged (`CrossAttnFeatures`)."""
    conditioning: Literal["prefix", "cross_attention"] = "prefix"
    """Condition tokens precede the image, or every layer cross-attends to them and the image gets a start token: an
    encoder-decoder as in dalle-mini and Parti (Yu et al. 2022, 2.1)."""
    tied: bool = False
    """Use the token table also as the output matrix."""
    zero_output: bool = False
    """Initialise the output matrix to zeros, so that all codes start equally likely."""
    output_bias: bool = False
    bidirectional_prefix: Count = 0
    """Number of leading positions that attend to each other in both directions (`n_unmasked` of Esser et al. 2021)."""
    positions: Literal["rotary", "learned"] = "rotary"
    """Rotate queries and keys by grid position, or add a learned vector at each position of the sequence."""
    num_positions: Count = 0
    """Rows of the learned position table; 0: the sequence length."""
    rotary_base: Positive = 10000.0
    prefix_rotary: Literal["identity", "zero"] = "identity"
    """Leave condition tokens unrotated, or multiply them by zero (as released LlamaGen weights need)."""
    dropout: Rate = 0.1
    """Dropout on the output of each attention and MLP, in training."""
    token_dropout: Rate = 0.1
    """Dropout on the embedded sequence, in training."""
    condition_dropout: Share = 0.1
    """Share of training examples whose condition is replaced by the unconditional one, for guidance; 0: none."""
    corruption: Share = 0.0
    """Maximum share of corrupted input codes. Each training image has a share between 0 and this replaced by random
    codes, so that its first codes do not suffice and the model must read the condition (after `pkeep` of Esser et al.
    2021)."""
    label_smoothing: Annotated[float, Range(low=0, below=1)] = 0.0
    z_loss: NotNegative = 0.0
    """Weight of (log Z)^2."""
    loss_chunk: Annotated[int, FREE] = 0
    """Tokens of each image whose logits are in memory at a time; 0: all, or as many as the budget `nn.losses.HELD`
    allows; below 0: all."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation; parameters, logits and losses are fp32."""
    remat: Annotated[Literal["none", "full", "dots", "branches"], FREE] = "none"
    """Activations that each layer stores for its backward pass."""
    kernel: Kind = "auto"
    """Attention kernel in training: "plain" matmuls, "cudnn" on GPUs, "splash" on TPUs; "auto": by platform."""
    sampling: Annotated[ARSampler, FREE] = ARSampler()
    """Default options of `sample`."""

    def __post_init__(self):
        super().__post_init__()
        if self.conditioning == "cross_attention" or not self.condition.spec.gives_ids:
            check_vectors(self.condition, self.width)
        if self.condition_dropout and not self.condition.spec.has_null:
            raise ValueError("condition_dropout > 0 needs unconditional vectors: trained_null or kept_null")
        places = self.prefix_length + self.length - 1
        if self.positions == "learned" and 0 < self.num_positions < places:
            raise ValueError(
                f"num_positions={self.num_positions} places for {self.prefix_length} tokens before the image and "
                f"{self.length} codes of grid={self.grid}: {places} are needed"
            )

    @classmethod
    def sized(cls, size: str, **fields: Any) -> AR:
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
    def layer(self) -> Layer:
        """One block of the Transformer."""
        return Layer(
            self.width,
            self.heads,
            self.kv_heads,
            hidden=self.mlp,
            norm=self.norm,
            eps=self.eps,
            activation=self.activation,
            bias=self.bias,
            qk_norm=self.qk_norm,
            context=self.width if self.conditioning == "cross_attention" else 0,
            dropout=self.dropout,
            kernel=self.kernel,
        )

    @property
    def prefix_length(self) -> int:
        """Tokens before the image."""
        return 1 if self.conditioning == "cross_attention" else self.condition.length

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
        )

    @property
    def compute(self) -> Compute:
        """Settings of the computation."""
        return Compute(self.dtype, self.remat, self.kernel, self.loss_chunk)

    def with_compute(self, compute: Compute) -> AR:
        """The same model with other settings of the computation."""
        return dataclasses.replace(
            self,
            **self.compute.changes(compute, "dtype", "remat", "loss_chunk", attention="kernel"),
        )

    def sample_spec(self) -> SampleSpec:
        """Shape and dtype of a sample."""
        return SampleSpec(self.grid, CodeSpec("int32", sizes=(self.vocabulary,)))

    def condition_spec(self) -> BatchSpec:
        """Batch fields that `sample` reads; given tokens are codes."""
        spec, last = self.condition.batch_spec(), self.vocabulary - 1
        if not self.condition.spec.gives_ids:
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
        dropped = dropped_rows(keys[0], self.condition_dropout, b, train)
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
            remat=self.remat,
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
        return chunked_cross_entropy(model.logits, z, codes, self.loss_chunk, **options)

    def _embed(self, tokens: Embedding, codes: Array) -> Array:
        return shard(tokens(codes).astype(self.dtype), "batch", "length", None)

    def _prefix(self, model: ARNetwork, batch: Batch, dropped: Array) -> tuple[Array, Array, dict[str, Any]]:
        """The tokens before the image (b, s, d), which of them are real (b, s), and the cross-attention inputs."""
        tokens, valid = model.condition(batch, dropped, self.dtype)
        if self.condition.spec.gives_ids:  # embedded like the image's own codes
            return self._embed(model.tokens, tokens), valid, {}
        if model.start is None:
            return tokens, valid, {}
        start = jnp.broadcast_to(model.start[...].astype(self.dtype), (len(tokens), 1, self.width))
        return start, jnp.ones((len(tokens), 1), bool), {"context": tokens, "context_mask": valid[:, None, None]}

    def _add_positions(self, positions: nnx.Param | None, x: Array, start: Array | int) -> Array:
        """x (b, t, d) plus the learned position vectors from `start` on, if positions are learned."""
        if positions is None:
            return x
        rows = jax.lax.dynamic_slice_in_dim(positions[...], start, x.shape[1])
        return x + shard(rows, None, "embed").astype(x.dtype)

    def _rotary(self, s: int, start: int, stop: int) -> Rotary | None:
        """cos and sin of positions `start` to `stop`: s condition tokens without a grid position, then the grid."""
        if self.positions != "rotary":
            return None
        angles = rotary_2d(self.grid, self.layer.head, self.rotary_base)
        table = with_prefix(jnp.cos(angles), jnp.sin(angles), s, zero=self.prefix_rotary == "zero")
        return table[0][start:stop], table[1][start:stop]

    def visible(self, valid: Array) -> Array:
        """The mask (b or 1, 1, t, t): each position sees itself and the valid (b, t) positions before it."""
        return self._causal(valid, valid.shape[1]).dense(valid.shape[1])

    def _causal(self, valid: Array, s: int) -> Causal:
        """The structured causal mask, with s condition tokens first."""
        padded = self.conditioning == "prefix" and self.condition.spec.has_padding
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
            `condition_dropout` is 0, since no unconditional branch was trained.
        segments: number of steps in which the cache grows; attention reads no more than the current size; static. Each
            segment compiles all layers again, so 0 means 4 for shallow models and fewer for deep ones.
        progress: its listener is called with (tokens so far, all tokens, codes (b, h, w)).
        """
        guided = is_guided(self.capabilities, guided)
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
            output=DecodeLinear(output, model.output_bias, self.dtype, jnp.float32),
            valid=valid,
            context_mask=context_mask,
            rotary=self._rotary(s, s, s + self.length),
            positions=model.positions,
        )
        return model.logits(x[:, -1]), state

    def _embed_prefix(self, model: ARNetwork, condition: Batch, dropped: Array) -> tuple[Array, Any, Any, Array, Any]:
        """Run the tokens before the image through the Transformer: outputs (b, s, d), caches, the layers for decoding,
        real tokens (b, s), and the context mask, if there is a context."""
        prefix, valid, context = self._prefix(model, condition, dropped)
        b, s = valid.shape
        if self.bidirectional_prefix > s:
            raise ValueError(f"bidirectional_prefix {self.bidirectional_prefix}: the condition has {s} tokens only")
        first, following = prepare_layers_for_decode(model.blocks, self.dtype)
        caches = tuple(Cache.empty(self.layer, b, s, self.dtype) for _ in first)
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
        keys = jax.random.split(key, 4)
        self.condition = config.condition.init(keys[0], config.width)
        self.tokens = Embedding(config.vocabulary, config.width, keys[1])
        self.start = (
            param(normal(jax.random.fold_in(key, 4), (config.width,)), "embed")
            if config.conditioning == "cross_attention"
            else None
        )
        rows = config.num_positions or config.prefix_length + config.length - 1
        learned = config.positions == "learned"
        self.positions = param(jnp.zeros((rows, config.width)), None, "embed") if learned else None
        self.blocks = stack(config.layer, config.depth, keys[2])
        # Every layer adds to the residual stream: scaled weights keep its variance near 1 (Radford et al. 2019).
        for branch in (self.blocks.attention, self.blocks.mlp):
            branch.out.w = param(branch.out.w[...] / math.sqrt(2 * config.depth), *branch.out.w.axes)
        self.norm = config.layer.normalise()
        output = normal(keys[3], (config.width, config.vocabulary), 0.0 if config.zero_output else 0.02)
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
