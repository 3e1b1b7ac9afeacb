"""Next-token prediction of image tokens: p(x | c) = prod_i p(x_i | x_<i, c).

Parti (Yu et al. 2022) and LlamaGen (Sun et al. 2024): the codes of an image in raster order, behind the tokens of a
condition, in one causal Transformer. The sequence is [condition (s tokens)][x_0 .. x_{L-1}]; the logits of x_i come out
where x_{i-1} goes in, those of x_0 at the last condition token.
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

from t2i_jax.core.fields import FREE, Checked, Count, Grid, Layers, NotNegative, Positive, Range, Rate, Share, Size
from t2i_jax.core.specs import WEIGHT, BatchSpec, CodeSpec, SampleSpec
from t2i_jax.core.types import Batch, Capabilities, Compute, Condition, LossOutput, Objective, single_objective
from t2i_jax.nn.attention import Causal, Rotary, rotary_2d, with_prefix
from t2i_jax.nn.condition import ClassEmbedder, check_vectors, dropped_rows
from t2i_jax.nn.decode import DecodeLinear, prepare_layers_for_decode
from t2i_jax.nn.kernels import Kind
from t2i_jax.nn.layers import Embedding, LayerNorm, RMSNorm, matmul, normal, param, transposed
from t2i_jax.nn.losses import chunked_cross_entropy
from t2i_jax.nn.transformer import Block, Cache, Layer, apply_stack, drop, stack
from t2i_jax.parallel import shard
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
"""Published and own shapes, by name; parameters without the condition's."""


