"""Gaussian diffusion and flow matching: generate an image, or its latents, from noise.

A network reads x_t = alpha_t x_0 + sigma_t eps and the time, and predicts the noise (Ho et al. 2020), the image, or the
velocity between the two (Liu et al. 2023); a solver integrates its predictions back from noise. Process, network,
prediction target, solver and guidance are independent choices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from t2i_jax.core.arrays import Float, typed
from t2i_jax.core.conditions import Batch, Condition
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import BaseFamily
from t2i_jax.core.fields import FREE, Count, NotNegative, Positive, Share
from t2i_jax.core.keys import apart
from t2i_jax.core.noise import NoiseProcess, Predicts
from t2i_jax.core.params import Named
from t2i_jax.core.sharding import shard
from t2i_jax.core.specs import WEIGHT, BatchSpec, CodeSpec, FieldSpec, SampleSpec
from t2i_jax.core.types import Capabilities, Compute, LossOutput
from t2i_jax.networks.condition import ClassEmbedder, Context, dropped_rows
from t2i_jax.networks.dit import DiT, DiTNetwork
from t2i_jax.networks.prior import EmbeddingPrior, EmbeddingPriorNetwork
from t2i_jax.networks.unet import ExpertUNets, UNet, UNetNetwork, Upscaling
from t2i_jax.nn.losses import row_weights, weighted_mean
from t2i_jax.nn.resize import aligned_bilinear
from t2i_jax.noise.gaussian import clipped, join, loss_weight, split, thresholded
from t2i_jax.noise.processes import Discrete
from t2i_jax.noise.schedule import SECTIONS, expand_like, spread
from t2i_jax.sampling import guidance, solvers
from t2i_jax.sampling.guidance import Branches, is_guided
from t2i_jax.sampling.inpainting import known_and_keep
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.sampling.progress import Progress, report
from t2i_jax.sampling.solvers import SOLVERS, Denoised

Network = DiTNetwork | UNetNetwork | ExpertUNets | EmbeddingPriorNetwork


@dataclasses.dataclass(frozen=True)
class Diffusion(BaseFamily[DiffusionSampler]):
    """A network, the noise process it reverses, and its training settings."""

    network: DiT | UNet | EmbeddingPrior = DiT()
    process: NoiseProcess = Discrete()
    predicts: Predicts = "eps"
    variance: Annotated[Literal["fixed_large", "fixed_small"], FREE] = "fixed_large"
    """Variance of a reverse step if the network predicts none: that of the forward step, or of the posterior."""
    discard_variance_output: bool = False
    """Discard the second half of the output channels (released SiT predicts but never uses variance)."""
    vlb_weight: NotNegative = 1.0
    """Weight of the variational bound, which trains the variance; ADM uses the number of steps over 1000."""
    weight: Literal["uniform", "snr", "truncated_snr", "min_snr"] = "uniform"
    """Weight of the squared error at each time; see `loss_weight`."""
    gamma: Positive = 5.0
    """Clipping threshold of min_snr."""
    guided_channels: Annotated[Count, FREE] = 0
    """Leading channels that classifier-free guidance changes; 0: all. Released samplers of DiT and GLIDE use 3."""
    upscale: Count = 0
    """Upscaling factor of super-resolution of pixels if batches have no `low_res`: the low-resolution image is then
    made from `image`."""
    noise_aug: Share = 0.0
    """Maximum noise that training adds to the low-resolution image, 1 being pure noise. The level is sampled per row,
    so that a sampler may choose it (Ho et al. 2022, cascades; Saharia et al. 2022, Imagen)."""
    low_res_process: NoiseProcess | None = None
    """Process of that noise, on the enlarged image: a level is the share of training times that have less of it, and
    the network's time of the level is in `low_res_noise`, in thousands. None: noise of the level's amplitude, on the
    small image."""
    clip_range: Annotated[Positive, FREE] = 1.0
    """Bound of the predicted image where options ask to `clip` it: 1 for images."""
    solver: Annotated[str, FREE] = "own"
    """A key of `sampling.solvers.SOLVERS`; `own` becomes the default of the process: ddpm for Discrete, euler for Flow,
    heun for EDM."""
    compute: Compute = Compute()
    sampling: Annotated[DiffusionSampler, FREE] = DiffusionSampler()
    """Default options of `sample`."""

    def __post_init__(self):
        super().__post_init__()
        if self.network.learn_variance and self.process.variance_bound is None and not self.discard_variance_output:
            raise ValueError("learn_variance of the network: only steps of a Discrete process have a variance to learn")
        if self.solver == "own":
            object.__setattr__(self, "solver", self.process.solver)
        if self.solver not in SOLVERS:
            raise ConfigError(f"Diffusion.solver {self.solver!r}: one of own, {', '.join(SOLVERS)}")
        if self.predicts in ("eps", "score") and self.process.starts_from_pure_noise:
            raise ValueError(
                f"predicts {self.predicts!r}: samplers of this {type(self.process).__name__} begin in noise alone, "
                "where it says nothing of the image; predict 'v' or 'velocity'"
            )

        clean = isinstance(self.process, Discrete) and self.sample_spec().kind == "pixels"
        if self.network.neighbours is not None and not clean:
            raise ConfigError("neighbours: of models of pixels, and of a Discrete process, whose time 0 is the image")
        if self.upscale and self.network.low_res_channels:
            raise ConfigError(f"upscale {self.upscale}: of pixels; low_res_channels are of latents, by their codec")
        levels, process = self.network.noise_levels, self.low_res_process
        times = process.time_levels if process else None
        if levels and (times is None or times > levels):
            given = "None" if process is None else f"of {times or 'any'} times"
            raise ConfigError(f"noise_levels {levels}: a low_res_process of as many discrete times; it is {given}")

    @property
    def condition(self) -> Condition:
        """Condition of an image."""
        return self.network.conditioning.what if self.network.conditioning else ClassEmbedder(0)

    @property
    def condition_dropout(self) -> float:
        """Share of training images whose condition is dropped."""
        return self.network.conditioning.dropout if self.network.conditioning else 0.0

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image, or of its latents."""
        return self.network.size

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns and channels of an image, or of its latents."""
        return (*self.network.size, self.network.channels)

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        neighbours = self.network.neighbours
        several = math.prod(self.grid) > 1  # of one position, an embedding, no part can be kept
        return Capabilities(
            family=True,
            unconditional=self.condition_dropout > 0 and (neighbours is None or neighbours.dropout > 0),
            guidance=True,
            neighbours=neighbours is not None,
            inpaint=several,
            init_image=several,
            super_resolution=self.is_super_resolution,
            any_size=self.network.any_size,
            classifier_guidance=True,
            autoguidance=True,
            remat=self.network.remats,
            attention=self.network.chooses_attention,
        )

    def sample_spec(self) -> SampleSpec:
        """Shape and dtype of a sample."""
        return SampleSpec(self.grid, CodeSpec("float32", (self.network.channels,)))

    def sized(self, grid: tuple[int, int]) -> Diffusion:
        """The same family for images, or latents, of other rows and columns."""
        return self if grid == self.grid else dataclasses.replace(self, network=self.network.sized(grid))

    def of_grid(self) -> Named:
        """Variables of the network that are computed from the grid."""
        return self.network.of_grid()

    def condition_spec(self) -> BatchSpec:
        """Batch fields that `sample` reads: those of the condition, and extra inputs."""
        whole, plane = (FieldSpec((*self.grid, n), "float32", optional=True) for n in (self.network.channels, 1))
        small = self.network.low_res_channels or self.network.channels
        further = {
            "inpaint": {"inpaint": whole, "inpaint_mask": plane},
            "low_res": {"low_res": FieldSpec((None, None, small), "float32")},
        }
        extra = {k: v for name in self.network.extra_inputs for k, v in further[name].items()}
        network = self.network
        neighbours = {} if network.neighbours is None else network.neighbour_spec()
        return {**self.condition.batch_spec(), **extra, **neighbours}

    def batch_spec(self) -> BatchSpec:
        """Fields of a training batch: `codes` (latents) or `image`, what `sample` reads, and the noise level of
        `low_res`."""
        drawn = dataclasses.replace(self.sample_spec().field, optional=True, one_of="drawn")
        spec = {"codes": drawn, "image": drawn, **self.condition_spec(), "weight": WEIGHT}
        if self.is_super_resolution:
            spec["low_res"] = dataclasses.replace(spec["low_res"], optional=self.upscale > 0)
            spec["low_res_noise"] = FieldSpec((), "float32", optional=True)
        return spec

    def check(self, options: DiffusionSampler) -> None:
        """Errors: ValueError for options that cannot be sampled with."""
        options.check(self.process.max_steps)
        if self.network.neighbours is None:
            options.check_default("this model reads no neighbours", "neighbour_guidance", "neighbour_share")
        if options.thresholds and self.sample_spec().kind != "pixels":
            raise ValueError("threshold: of models of pixels, whose range is known; this one draws other codes")
        if options.spacing not in ("leading", *SECTIONS):
            return
        if not isinstance(self.process, Discrete):
            raise ValueError(f"spacing {options.spacing!r}: it is one of discrete steps, and this process has none")
        if options.spacing in SECTIONS:
            count = len(self.process.tables.respaced(options.spacing))
            if not isinstance(options.steps, Tracer) and int(options.steps) != count:
                given = f"steps {int(options.steps)}: spacing {options.spacing!r} is of {count}"
                raise ValueError(f"{given}; spacing 'default' takes any number")

    def loop_trips(self, options: DiffusionSampler) -> int:
        """Number of solver steps."""
        if options.spacing in ("leading", *SECTIONS):
            return int(self.process.timesteps(options.steps, spacing=options.spacing).steps)
        return int(options.steps)

    def init(self, key: Array) -> Network:
        """A network with fresh parameters."""
        return self.network.init(key, self.compute)

    # -- training

    def loss(self, model: Network, batch: Batch, key: Array, train: bool = True) -> LossOutput:
        """Mean error of the prediction, and the bound that trains the variance (Nichol & Dhariwal 2021, eq. 16).

        batch: `codes` float (b, i, j, c) or `image` in [-1, 1], the condition's fields, and optionally `weight` (b,), 0
        for examples to ignore. Each row has its own time, noise and condition dropout. train: False turns off dropout,
        dropped conditions and noise on the low-resolution image, spaces the times evenly, and adds the mean squared
        error of each quarter of them, least noisy first, as `mse_q1` to `mse_q4`, if there are at least four rows;
        static.
        """
        x0 = batch["codes"] if "codes" in batch else batch["image"]
        keys = jax.random.split(key, 5)
        b = len(x0)
        u = spread(keys[0], b, train)
        t = self.process.quantile(u)
        eps = jax.random.normal(keys[1], x0.shape)
        if self.is_super_resolution:
            small, draw = self.low_res_of(batch), jax.random.split(keys[2])
            share = self.noise_aug * jax.random.uniform(draw[0], (b,)) if train else jnp.zeros(b)
            batch = {**batch, **self.noised_low_res(small, share, jax.random.normal(draw[1], small.shape))}
        dropped = dropped_rows(keys[3], self.condition_dropout, b, train)
        if (neighbours := self.network.neighbours) is not None:
            batch = {**batch, **neighbours.kept(batch, dropped_rows(apart(keys[3]), neighbours.dropout, b, train))}
        losses = self.losses(model, x0, t, eps, batch, dropped, keys[4] if train else None)
        weight = row_weights(batch, b)
        means = {k: weighted_mean(v, weight) for k, v in losses.items()}
        if not train and b >= 4:  # with fewer rows a quarter is empty
            quarter = jnp.floor(4 * u)
            means |= {f"mse_q{q + 1}": weighted_mean(losses["mse"], weight * (quarter == q)) for q in range(4)}
        return LossOutput(means["loss"], means)

    def losses(
        self,
        model: Network,
        x0: Array,
        t: Array,
        eps: Array,
        batch: Batch,
        dropped: Array,
        key: Array | None = None,
    ) -> dict[str, Array]:
        """`mse`, with a learned variance also `vb` in bits per dimension, and their weighted sum `loss`: each (b,)."""
        x0 = x0.astype(jnp.float32) * self.process.scale
        alpha, sigma = self.process.alpha_sigma(t, x0)
        x = shard(alpha * x0 + sigma * eps, "batch", None, None, None)
        prediction, v = self._parts(
            self._apply(model, x, self.process.network_time(t), model.read(batch, dropped), batch, key)
        )
        error = (join(self.predicts, x0, eps, alpha, sigma) - prediction) ** 2
        weight = loss_weight(self.weight, self.predicts, alpha, sigma, self.gamma)
        mse = error.mean((1, 2, 3))
        loss = (weight * error).mean((1, 2, 3))
        if v is None or self.process.variance_bound is None:
            return {"mse": mse, "loss": loss}
        # The bound trains the variance only: its gradient would reweight the times for the mean.
        frozen = jax.lax.stop_gradient(prediction)
        vb = self.vlb_weight * self.process.variance_bound(x0, x, t, frozen, v, self.predicts)
        return {"mse": mse, "vb": vb, "loss": loss + vb}

    @property
    def is_super_resolution(self) -> bool:
        """Whether the network upscales a low-resolution image."""
        return "low_res" in self.network.extra_inputs

    @typed
    def low_res_of(self, batch: Batch) -> Float[Array, "b i j c"]:
        """The low-resolution image (b, i', j', c): the batch's `low_res`, or its `image` (b, i, j, c) downscaled.

        It is enlarged to the size of samples where its noise is that of `low_res_process`.

        Errors: ValueError if the batch has neither.
        """
        if "low_res" in batch:
            small = batch["low_res"]
        elif not self.upscale or "image" not in batch:
            there = ", ".join(sorted(batch))
            raise ValueError(f"the batch has no 'low_res', the small image to enlarge. It has: {there}")
        else:
            b, i, j, c = batch["image"].shape
            size = (b, i // self.upscale, j // self.upscale, c)
            small = jax.image.resize(batch["image"], size, "linear", antialias=True)
        return small if self.low_res_process is None else enlarged(small, self.grid, self.network.upscaling)

    @typed
    def noised_low_res(
        self, small: Float[Array, "b i j c"], level: Float[Array, " b"], noise: Float[Array, "b i j c"]
    ) -> dict[str, Array]:
        """What the network reads of a low-resolution image, as `low_res_of` gives it, with noise of levels (b,)."""
        if self.low_res_process is None:
            return noise_low_res(small, level, noise)
        # At 0 and 1 a time may be infinite; the share n / T of discrete steps is step n, however it is rounded.
        t = self.low_res_process.quantile(jnp.clip(level + 1e-6, 1e-5, 1 - 1e-5))
        alpha, sigma = self.low_res_process.alpha_sigma(t, small)
        return {"low_res": alpha * small + sigma * noise, "low_res_noise": self.low_res_process.network_time(t) / 1000}

    def _apply(
        self, model: Network, x: Array, time: Array, context: Context, batch: Batch, key: Array | None = None
    ) -> Array:
        """The network's output for x, with the extra inputs of the batch concatenated."""
        return model(join_inputs(x, batch, self.network.extra_inputs, self.network.upscaling), time, context, key)

    def _parts(self, out: Array) -> tuple[Array, Array | None]:
        """The prediction, and the output for the variance."""
        if not self.network.learn_variance:
            return out, None
        prediction, v = jnp.split(out, 2, -1)
        return prediction, None if self.discard_variance_output else v

    # -- sampling

    def sample(
        self,
        model: Network,
        condition: Mapping[str, Array],
        keys: Array,
        options: DiffusionSampler | None = None,
        *,
        known: Array | None = None,
        keep: Array | None = None,
        guided: bool | None = None,
        solver: str | None = None,
        classifier: Callable[[Array, Array, Batch], Array] | None = None,
        guide_model: Network | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Images or latents fp32 (b, i, j, c), one per row of the condition and per key of `keys` (b,).

        An image depends only on its own key and condition. All options are traced: new values do not recompile.

        known: images (b, i, j, c) to start from, with noise according to `strength`. keep: bool (b, i, j), where the
            result is the known image; strength applies to the rest. At every timestep that part of x is replaced by the
            known image with the noise of the timestep (Song et al. 2021, score SDE, appendix I.2), and `resample`
            rounds harmonise the rest (Lugmayr et al. 2022).
        guided: False skips the unconditional branch, whatever the options say, which halves the cost. None skips it if
            `condition_dropout` is 0, since no unconditional branch was trained.
        solver: overrides the configured one; static.
        classifier: a pytree that maps (x, network times (b,), condition) to log p(condition | x) (b,), such as a
            classifier or an image-text model; samples follow its gradient. An image (b, i, j, c) in [-1, 1] that is the
            condition's `reference` reaches it at the noise of x, drawn once for all steps (Liu et al. 2023, Semantic
            Diffusion Guidance).
        guide_model: a weaker model that replaces the unconditional branch (Karras et al. 2024). Its network may differ;
            process, prediction, shape and condition are those of this one.
        progress: its listener is called with (steps done, all steps, the images so far).
        """
        guided = is_guided(self.capabilities, True if guided is None and guide_model is not None else guided)
        needs_null = not self.condition.spec.has_null and "null_features" not in condition
        if guided and guide_model is None and needs_null:
            raise ValueError("guidance of a model that keeps no unconditional features needs 'null_features'")
        if keep is not None:
            known, keep = known_and_keep(self.capabilities, self.sample_spec(), len(keys), known, keep)
        options = options or self.sampling
        self.check(options)
        config = dataclasses.replace(self, solver=solver or self.solver)
        return _sample(
            config,
            model,
            dict(condition),
            keys,
            options.arrays(),
            known,
            keep,
            guided,
            classifier,
            guide_model,
            progress,
        )

    def denoised(
        self, prediction: Array, v: Array | None, x: Array, alpha: Array, sigma: Array, options: DiffusionSampler
    ) -> Denoised:
        """x_0 and eps implied by the network's prediction at x = alpha x_0 + sigma eps; eps is recomputed where options
        threshold or clip x_0."""
        x0, eps = split(self.predicts, prediction, x, alpha, sigma)
        most = math.inf if options.threshold_most is None else options.threshold_most
        near = thresholded(x0 / self.process.scale, options.threshold, most)
        near = clipped(near, options.clip, self.clip_range) * self.process.scale
        bounded = jnp.asarray(options.clip) | (jnp.asarray(options.threshold) > 0)
        eps = jnp.where(expand_like(bounded, x), (x - alpha * near) / sigma, eps)
        if v is None and self.variance == "fixed_small":
            v = jnp.full_like(x, -1.0)
        return Denoised(near, eps, v)


@typed
def noise_low_res(
    small: Float[Array, "b i j c"], share: Float[Array, " b"], noise: Float[Array, "b i j c"]
) -> dict[str, Array]:
    """Network inputs for a low-resolution image (b, i', j', c) with noise amplitude `share` (b,):
    variance-preserving."""
    weight = expand_like(share, small)
    return {"low_res": jnp.sqrt(1 - weight**2) * small + weight * noise, "low_res_noise": share}


@typed
def join_inputs(
    x: Float[Array, "b i j c"], batch: Batch, names: tuple[str, ...], upscaling: Upscaling = "linear"
) -> Float[Array, "b i j k"]:
    """x (b, i, j, c) concatenated with the extra inputs in `names`.

    `inpaint` adds the batch's `inpaint` (b, i, j, c) where `inpaint_mask` (b, i, j, 1) is 1, and that mask, both zero
    if absent; `low_res` adds `low_res` (b, i', j', c), enlarged.
    """
    parts = [x]
    if "inpaint" in names:
        mask = batch.get("inpaint_mask", jnp.zeros_like(x[..., :1])).astype(x.dtype)
        parts += [batch.get("inpaint", jnp.zeros_like(x)) * mask, mask]
    if "low_res" in names:
        if "low_res" not in batch:
            raise ValueError(
                f"the batch has no 'low_res', the small image to enlarge. It has: {', '.join(sorted(batch))}"
            )
        parts.append(enlarged(batch["low_res"], (x.shape[1], x.shape[2]), upscaling))
    return jnp.concatenate(parts, -1) if len(parts) > 1 else x


@typed
def enlarged(
    small: Float[Array, "b _ _ c"], size: tuple[int, int], upscaling: Upscaling = "linear"
) -> Float[Array, "b i j c"]:
    """A low-resolution image of the given rows and columns; one that has them is returned as it is."""
    if small.shape[1:3] == size:
        return small
    if upscaling == "corners":
        return aligned_bilinear(small, size)
    return jax.image.resize(small, (len(small), *size, small.shape[3]), upscaling, antialias=False)


def _low_res(
    config: Diffusion, condition: Batch, keys: Array, options: DiffusionSampler
) -> Callable[[Array | int], dict[str, Array]]:
    """What the network reads of the low-resolution image at a stop, whose noise may be renewed there."""
    folded = jax.vmap(jax.random.fold_in, (0, None))
    small, own = config.low_res_of(condition), folded(keys, 3)
    level = jnp.broadcast_to(options.noise_aug, keys.shape)

    def noised(i: Array | int) -> dict[str, Array]:
        drawn = jnp.where(options.renew_noise_aug, folded(own, i), own)
        return config.noised_low_res(small, level, jax.vmap(lambda k: jax.random.normal(k, small.shape[1:]))(drawn))

    return noised


@partial(jax.jit, static_argnames=("config", "guided"))
def _sample(
    config: Diffusion,
    model: Network,
    condition: Batch,
    keys: Array,
    options: DiffusionSampler,
    known: Array | None,
    keep: Array | None,
    guided: bool,
    classifier: Callable[[Array, Array, Batch], Array] | None,
    guide_model: Network | None,
    progress: Progress | None,
) -> Array:
    b, both = len(keys), Branches(guided and guide_model is None)
    folded = jax.vmap(jax.random.fold_in, (0, None))
    path = config.process.timesteps(options.steps, options.stride, options.spacing)
    low_res = (lambda i: {}) if not config.is_super_resolution else _low_res(config, condition, keys, options)
    condition = {k: v for k, v in condition.items() if k != "image" or not config.is_super_resolution} | low_res(0)
    everything = both.rows(condition)
    context = model.read(everything, both.dropped(b))
    # The branch without neighbours has the caption; in its turns it takes the place of that without the caption.
    swapped = both.shared(context) if both.guided and config.capabilities.neighbours else None
    if swapped is not None and swapped.maps_mask is not None:
        swapped = swapped._replace(maps_mask=swapped.maps_mask & ~both.dropped(b)[:, None])
    guide_context = None if guide_model is None else guide_model.read(condition, jnp.zeros(b, bool))
    first, later, kept, _, renewed, kept_again, referred = (folded(keys, n) for n in range(7))
    normal = lambda keys, i: jax.vmap(lambda k: jax.random.normal(k, config.shape))(folded(keys, i))

    guiding = condition.get("reference")
    eps = None if guiding is None else normal(referred, 0)

    def at_noise(i: Array) -> Batch:
        """What a classifier reads: the condition, its reference at the noise of a stop."""
        if guiding is None or eps is None:
            return condition
        clean = guiding.astype(jnp.float32) * config.process.scale
        return condition | {"reference": path.alpha[i] * clean + path.sigma[i] * eps}

    def denoise(x: Array, i: Array) -> Denoised:
        alpha, sigma, time, own = path.alpha[i], path.sigma[i], path.t[i], low_res(i)
        batch = everything | both.rows(own)
        turn, read = None, context
        if swapped is not None:
            turn = jnp.broadcast_to(options.guides_neighbours(i), (b,))
            rows = both.rows(turn)
            read = jax.tree.map(lambda x, y: jnp.where(expand_like(rows, x), x, y), swapped, context)
        out, null = both(lambda x, t: config._apply(model, x, t, read, batch), x, jnp.full(b, time))
        prediction, v = config._parts(out)
        if guided and guide_model is not None and guide_context is not None:
            null = config._apply(guide_model, x, jnp.full(b, time), guide_context, condition | own)
        if null is not None:
            chosen = options if turn is None else options.with_guidance(turn)
            scale = chosen.guidance_at(i, path.steps, 2 * solvers.log_ratio(path, i))
            # A guide model may predict the variance where this one does not, or vice versa.
            other = null[..., : config.network.channels]
            moved = guidance.guide(prediction, other, scale, config.guided_channels)
            prediction = guidance.rescale(moved, prediction, options.guidance_rescale)
        denoised = config.denoised(prediction, v, x, alpha, sigma, options)
        if classifier is None:
            return denoised
        gradient = guidance.classifier_gradient(
            lambda x: classifier(x, jnp.full(b, time), at_noise(i)), x, options.classifier_scale
        )
        return denoised._replace(classifier_gradient=gradient)

    x, start = normal(first, 0), jnp.int32(0)
    clean = jnp.float32(0) if known is None else known.astype(jnp.float32) * config.process.scale
    # A grid may end in some noise, which what is known does not have.
    noised = lambda i, eps: jnp.where(i < path.steps, path.alpha[i] * clean + path.sigma[i] * eps, clean)
    hold = lambda x, i, eps: x if keep is None else jnp.where(keep[..., None], noised(i, eps), x)
    pin = lambda x: shard(x, "batch", None, None, None)
    rounds = None
    if keep is not None:
        rounds = solvers.Rounds(
            jnp.asarray(options.resample) - 1,
            lambda i, j: normal(folded(renewed, i), j),
            lambda x, i, j: pin(hold(x, i, normal(folded(kept_again, i), j))),
            (x + normal(first, 1)) * math.sqrt(0.5),
        )
    if known is not None:
        start = jnp.round((1 - options.strength) * path.steps).astype(jnp.int32)
        x = jnp.where(start > 0, noised(start, x), x)

    def between(x: Array, i: Array) -> Array:
        x = hold(x, i, normal(kept, i))
        report(progress, i, path.steps, x / config.process.scale)
        return pin(x)

    eta = options.eta_of(config.solver)
    step, noise = SOLVERS[config.solver], lambda i: normal(later, i)
    x = pin(hold(x, start, normal(kept, start))) if keep is not None else x
    x = solvers.solve(step, denoise, x, path, noise, eta, start, between, rounds)
    return x / config.process.scale
