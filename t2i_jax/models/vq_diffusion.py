"""Discrete diffusion over image codes: p(x_0 | x_t, t, c) by a Transformer that sees all positions at once.

VQ-Diffusion (Gu et al. 2022, arXiv:2111.14822) and its improvements (Tang et al. 2022, arXiv:2205.16007): codes are
masked and replaced over T steps (`noise/discrete.py`); the network predicts the clean codes, which gives the reverse
step (eq. 11); it is trained on the variational bound. With `Chain(kind="mask")` and `objective="continuous"` it is the
absorbing diffusion of MDLM (Sahoo et al. 2024), whose loss is a weighted mean cross-entropy of masked tokens, that is
masked generation: `noise/discrete.py` shows the equivalence.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Float, Int, typed
from t2i_jax.core.conditions import Batch
from t2i_jax.core.family import BaseFamily
from t2i_jax.core.fields import FREE, Grid, NotNegative
from t2i_jax.core.sharding import shard
from t2i_jax.core.specs import BatchSpec, CodeSpec, SampleSpec
from t2i_jax.core.types import Capabilities, Compute, LossOutput
from t2i_jax.networks.adaln_transformer import AdaLN, apply_blocks, stack_blocks
from t2i_jax.networks.condition import ClassEmbedder, Conditioning, check_vectors, dropped_rows, ids
from t2i_jax.nn.layers import Embedding, Linear, ModelState, normal, position_table, replace
from t2i_jax.nn.losses import chunked_cross_entropy, in_chunks, row_mean, row_weights
from t2i_jax.nn.positions import AxialPositions, RotaryPositions
from t2i_jax.nn.transformer import REMATS, Transformer
from t2i_jax.noise.categorical import inverse_cdf, uniform
from t2i_jax.noise.discrete import LOWEST, Chain, clipped, importance, masked_share
from t2i_jax.noise.schedule import spread
from t2i_jax.sampling.discrete import reverse
from t2i_jax.sampling.guidance import Branches, guide, is_guided
from t2i_jax.sampling.inpainting import known_and_keep
from t2i_jax.sampling.options import DiscreteSampler
from t2i_jax.sampling.progress import Progress, report
from t2i_jax.sampling.tokens import filter_logits


@dataclasses.dataclass(frozen=True)
class VQDiffusion(BaseFamily[DiscreteSampler]):
    """A denoiser of codes, and its training settings."""

    chain: Chain = Chain(1024)
    """Noise process, and the number of codes."""
    grid: Grid = (8, 8)
    """Rows and columns of codes."""
    transformer: Transformer = Transformer(256, 6, 4, norm="layer", activation="quick_gelu", bias=True)
    conv_mlp: bool = False
    """Use 3x3 convolutions over the grid in place of the MLP's matrices."""
    conditioning: Conditioning = Conditioning(ClassEmbedder(1000))
    """Captions and features enter by cross-attention, classes by the norm before the MLP; `ClassEmbedder(0)` means no
    condition."""
    mean_null: bool = False
    """Use the mean of all class embeddings as the unconditional one, not a row of its own: for models that never
    learned one."""
    class_norm: Literal["layer", "instance"] = "layer"
    times: Literal["learned", "sinusoidal", "none"] = "learned"
    """Time input of the norms: a learned table, a sinusoidal embedding, or none."""
    positions: AxialPositions | RotaryPositions = AxialPositions()
    objective: Literal["bound", "continuous"] = "bound"
    """The chain's bound with its auxiliary loss, or the continuous-time bound of the absorbing chain."""
    aux_loss_weight: NotNegative = 5e-4
    """Weight of -log p(x_0 | x_t) added to the bound (eq. 12)."""
    adaptive: bool = True
    """Let the auxiliary weight fall linearly with t, from twice its value to once."""
    mask_weight: tuple[float, float] = (1.0, 1.0)
    """Loss weights of masked tokens and of the others."""
    importance: bool = True
    """Sample times in proportion to their loss, once every time was seen more than ten times; else uniformly."""
    compute: Compute = Compute()
    sampling: Annotated[DiscreteSampler, FREE] = DiscreteSampler()
    """Default options of `sample`."""

    def __post_init__(self):
        super().__post_init__()
        self.transformer.check_plain(
            "VQDiffusion", "post_norm", "rope_values", "sandwich_norm", "layer_scale", "pb_relax"
        )
        self.conditioning.route("VQDiffusion", "default")
        check_vectors(self.conditioning.what)
        if self.objective == "continuous" and self.chain.kind != "mask":
            raise ValueError(f"objective 'continuous' is that of Chain(kind='mask'), not of {self.chain.kind!r}")

    @property
    def vocabulary(self) -> int:
        """Number of codes of the codec."""
        return self.chain.codes

    @property
    def rows(self) -> int:
        """Rows of the class table."""
        count = self.conditioning.what.spec.classes or 0
        return count + (not self.mean_null) if count else 0

    @property
    def by_tokens(self) -> bool:
        """Whether blocks cross-attend to condition tokens; a class enters by their norms."""
        return self.conditioning.what.spec.classes is None

    @property
    def block(self) -> AdaLN:
        """One block of the Transformer."""
        return AdaLN(
            self.transformer,
            1 if self.times == "none" else self.chain.steps,
            sinusoidal=self.times == "sinusoidal",
            context=self.conditioning.what.token_width(self.transformer.width) if self.by_tokens else 0,
            classes=self.rows,
            class_norm=self.class_norm,
            grid=self.grid if self.conv_mlp else None,
            attention=self.compute.attention,
        )

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        return Capabilities(
            family=True,
            unconditional=self.conditioning.dropout > 0,
            guidance=True,
            likelihood=True,
            inpaint=True,
            super_resolution=self.reads_low_codes,
            remat=REMATS,
            attention=True,
            loss_chunk=True,
        )

    def sample_spec(self) -> SampleSpec:
        """Shape and dtype of a sample."""
        return SampleSpec(self.grid, CodeSpec("int32", sizes=(self.vocabulary,)))

    def condition_spec(self) -> BatchSpec:
        """Batch fields that `sample` reads."""
        return self.conditioning.what.batch_spec()

    def loop_trips(self, options: DiscreteSampler) -> int:
        """Number of network evaluations."""
        stride = int(options.stride)
        return -(-(self.chain.steps - 1) // stride) + 1 if stride else int(options.steps) or self.chain.steps

    def init(self, key: Array) -> VQDiffusionNetwork:
        """A model with fresh parameters."""
        return VQDiffusionNetwork(self, key)

    # -- training

    def loss(self, model: VQDiffusionNetwork, batch: Batch, key: Array, train: bool = True) -> LossOutput:
        """The variational bound per token (eq. 6) plus the auxiliary loss, over p(t); metrics, and the model with the
        updated loss history.

        batch: `codes` int (b, h, w), the condition's fields, and optionally `weight` (b,), 0 for examples to ignore.
        train: False turns off dropout and dropped conditions, and spaces the times evenly; static.
        """
        x0 = rearrange(batch["codes"], "b h w -> b (h w)")
        b, keys = x0.shape[0], jax.random.split(key, 4)
        conditioning = model.read(batch, dropped_rows(keys[0], self.conditioning.dropout, b, train))
        drop = keys[3] if train else None
        if self.objective == "continuous":
            terms = self.continuous(model, conditioning, x0, keys[1], drop, train)
        else:
            t, p = self.sample_times(model, b, keys[1], train)
            x_t = self.chain.q_sample(x0, t, keys[2])
            terms = self.bound(model, conditioning, x0, x_t, t, p, drop)
            if self.importance and train:
                model = self.remembered(model, t, jax.lax.stop_gradient(terms.size), row_weights(batch, b) > 0)
        loss, bits, correct = (row_mean(x, batch) for x in (terms.loss, terms.bits, terms.correct))
        metrics = {"loss": loss / self.length, "bits_per_token": bits / self.length, "accuracy": correct}
        return LossOutput(metrics["loss"], metrics, model)

    def bound(
        self,
        model: VQDiffusionNetwork,
        conditioning: BlockConditioning,
        x0: Array,
        x_t: Array,
        t: Array,
        p: Array,
        key: Array | None = None,
    ) -> DiscreteLossTerms:
        """The loss of codes x0, noised to x_t (b, l), at times t (b,) that were sampled with probability p (b,)."""

        @jax.checkpoint  # else several distributions (b, l, K + 1) are stored
        def score(logits: Array, x0: Array, x_t: Array) -> tuple[Array, Array, Array]:
            log_x0 = _with_mask(jax.nn.log_softmax(logits))
            size, decoded = self.chain.variational(log_x0, x0, x_t, t)
            guess = -jnp.take_along_axis(log_x0, x0[..., None], -1)[..., 0]
            return size, jnp.where((t == 0)[:, None], decoded, guess), jnp.argmax(logits, -1) == x0

        z = model(x_t, t, conditioning, key)
        size, guess, correct = in_chunks(model.logits, score, z, (x0, x_t), self.compute.loss_chunk)
        weight = jnp.where(x_t == self.chain.codes, *self.mask_weight)
        weight = jnp.where((t == 0)[:, None], 1.0, weight)
        size, guess = jnp.sum(size * weight, -1), jnp.sum(guess * weight, -1)
        auxiliary = self.aux_loss_weight * (2 - t / self.chain.steps if self.adaptive else 1.0)
        return DiscreteLossTerms((size + auxiliary * guess) / p, size, size / p / math.log(2), correct.mean(-1))

    def continuous(
        self,
        model: VQDiffusionNetwork,
        conditioning: BlockConditioning,
        x0: Array,
        key: Array,
        drop: Array | None = None,
        train: bool = True,
    ) -> DiscreteLossTerms:
        """Expectation over times of m'/m times the cross-entropy of the masked codes (Sahoo et al. 2024, eq. 10)."""
        when, where = jax.random.split(key)
        tau = jnp.maximum(spread(when, x0.shape[0], train), 1e-4)
        share, weight = masked_share(self.chain.shape, tau)
        masked = jax.random.uniform(where, x0.shape) < share[:, None]
        t = jnp.clip(jnp.ceil(tau * self.chain.steps).astype(jnp.int32) - 1, 0, self.chain.steps - 1)
        z = model(jnp.where(masked, self.chain.codes, x0), t, conditioning, drop)
        _, nll, correct = chunked_cross_entropy(model.logits, z, x0, self.compute.loss_chunk)
        size = jnp.sum(nll * masked, -1)
        correct = jnp.sum(correct * masked, -1) / jnp.maximum(masked.sum(-1), 1)
        return DiscreteLossTerms(weight * size, size, weight * size / math.log(2), correct)

    @typed
    def log_likelihood(self, model: VQDiffusionNetwork, batch: Batch) -> Float[Array, " b"]:
        """A lower bound of log p(codes | condition) of each image in nats, (b,) fp32.

        It sums -L_t at one sample of x_t for each of the T times. The prior term of the last step, almost zero, is
        omitted.
        """
        x0 = rearrange(batch["codes"], "b h w -> b (h w)")
        conditioning = model.read(batch, jnp.zeros(x0.shape[0], bool))

        def term(total: Array, i: Array) -> tuple[Array, None]:
            t = jnp.broadcast_to(i, x0.shape[:1])
            x_t = self.chain.q_sample(x0, t, jax.random.fold_in(jax.random.key(0), i))
            return total - self.chain.variational(model.log_x0(x_t, t, conditioning), x0, x_t, t)[0].sum(-1), None

        return jax.lax.scan(term, jnp.zeros(x0.shape[0]), jnp.arange(self.chain.steps))[0]

    def sample_times(self, model: VQDiffusionNetwork, b: int, key: Array, train: bool = True) -> tuple[Array, Array]:
        """Times int (b,) and their sampling probabilities (b,); uniform if not in training."""
        even = jnp.full(self.chain.steps, 1 / self.chain.steps)
        p = even
        if train and model.history is not None and model.count is not None:
            history, count = jax.lax.stop_gradient((model.history[...], model.count[...]))
            p = jnp.where(jnp.all(count > 10), importance(history), even)
        t = inverse_cdf(jnp.broadcast_to(p, (b, len(p))), spread(key, b, train))
        return t, p[t]

    def remembered(self, model: VQDiffusionNetwork, t: Array, size: Array, seen: Array) -> VQDiffusionNetwork:
        """The model after a batch with losses L_t (b,): history <- 0.9 history + 0.1 L_t^2 at the times in the batch.

        L_t^2 is the mean over all rows of the batch with the same time, so the order of rows does not matter.
        """
        if model.history is None or model.count is None:
            return model
        rows = (t[:, None] == jnp.arange(self.chain.steps)) & seen[:, None]
        number = rows.sum(0).astype(jnp.float32)
        square = jnp.sum(jnp.where(rows, size[:, None] ** 2, 0), 0) / jnp.maximum(number, 1)
        history = jnp.where(number > 0, 0.9 * model.history[...] + 0.1 * square, model.history[...])
        return replace(model, history=history, count=model.count[...] + number)

    # -- sampling

    def sample(
        self,
        model: VQDiffusionNetwork,
        condition: Batch,
        keys: Array,
        options: DiscreteSampler | None = None,
        *,
        known: Array | None = None,
        keep: Array | None = None,
        guided: bool | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Codes int32 (b, h, w), one image per row of the condition and per key of `keys` (b,).

        An image depends only on its own key and condition, not on its batch. Guidance runs both branches as one batch
        of 2b. All options are traced: new values, of steps too, do not recompile.

        known, keep: codes (b, h, w) and a mask bool (b, h, w) of those to leave unchanged, to complete an image.
        guided: False skips the unconditional branch, whatever the options say, which halves the cost. None skips it if
            `conditioning.dropout` is 0, since no unconditional branch was trained.
        progress: its listener is called with (steps done, all steps, the most probable clean codes (b, h, w), at the
            end the sampled ones).
        """
        guided = is_guided(self.capabilities, guided)
        null = not self.conditioning.what.spec.has_null
        if guided and null and "null_features" not in condition:
            raise ValueError("guidance without trained_null needs 'null_features', those of an empty caption")
        known, keep = known_and_keep(self.capabilities, self.sample_spec(), len(keys), known, keep)
        options = (options or self.sampling).arrays()
        return _sample(self, model, condition, keys, options, known, keep, guided, progress)


class BlockConditioning(NamedTuple):
    """The condition as blocks read it: context vectors (b, s, k) and their mask (b, 1, 1, s); classes (b,)."""

    context: Array | None
    mask: Array | None
    label: Array | None


class DiscreteLossTerms(NamedTuple):
    """Per image, (b,): the loss, L_t, the estimated bound in bits, and the share of codes predicted correctly."""

    loss: Array
    size: Array
    bits: Array
    correct: Array


class VQDiffusionNetwork(nnx.Module):
    """The Transformer of a `VQDiffusion`, from noised codes, a time and a condition to the clean codes."""

    def __init__(self, config: VQDiffusion, key: Array):
        self.config, keys, d = config, jax.random.split(key, 6), config.transformer.width
        self.condition = config.conditioning.what.init(keys[0], d) if config.by_tokens else None
        self.tokens = Embedding(config.chain.codes + 1, d, keys[1], special=1)
        axial = config.positions if isinstance(config.positions, AxialPositions) else None
        rows, columns = (axial and axial.grid) or config.grid
        self.rows = position_table(normal(keys[2], (rows, d)), (rows, 1)) if axial else None
        self.columns = position_table(normal(keys[3], (columns, d)), (columns, 1)) if axial else None
        self.blocks = stack_blocks(config.block, keys[4])
        self.norm = config.transformer.normalise()
        self.output = Linear(d, config.chain.codes, keys[5], axes=("embed", "vocab"))
        history = config.importance and config.objective == "bound"
        self.history = ModelState(jnp.zeros(config.chain.steps)) if history else None
        self.count = ModelState(jnp.zeros(config.chain.steps)) if history else None

    def read(self, batch: Batch, dropped: Array) -> BlockConditioning:
        """The conditioning of the blocks for each row; `dropped` bool (b,) marks unconditional ones."""
        if (count := self.config.conditioning.what.spec.classes) is not None:
            label = jnp.where(dropped, count, ids(batch, "label", count + 1)) if count else None
            return BlockConditioning(None, None, label)
        context, mask = self.condition(batch, dropped, self.config.compute.dtype)
        return BlockConditioning(context, mask[:, None, None], None)

    @typed
    def __call__(
        self, x_t: Int[Array, "b t"], t: Int[Array, " b"], conditioning: BlockConditioning, key: Array | None = None
    ) -> Float[Array, "b t d"]:
        """z (b, l, d) of the clean codes, from noised ones int (b, l) at times (b,); `logits` turns it into p(x_0).

        key: for dropout.
        """
        config, x, rotary = self.config, self.tokens(x_t), None
        if isinstance(config.positions, RotaryPositions):
            rotary = config.positions.table(config.grid, config.transformer.head_size)
        if self.rows is not None and self.columns is not None:
            x = x + rearrange(self.rows[...][:, None] + self.columns[...], "i j d -> (i j) d")[: config.length]
        return apply_blocks(
            self.blocks,
            shard(x.astype(config.compute.dtype), "batch", "length", None),
            jnp.zeros_like(t) if config.times == "none" else t,
            *conditioning,
            key=key,
            rotary=rotary,
            remat=config.compute.remat,
        )

    @typed
    def logits(self, z: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """(..., d) -> (..., K) fp32."""
        return self.output(self.norm(z).astype(jnp.float32))

    @typed
    def log_x0(
        self, x_t: Int[Array, "b t"], t: Int[Array, " b"], conditioning: BlockConditioning
    ) -> Float[Array, "b t v"]:
        """log p(x_0 | x_t) (b, l, K + 1), LOWEST for MASK."""
        return _with_mask(jax.nn.log_softmax(self.logits(self(x_t, t, conditioning))))


@typed
def guided_log(
    log_p: Float[Array, "b t v"], log_null: Float[Array, "b t v"], scale: Array | float
) -> Float[Array, "b t v"]:
    """Guidance in log space, renormalised: (b, l, K + 1) (Tang et al. 2022, eq. 7)."""
    return _with_mask(jax.nn.log_softmax(guide(log_p[..., :-1], log_null[..., :-1], scale)))


@typed
def truncate_log_probs(log_p: Float[Array, "b t v"], options: DiscreteSampler) -> Float[Array, "b t v"]:
    """log p(x_0) after temperature, top-k and truncation; removed codes are LOWEST, the rest is not renormalised."""
    temperature = jnp.asarray(options.temperature)[..., None, None]
    cooled = _with_mask(jax.nn.log_softmax(log_p[..., :-1] / jnp.maximum(temperature, 1e-5)))
    log_p = jnp.where(temperature == 1, log_p, cooled)
    return jnp.where(filter_logits(log_p, 1.0, options.top_k, options.truncation) > 0, log_p, LOWEST)


def _with_mask(log_p: Array) -> Array:
    """(..., K) -> (..., K + 1): a clean code is never MASK."""
    return clipped(jnp.concatenate([log_p, jnp.full_like(log_p[..., :1], LOWEST)], -1))


@partial(jax.jit, static_argnames=("config", "guided"))
def _sample(
    config: VQDiffusion,
    model: VQDiffusionNetwork,
    condition: Batch,
    keys: Array,
    options: DiscreteSampler,
    known: Array,
    keep: Array,
    guided: bool,
    progress: Progress | None,
) -> Array:
    b, chain = keys.shape[0], config.chain
    both = Branches(guided)
    conditioning = model.read(both.rows(condition), both.dropped(b))

    def guess(x: Array, t: Array, share: Array) -> Array:
        log_p, null = both(lambda x, t: model.log_x0(x, t, conditioning), x, t)
        if null is not None:
            log_p = guided_log(log_p, null, options.guidance_at(share, 1))
        return truncate_log_probs(log_p, options)

    def noise(i: Array) -> tuple[Array, Array]:
        def one(key: Array) -> tuple[Array, Array]:
            codes, places = jax.random.split(jax.random.fold_in(key, i + 1))
            return uniform(codes, (config.length, 2)), jax.random.uniform(places, (config.length,))

        return jax.vmap(one)(keys)

    flat = lambda x: rearrange(x, "b h w -> b (h w)")
    start = jax.vmap(lambda key: chain.start(jax.random.fold_in(key, 0), (config.length,)))(keys)
    grid = lambda x: x.reshape(b, *config.grid)

    def on_step(i: Array, count: Array, x: Array, log_x0: Array) -> None:
        if progress is not None:
            likely = stay(jnp.argmax(log_x0[..., :-1], -1).astype(x.dtype))
            report(progress, i, count, grid(jnp.where(i == count, x, likely)))

    stay = lambda x: jnp.where(flat(keep), flat(known), x)
    return grid(reverse(chain, guess, shard(start, "batch", None), noise, options, stay, on_step))