@dataclasses.dataclass(frozen=True)
class AR(Checked):
    """A causal Transformer over the codes of an image, and how it is trained."""

    vocabulary: Size = 1024
    """Codes of the codec."""
    grid: Grid = (8, 8)
    """Rows and columns of codes."""
    width: Size = 256
    depth: Layers = 6
    heads: Size = 4
    kv_heads: Count = 0
    """Heads of keys and values, shared by groups of query heads (Ainslie et al. 2023); 0 is as many as heads."""
    mlp: Count = 0
    """Inner width of the MLP; 0 is 8/3 of the width, rounded up, with SwiGLU, and 4 times the width else."""
    activation: Literal["swiglu", "gelu", "gelu_tanh", "quick_gelu"] = "swiglu"
    norm: Literal["rms", "layer"] = "rms"
    eps: Positive = 1e-5
    """What keeps the normalisation from dividing by zero."""
    bias: bool = False
    """Add learned biases in attention and MLP."""
    qk_norm: bool = False
    """Normalise queries and keys per head (Dehghani et al. 2023)."""
    condition: Condition = ClassEmbedder(1000)
    """What comes before the image: classes, captions or features; ids of its own vocabulary (`PrefixTokens`); or
    vectors of this model's width as they are (`CrossAttnFeatures`)."""
    conditioning: Literal["prefix", "cross_attention"] = "prefix"
    """The tokens of the condition stand before the image, or every layer looks at them by cross-attention and the image
    has a start token before it: an encoder and a decoder, as dalle-mini and Parti are (Yu et al. 2022, 2.1)."""
    tied: bool = False
    """Use the token table as the output matrix too."""
    zero_output: bool = False
    """Start with an output matrix of zeros, that is with equal probabilities."""
    output_bias: bool = False
    bidirectional_prefix: Count = 0
    """So many positions at the start see each other both ways (`n_unmasked` of Esser et al. 2021)."""
    positions: Literal["rotary", "learned"] = "rotary"
    """Queries and keys turn with the place on the grid, or a learned vector is added at each place of the sequence."""
    num_positions: Count = 0
    """Rows of the learned table; 0 is as many as the sequence has."""
    rotary_base: Positive = 10000.0
    prefix_rotary: Literal["identity", "zero"] = "identity"
    """Condition tokens are not turned, or (what released LlamaGen weights need) multiplied by zero."""
    dropout: Rate = 0.1
    """Of what each attention and MLP adds, in training."""
    token_dropout: Rate = 0.1
    """Of the embedded sequence, in training."""
    condition_dropout: Share = 0.1
    """Share of training examples whose condition becomes the unconditional one, for guidance; 0: there is none."""
    corruption: Share = 0.0
    """Each training image gets a share between 0 and this of its input codes replaced by random ones, so that it cannot
    be told from its first codes alone and the condition has to be read (after `pkeep` of Esser et al. 2021)."""
    label_smoothing: Annotated[float, Range(low=0, below=1)] = 0.0
    z_loss: NotNegative = 0.0
    """Weight of (log Z)^2."""
    loss_chunk: Annotated[int, FREE] = 0
    """Tokens of each image whose logits are held at a time; 0: all, or as many as memory is kept for
    (`nn.losses.HELD`); below 0: all."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters, logits and losses are fp32."""
    remat: Annotated[Literal["none", "full", "dots", "branches"], FREE] = "none"
    """What each layer keeps for its backward pass."""
    kernel: Kind = "auto"
    """What computes attention in training: "plain" products, "cudnn" on GPUs, "splash" on TPUs; by the platform."""
    sampling: Annotated[ARSampler, FREE] = ARSampler()
    """How `sample` draws unless told otherwise."""

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
        """The configuration of a line of SIZES, with other fields as given. Raises ValueError for an unknown name."""
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
        """What it offers besides being trained."""
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
        """How it is computed."""
        return Compute(self.dtype, self.remat, self.kernel, self.loss_chunk)

    def with_compute(self, compute: Compute) -> AR:
        """The same model, computed in another way."""
        return dataclasses.replace(
            self,
            **self.compute.changes(compute, "dtype", "remat", "loss_chunk", attention="kernel"),
        )

    def sample_spec(self) -> SampleSpec:
        """What it samples."""
        return SampleSpec(self.grid, CodeSpec("int32", sizes=(self.vocabulary,)))

    def condition_spec(self) -> BatchSpec:
        """What `sample` reads; given tokens are codes."""
        spec, last = self.condition.batch_spec(), self.vocabulary - 1
        if not self.condition.spec.gives_ids:
            return spec
        return {name: dataclasses.replace(field, high=last) for name, field in spec.items()}

    def batch_spec(self) -> BatchSpec:
        """What a batch has to hold."""
        return {"codes": self.sample_spec().field, **self.condition_spec(), "weight": WEIGHT}

    def options(self) -> ARSampler:
        """How `sample` draws unless told otherwise."""
        return self.sampling

    def check(self, options: ARSampler) -> None:
        """Errors: none; what options may be, each of them says itself."""

    def loop_trips(self, options: ARSampler) -> int:
        """1: every loop of the sampler is of a known length."""
        return 1

    def init(self, key: Array) -> ARNetwork:
        """A model with fresh parameters."""
        return ARNetwork(self, key)

    # -- training

    def objectives(self) -> dict[str, Objective]:
        return single_objective(self.loss)

    def loss(self, model: ARNetwork, batch: Batch, key: Array, train: bool = True) -> LossOutput:
        """Mean cross-entropy of the codes, -1/L sum_i log p(x_i | x_<i, c), and metrics.

        batch: `codes` int (b, h, w), what the condition reads, and if present `weight` (b,), 0 for examples to ignore.
        train: False leaves out dropout, dropped conditions, corruption, smoothing and the z-loss; static.
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
        """Logits (b, L, v) fp32 of every code given those before it; `dropped` bool (b,) marks unconditional rows."""
        dropped = jnp.zeros(batch["codes"].shape[0], bool) if dropped is None else dropped
        return model.logits(self._features(model, batch, dropped))

    def _features(self, model: ARNetwork, batch: Batch, dropped: Array, key: Array | None = None) -> Array:
        """What comes out of the Transformer where logits are read: (b, L, d)."""
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
        """Codes (b, L) with some of them replaced, as `corruption` says; themselves without a key."""
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
        """The tokens before the image (b, s, d), which of them are real (b, s), and what cross-attention looks at."""
        tokens, valid = model.condition(batch, dropped, self.dtype)
        if self.condition.spec.gives_ids:  # which are read as the image's own are
            return self._embed(model.tokens, tokens), valid, {}
        if model.start is None:
            return tokens, valid, {}
        start = jnp.broadcast_to(model.start[...].astype(self.dtype), (len(tokens), 1, self.width))
        return start, jnp.ones((len(tokens), 1), bool), {"context": tokens, "context_mask": valid[:, None, None]}

    def _add_positions(self, positions: nnx.Param | None, x: Array, start: Array | int) -> Array:
        """x (b, t, d) with the learned vectors of the places from `start` on added, where there are such."""
        if positions is None:
            return x
        rows = jax.lax.dynamic_slice_in_dim(positions[...], start, x.shape[1])
        return x + shard(rows, None, "embed").astype(x.dtype)

    def _rotary(self, s: int, start: int, stop: int) -> Rotary | None:
        """cos and sin of places `start` to `stop`: a grid behind s condition tokens, which stand nowhere on it."""
        if self.positions != "rotary":
            return None
        angles = rotary_2d(self.grid, self.layer.head, self.rotary_base)
        table = with_prefix(jnp.cos(angles), jnp.sin(angles), s, zero=self.prefix_rotary == "zero")
        return table[0][start:stop], table[1][start:stop]

    def visible(self, valid: Array) -> Array:
        """The mask (b or 1, 1, t, t): places up to one's own that are valid (b, t), and always oneself."""
        return self._causal(valid, valid.shape[1]).dense(valid.shape[1])

    def _causal(self, valid: Array, s: int) -> Causal:
        """That mask in words, behind s tokens of the condition."""
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

        An image depends on its own key and condition only, not on the batch it is in. Guidance runs both branches as
        one batch of 2b. All options are traced: new values do not compile anew.

        known, keep: codes (b, h, w), and a bool (b, h, w) of those that are taken over from them, to complete an image;
            they are the first ones in raster order.
        guided: False leaves the unconditional branch out, whatever the options say; half the work. None leaves it out
            where `condition_dropout` is 0, that is where no unconditional branch was learned.
        segments: the cache grows in so many steps, and attention reads no more than it holds; static. Each compiles
            all layers again, so 0 takes 4 for shallow models and fewer for deep ones.
        progress: called as (tokens so far, all tokens, codes (b, h, w)); static.
        """
        guided = is_guided(self.capabilities, guided)
        return autoregressive.sample(self, model, condition, keys, options, known, keep, guided, segments, progress)

    def prefix_logits(self, model: ARNetwork, condition: Batch, dropped: Array) -> Array:
        """Logits (b, s, v) at every token of the condition; the last are those of token 0."""
        return model.logits(self._embed_prefix(model, condition, dropped)[0])

    def prefill(self, model: ARNetwork, condition: Batch, dropped: Array) -> tuple[Array, ARDecodeState]:
        """Read the condition: the logits (b, v) of token 0, and the state from which `decode` goes on."""
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
        """What stands before the image through the Transformer: vectors (b, s, d), caches, the layers that decode, real
        tokens (b, s), and where to look at the context, if there is one."""
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
        """Put in token i, int (b,): the logits (b, v) of token i + 1. The caches must have room for it."""
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
    """An image under way."""

    caches: tuple[Cache, ...]
    tokens: Embedding
    blocks: tuple[Block, ...]
    """One by one, in the form that decodes fastest."""
    norm: RMSNorm | LayerNorm
    output: DecodeLinear
    valid: Array
    """Which tokens before the image are real (b, s)."""
    context_mask: Array | None
    """Where cross-attention looks (b, 1, 1, s')."""
    rotary: Rotary | None
    """Of the image's tokens (L, h / 2)."""
    positions: nnx.Param | None
    """Of the whole sequence, where they are learned."""

    def grow(self, count: int) -> ARDecodeState:
        """Room for `count` tokens of the image."""
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
        # Every layer adds to the same stream: smaller steps keep its variance near 1 (Radford et al. 2019).
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
    """valid (b, s) and then True, up to (b, length): of the condition some tokens are padding, of the image none."""
    return jnp.pad(valid, ((0, 0), (0, length - valid.shape[1])), constant_values=True)
