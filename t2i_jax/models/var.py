"""Next-scale prediction: the codes of a scale are drawn together, given those of all smaller scales (Tian et al. 2024).

VAR (arXiv:2404.02905): p(r_1 .. r_K | c) = prod_k p(r_k | r_<k, c) of the maps of codes r_k of a multi-scale codec
(`codecs.multiscale`). The input of scale k + 1 is the image so far: the sum of the vectors of the scales before,
averaged to the positions of that scale. Positions see their own scale and all before it. The condition modulates every
block; the tokens of a caption may also be read by cross-attention, as in Infinity (Han et al. 2024, arXiv:2412.04431).
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from t2i_jax.codecs.multiscale import MultiScaleConfig, MultiScaleQuantizer
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.core.arrays import Bool, Float, typed
from t2i_jax.core.conditions import Batch
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import BaseFamily
from t2i_jax.core.fields import FREE, Range, Rate
from t2i_jax.core.params import abstract, is_variable, named, rebuild
from t2i_jax.core.sharding import shard
from t2i_jax.core.specs import BatchSpec, CodeSpec, SampleSpec
from t2i_jax.core.types import Capabilities, Codec, Compute, LossOutput
from t2i_jax.networks.condition import ClassEmbedder, Conditioning, check_vectors, dropped_rows, read_context
from t2i_jax.networks.dit import DiTBlock, ModulatedBlock
from t2i_jax.nn.layers import Linear, ModelState, normal, param, position_table
from t2i_jax.nn.losses import chunked_cross_entropy, row_mean
from t2i_jax.nn.modulation import modulate
from t2i_jax.nn.transformer import REMAT, REMATS, Cache, Transformer
from t2i_jax.sampling.guidance import Branches, guide, is_guided
from t2i_jax.sampling.options import ScaleSampler
from t2i_jax.sampling.progress import Progress, report
from t2i_jax.sampling.tokens import filter_logits, sample_token, uniforms


@dataclasses.dataclass(frozen=True)
class VAR(BaseFamily[ScaleSampler]):
    """A Transformer over the scales of an image, and its training settings. The defaults are VAR-d16 for ImageNet."""

    quantizer: MultiScaleConfig = MultiScaleConfig()
    """That of the codec, a `VQGAN`. The model holds a copy of its vectors, which is not trained."""
    transformer: Transformer = Transformer(
        1024,
        16,
        16,
        norm="layer",
        eps=1e-6,
        activation="gelu_tanh",
        bias=True,
        key_bias=False,
        cosine=True,
    )
    conditioning: Conditioning = Conditioning(ClassEmbedder(1000))
    """The pooled condition modulates every block (via "modulation", the default). With "cross_attention" every block
    reads its tokens, too."""
    shared: bool = False
    """One matrix computes the shifts, scales and gates of all blocks, and each block adds a learned table; else each
    block has a matrix."""
    drop_path: Rate = 0.0
    """Probability with which an example goes on without a branch of the last block, in training; it falls to 0 at the
    first one (Huang et al. 2016, stochastic depth). VAR has 0.1 depth / 24."""
    label_smoothing: Annotated[float, Range(low=0, below=1)] = 0.0
    compute: Compute = Compute()
    sampling: Annotated[ScaleSampler, FREE] = ScaleSampler()
    """Default options of `sample`."""

    def __post_init__(self):
        super().__post_init__()
        self.transformer.check_plain("VAR", "post_norm", "rope_values", "sandwich_norm", "layer_scale", "pb_relax")
        check_vectors(self.conditioning.what, self.transformer.width)
        if self.conditioning.dropout and not self.conditioning.what.spec.has_null:
            raise ValueError("conditioning.dropout > 0 needs unconditional vectors: trained_null or kept_null")
        _ = self.block
        if self.quantizer != self.quantizer.vectors_alone:
            raise ConfigError(
                "quantizer: settings of its training are those of the codec; `vectors_alone` leaves them out"
            )

    @property
    def block(self) -> ModulatedBlock:
        """Shape and kind of a block."""
        via = self.conditioning.route("VAR", "modulation", "cross_attention")
        return ModulatedBlock(self.transformer, via, self.shared, attention=self.compute.attention)

    @property
    def vocabulary(self) -> int:
        """Number of codes of the codec."""
        return self.quantizer.codes

    @property
    def scales(self) -> tuple[int, ...]:
        """Sides of the maps of codes."""
        return self.quantizer.scales

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        return Capabilities(
            family=True,
            unconditional=self.conditioning.dropout > 0,
            guidance=True,
            likelihood=True,
            reads_codec=True,
            remat=REMATS,
            loss_chunk=True,
        )

    def sample_spec(self) -> SampleSpec:
        """Shape and dtype of a sample: the codes of all scales, (L,)."""
        side = self.quantizer.side
        return SampleSpec((side, side), CodeSpec("int32", sizes=(self.vocabulary,)), scales=self.scales)

    def condition_spec(self) -> BatchSpec:
        """Batch fields that `sample` reads."""
        return self.conditioning.what.batch_spec()

    def init(self, key: Array) -> VARNetwork:
        """A model with fresh parameters, and random vectors in place of those of a codec."""
        return VARNetwork(self, key)

    def with_codec(self, model: VARNetwork, codec: Codec, weights: nnx.Module) -> VARNetwork:
        """The model with the vectors of a codec. Errors: `ConfigError` for a codec with another quantiser."""
        theirs = codec.quantizer if isinstance(codec, VQGAN) else None
        if not isinstance(theirs, MultiScaleConfig) or theirs.vectors_alone != self.quantizer:
            raise ConfigError(
                f"the codec has {theirs or 'no codes of several scales'}; the model reads {self.quantizer}"
            )
        found = {name.removeprefix("autoencoder.quantizer."): v for name, v in named(weights).items()}
        empty = abstract(self.quantizer)
        wide = {name: v.replace(found[name][...].astype(v.dtype)) for name, v in named(empty).items()}
        return model.with_vectors(rebuild(empty, wide))

    # -- training

    def loss(self, model: VARNetwork, batch: Batch, key: Array, train: bool = True) -> LossOutput:
        """Mean cross-entropy of the codes of all scales, and metrics.

        batch: `codes` int (b, L), the condition's fields, and optionally `weight` (b,), 0 for examples to ignore.
        train: False turns off dropout, dropped branches and conditions, and smoothing; static.
        """
        keys = jax.random.split(key)
        dropped = dropped_rows(keys[0], self.conditioning.dropout, len(batch["codes"]), train)
        z = model(batch, dropped, keys[1] if train else None)
        smoothing = self.label_smoothing if train else 0.0
        scores = self._score(model, z, batch, label_smoothing=smoothing)
        loss, nll, correct = (row_mean(x.mean(-1), batch) for x in scores)
        return LossOutput(loss, {"loss": loss, "bits_per_token": nll / math.log(2), "accuracy": correct})

    @typed
    def log_likelihood(self, model: VARNetwork, batch: Batch) -> Float[Array, " b"]:
        """log p(codes | condition) of each image in nats: (b,) fp32."""
        return -self._score(model, model(batch), batch)[1].sum(-1)

    def _score(self, model: VARNetwork, z: Array, batch: Batch, **options: float) -> tuple[Array, ...]:
        return chunked_cross_entropy(model.logits, z, batch["codes"], self.compute.loss_chunk, **options)

    # -- sampling

    def sample(
        self,
        model: VARNetwork,
        condition: Batch,
        keys: Array,
        options: ScaleSampler | None = None,
        *,
        guided: bool | None = None,
        noise: Array | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Codes int32 (b, L), one image per row of the condition and per key of `keys` (b,).

        An image depends only on its own key and condition, not on its batch. Guidance runs both branches as one batch
        of 2b. All options are traced: new values do not recompile.

        guided: False skips the unconditional branch, whatever the options say, which halves the cost. None skips it if
            training drops no conditions, since no unconditional branch was trained.
        noise: Gumbel noise (b, L, v) that draws the codes, in place of the numbers of `keys`.
        progress: its listener is called with (scales so far, all scales, codes (b, L)), in which scales to come add as
            little as a code can.
        """
        options, guided = (options or self.options()).arrays(), is_guided(self.capabilities, guided)
        return _sample(self, model, condition, keys, options, noise, guided, progress)


@partial(jax.jit, static_argnames=("config", "guided"))
def _sample(
    config: VAR,
    model: VARNetwork,
    condition: Batch,
    keys: Array,
    options: ScaleSampler,
    noise: Array | None,
    guided: bool,
    progress: Progress | None,
) -> Array:
    b, both, quantizer, ends = len(keys), Branches(guided), model.quantizer, config.quantizer.ends
    uniform = uniforms(keys, jnp.arange(ends[-1])).T
    read = model.read(both.rows(condition), both.dropped(b))
    total = jnp.zeros((b, config.quantizer.side, config.quantizer.side, config.quantizer.dim))
    codes = jnp.broadcast_to(quantizer.smallest(), (b, ends[-1]))
    caches, start = model.caches(both.count * b), 0
    for n, (end, p) in enumerate(zip(ends, config.scales, strict=True)):
        x = model.enter(n, read, both.rows(quantizer.means(total, n)) if n else None)
        z, caches = model.step(x, read, caches, end)
        logits = guide(*both.split(shard(model.logits(z), "batch", None, None)), options.guidance_at(n, len(ends)))
        if noise is None:
            drawn = sample_token(logits, options, uniform[:, start:end])
        else:
            weights = filter_logits(logits, options.temperature, options.top_k, options.top_p)
            drawn = jnp.argmax(jnp.log(weights) + noise[:, start:end], -1).astype(jnp.int32)
        codes = codes.at[:, start:end].set(drawn)
        total = total + quantizer.added(drawn.reshape(b, p, p), n)
        report(progress, jnp.int32(n + 1), len(ends), codes)
        start = end
    return codes


class Read(NamedTuple):
    """What the network reads of a condition."""

    pooled: Array
    """(b, d)"""
    modulation: Array
    """(b, d), or (b, 6 d) where blocks share a matrix"""
    tokens: Array
    """(b, s, d)"""
    mask: Array
    """(b, s): which tokens may be read"""


class VARNetwork(nnx.Module):
    """The Transformer of a `VAR`, from the vectors of its codec to the logits of codes."""

    def __init__(self, config: VAR, key: Array):
        keys, d, quantizer = jax.random.split(key, 10), config.transformer.width, config.quantizer
        self.config = config
        self.condition = config.conditioning.what.init(keys[0], d)
        self.vectors: MultiScaleQuantizer | None = _untrained(quantizer.init(keys[1]))
        self.embed = Linear(quantizer.dim, d, keys[2], std=None, axes=(None, "embed"))
        maps = [(n, n) for n in quantizer.scales]
        self.start = position_table(normal(keys[3], (quantizer.ends[0], d)), maps[0])
        self.positions = position_table(normal(keys[4], (quantizer.ends[-1], d)), *maps)
        self.levels = param(normal(keys[5], (len(quantizer.scales), d)), None, "embed")
        self.blocks = config.block.stack(keys[6])
        self.shared = Linear(d, 6 * d, keys[7]) if config.shared else None
        self.norm = config.transformer.normalise(affine=False)
        self.modulation = Linear(d, 2 * d, keys[8], std=0.0)
        self.output = Linear(d, quantizer.codes, keys[9], axes=("embed", "vocab"))

    @property
    def quantizer(self) -> MultiScaleQuantizer:
        """The vectors of the codec. Errors: `ConfigError` for a model that was converted without them."""
        if self.vectors is None:
            raise ConfigError(
                "this VAR has no vectors of a codec, which its file does not hold: convert it with --codec"
            )
        return self.vectors

    def with_vectors(self, vectors: MultiScaleQuantizer | None) -> VARNetwork:
        """The same with these vectors, which are not trained, or without any."""
        copy = jax.tree.map(lambda leaf: leaf, self)
        copy.vectors = None if vectors is None else _untrained(vectors)
        return copy

    @typed
    def __call__(
        self, batch: Batch, dropped: Bool[Array, " b"] | None = None, key: Array | None = None
    ) -> Float[Array, "b t d"]:
        """z (b, L, d) of each code given the scales before it; `logits` turns it into the code's distribution.

        batch: `codes` int (b, L), and the condition's fields. dropped: bool (b,), rows without their condition. key:
        for dropout.
        """
        codes = batch["codes"]
        read = self.read(batch, jnp.zeros(len(codes), bool) if dropped is None else dropped)
        inputs = jax.lax.stop_gradient(self.quantizer.inputs(codes))
        x = jnp.concatenate([self._first(read), self._embedded(inputs, self.config.quantizer.ends[0])], 1)
        levels = np.repeat(np.arange(len(self.config.scales)), np.square(self.config.scales))
        mask = jnp.asarray(levels[:, None] >= levels)[None, None]

        def run(block: DiTBlock, x: Array, key: Array | None, skip: Array | None) -> Array:
            return block(x, read.tokens, read.modulation, read.mask, mask, key=key, skip=skip)[0]

        config, depth = self.config, self.config.transformer.depth
        if config.compute.remat != "none":
            run = jax.checkpoint(run, policy=REMAT[config.compute.remat], prevent_cse=False)
        keys = None if key is None else jax.random.split(key, depth)
        skips = jnp.linspace(0, config.drop_path, depth) if config.drop_path and key is not None else None
        layers = self.blocks, keys, skips
        x, _ = jax.lax.scan(
            lambda x, layer: (run(layer[0], x, *layer[1:]), None), shard(x, "batch", "length", None), layers
        )
        return self._finish(x, read)

    @typed
    def logits(self, z: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """(..., d) -> (..., v) fp32."""
        return self.output(z).astype(jnp.float32)

    @typed
    def read(self, batch: Batch, dropped: Bool[Array, " b"]) -> Read:
        """The condition of a batch; dropped: bool (b,), rows that get the unconditional one."""
        config, dtype = self.config, self.config.compute.dtype
        found = read_context(config.conditioning.what, self.condition, batch, dropped, dtype)
        c = found.pooled.astype(dtype)
        modulation = c if self.shared is None else self.shared(jax.nn.silu(c))
        return Read(c, modulation, found.tokens.astype(dtype), found.mask)

    def enter(self, scale: int, read: Read, means: Array | None) -> Array:
        """Input (b, p^2, d) of a scale: of the means (b, p^2, k) of the vectors before it; none for the first."""
        return self._first(read) if means is None else self._embedded(means, self.config.quantizer.ends[scale - 1])

    def caches(self, b: int) -> Cache:
        """Empty caches of all layers, with a leading layer axis."""
        config = self.config
        empty = Cache.empty(config.transformer, b, 0, config.compute.dtype)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (config.transformer.depth, *x.shape)), empty)

    def step(self, x: Array, read: Read, caches: Cache, end: int) -> tuple[Array, Cache]:
        """z (b, p^2, d) of the scale whose input is x, after those of the caches: `end` codes in all."""

        def run(x: Array, layer: tuple[DiTBlock, Cache]) -> tuple[Array, Cache | None]:
            x, _, cache = layer[0](x, read.tokens, read.modulation, read.mask, cache=layer[1])
            return x, cache

        room = jax.vmap(lambda cache: cache.grow(end))(caches)
        z, after = jax.lax.scan(run, shard(x, "batch", "length", None), (self.blocks, room))
        return self._finish(z, read), after._replace(at=after.at + x.shape[1])

    def _first(self, read: Read) -> Array:
        """Input (b, p^2, d) of the first scale."""
        own = (self.start[...] + self._places(0, len(self.start[...]))).astype(read.pooled.dtype)
        return read.pooled[:, None] + own

    def _embedded(self, means: Array, start: int) -> Array:
        """Input (b, t, d) of the codes from `start` on."""
        dtype = self.config.compute.dtype
        return self.embed(means.astype(dtype)) + self._places(start, means.shape[1]).astype(dtype)

    def _places(self, start: int, count: int) -> Array:
        """What the places and scales of `count` codes from `start` on add, (t, d)."""
        levels = np.repeat(np.arange(len(self.config.scales)), np.square(self.config.scales))[start : start + count]
        return self.positions[...][start : start + count] + self.levels[...][levels]

    def _finish(self, x: Array, read: Read) -> Array:
        """Input of the output matrix."""
        shift, scale = jnp.split(self.modulation(jax.nn.silu(read.pooled)), 2, -1)
        return modulate(self.norm(x), shift, scale)


def _untrained(quantizer: MultiScaleQuantizer) -> MultiScaleQuantizer:
    """The same with state in place of parameters."""
    state = lambda v: ModelState(v[...], axes=v.get_metadata().get("axes", (None,) * v.ndim))
    return jax.tree.map(lambda v: state(v) if is_variable(v) else v, quantizer, is_leaf=is_variable)
