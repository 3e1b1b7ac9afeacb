"""Options of samplers; they are traced, so new values do not recompile."""

from __future__ import annotations

import dataclasses
import functools
import math
from types import ModuleType
from typing import Annotated, Literal, Self, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import DTypeLike

from t2i_jax.core.config import refused
from t2i_jax.core.fields import LARGEST, Checked, Range, values
from t2i_jax.core.noise import Spacing
from t2i_jax.core.types import Family, O
from t2i_jax.sampling.guidance import within
from t2i_jax.sampling.solvers import default_eta


@dataclasses.dataclass(frozen=True)
class Options(Checked):
    """Base of sampling options; every field is a number, an array with one per image, or static."""

    def arrays(self) -> Self:
        """The same options as arrays in the dtype of each field's annotation, so that `2` and `2.0` share one
        compilation; fields marked `static` are unchanged."""
        given = values(self)
        return dataclasses.replace(
            self, **{k: jnp.asarray(given[k], dtype) for k, dtype in _dtypes(type(self)).items()}
        )


@dataclasses.dataclass(frozen=True)
class GuidedOptions(Options):
    """Base of the options of families: classifier-free guidance."""

    guidance: Annotated[float | Array, Range()] = dataclasses.field(default=3.0, kw_only=True)
    """Scale s of y' + s (y - y'), with y' predicted without the condition (logits, log p, noise); 1: no guidance. One
    number, or one per image (b,)."""
    guidance_start: Annotated[float | Array, Range(0, 1)] = dataclasses.field(default=0.0, kw_only=True)
    """Guidance begins after this share of the tokens or steps."""
    guidance_stop: Annotated[float | Array, Range(0, 1)] = dataclasses.field(default=1.0, kw_only=True)
    """Guidance ends after this share of the tokens or steps."""

    def guidance_at(self, done: Array | int, total: Array | int) -> Array:
        """The scale after `done` of `total` tokens or steps: a scalar, or (b,)."""
        return within(self.guidance, done / total, self.guidance_start, self.guidance_stop)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ARSampler(GuidedOptions):
    """Options of sampling token by token; every field is a number, or one per image (b,), and is traced."""

    guidance_power: Annotated[float | Array, Range(low=0)] = 0.0
    """The scale grows as 1 + (s - 1) u^power over the sequence, u in (0, 1]: 0 is constant, 1 linear."""
    guidance_cosine: bool | Array = False
    """Replace u^power by (1 - cos(pi u^power)) / 2 (Gao et al. 2023, MDT)."""
    temperature: Annotated[float | Array, Range(low=0)] = 1.0
    """Divides the logits; clamped to at least 1e-5."""
    top_k: Annotated[int | Array, Range(0, LARGEST)] = 0
    """Keep the k largest logits, and ties with the k-th; 0 keeps all."""
    top_p: Annotated[float | Array, Range(0, 1)] = 1.0
    """Keep the smallest set of most probable tokens whose sum exceeds p; 1 keeps all."""
    greedy: bool | Array = False
    """Take the largest logit instead of sampling."""

    def guidance_at(self, done: Array | int, total: Array | int) -> Array:
        """The scale for the token after `done` of `total`: a scalar, or (b,)."""
        return within(self._grown((done + 1) / total), done / total, self.guidance_start, self.guidance_stop)

    def _grown(self, u: Array | float) -> Array:
        """The scale at a share u of the sequence."""
        u = u ** jnp.asarray(self.guidance_power, jnp.float32)
        u = jnp.where(self.guidance_cosine, (1 - jnp.cos(math.pi * u)) / 2, u)
        return 1 + (self.guidance - 1) * u


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaleSampler(ARSampler):
    """Options of sampling scale by scale; every field is a number, or one per image (b,), and is traced.

    The defaults are those for which VAR reports FID; to the eye a guidance of 5 to 6 is usual. Published programs
    write cfg for s - 1. Their `more_smooth` draws mixtures of vectors, which are no codes, and is not offered.
    """

    guidance: Annotated[float | Array, Range()] = dataclasses.field(default=2.5, kw_only=True)
    """Scale s of y' + s (y - y'), reached at the last scale; 1: no guidance. One number, or one per image (b,)."""
    guidance_power: Annotated[float | Array, Range(low=0)] = 1.0
    """The scale grows as 1 + (s - 1) u^power, u from 0 at the first scale to 1 at the last: 0 constant, 1 linear."""
    top_k: Annotated[int | Array, Range(0, LARGEST)] = 900
    """Keep the k largest logits, and ties with the k-th; 0 keeps all."""
    top_p: Annotated[float | Array, Range(0, 1)] = 0.96
    """Keep the smallest set of most probable tokens whose sum exceeds p; 1 keeps all."""

    def guidance_at(self, done: Array | int, total: Array | int) -> Array:
        """The scale after `done` of `total` maps of codes: a scalar, or (b,)."""
        u = done / jnp.maximum(total - 1, 1)
        return within(self._grown(u), done / total, self.guidance_start, self.guidance_stop)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamSampler(ARSampler):
    """Options of sampling codes after text in one stream, whose codes may be in clusters (Ding et al. 2022, CogView2);
    every field is a number, or one per image (b,), and is traced."""

    text_weight: Annotated[float | Array, Range()] = 0.0
    """Added to the attention scores of the tokens of the text: images follow it more."""
    top_clusters: Annotated[int | Array, Range(0, LARGEST)] = 0
    """Draw one of the clusters of largest probability, this many of them, and then a code in it, in place of top_k and
    top_p; 0: codes are drawn at once."""
    cluster_temperature: Annotated[float | Array, Range(low=0)] = 1.0
    """Also divides the logits of the codes in the drawn cluster."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CoarseToFineSampler(StreamSampler):
    """Options of sampling coarse codes in one stream, fine ones directly of them, and these again in parts (Ding et al.
    2022, CogView2); all are traced."""

    direct_temperature: Annotated[float | Array, Range(low=0)] = 1.0
    """Temperature of the fine codes."""
    direct_top_k: Annotated[int | Array, Range(0, LARGEST)] = 0
    """Keep the k largest logits of a fine code; 0 keeps all."""
    direct_top_clusters: Annotated[int | Array, Range(0, LARGEST)] = 0
    """As `top_clusters`, for fine codes."""
    direct_cluster_temperature: Annotated[float | Array, Range(low=0)] = 1.0
    """As `cluster_temperature`, for fine codes."""
    refinements: Annotated[int | Array, Range(0, LARGEST)] = 6
    """Times that a part of the fine codes is drawn again; the same for all images, at most the rounds of the model."""
    refine_temperature: Annotated[float | Array, Range(low=0)] = 1.0
    """Temperature of the codes that are drawn again."""


Shape = Literal["cosine", "linear", "power", "log", "exp"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
IN_FLOAT64 = ("cosine", "linear", "power")
"""Shapes that do not depend on the number of tokens."""


def share_hidden(
    shape: Shape,
    i: np.ndarray | Array,
    n: int = 1,
    total: Array | float = 2.0,
    power: Array | float = 2.0,
    steps: ModuleType = jnp,
) -> Array:
    """Share of `total` tokens that is still hidden after i of n steps (Chang et al. 2022, MaskGIT, 3.3).

    power: exponent of the shape of that name. steps: the module that computes, jax.numpy or NumPy, which has float64.
    """
    if shape == "cosine":
        share = steps.cos(math.pi / 2 * i / n)  # operations in the order of published samplers
    elif shape == "linear":
        share = 1 - i / n
    elif shape == "power":
        share = 1 - (i / n) ** power
    elif shape == "log":
        share = -steps.log2(i / n) / steps.log2(total)
    else:
        share = 1 - steps.exp2(-steps.log2(total) * (1 - i / n))
    return steps.clip(share, 1e-6, 1.0)


BOUND = 1024
"""Maximum number of steps of a schedule."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskedSampler(ARSampler):
    """Options of sampling tokens in sets; every field is a number, or one per image (b,), and is traced."""

    guidance_power: Annotated[float | Array, Range(low=0)] = 1.0
    """The scale grows as 1 + (s - 1) u^power with the share u of tokens known after the step: 0 constant, 1 linear."""
    iterations: Annotated[int | Array, Range(1, BOUND)] = 64
    """Number of steps, in each of which a set of tokens becomes known; the same for all images. Capped at the number of
    tokens."""
    shape: int | Array = 0
    """Shape of the schedule, an index into `SHAPES`: 0 cosine, 1 linear, 2 power, 3 log, 4 exp."""
    choice_temperature: Annotated[float | Array, Range(low=0)] = 4.5
    """Temperature of the noise on confidence, annealed to 0 at the last step."""
    power: Annotated[float | Array, Range(above=0)] = 2.0
    """Exponent of the shape `power`: 1 - u^power of the tokens are hidden after a share u of the steps."""
    start: Annotated[int | Array, Range(0, BOUND - 1)] = 0
    """First step of the schedule, the same for all images. An edit of MaskGIT begins at 2 of 12, with a choice of
    tokens that is less random, and with the share of the unknown tokens that step 2 leaves hidden."""
    original: bool | Array = False
    """Count as the released MaskGIT does: shares in fp32, whose rounding says where a share is a whole number of
    tokens, and with a token that stays hidden, and is sampled again, until the last step."""

    def arrays(self) -> MaskedSchedule:
        """The same options as arrays of one dtype per field, with their schedule.

        The schedule is computed here, in float64: whether a share of the tokens falls just short of an integer depends
        on bits that fp32 does not have. Shapes that depend on the number of tokens, log and exp, are computed in the
        program, in fp32. Errors: ValueError for too many iterations, or none, and for an unknown shape.
        """
        steps, shape, start = int(self.iterations), int(self.shape), int(self.start)
        if not 1 <= steps <= BOUND:
            raise ValueError(f"iterations {steps}: 1 to {BOUND}")
        if not 0 <= shape < len(SHAPES):
            raise ValueError(f"shape {shape}: {', '.join(f'{n} {name}' for n, name in enumerate(SHAPES))}")
        if not 0 <= start < steps:
            raise ValueError(f"start {start}: 0 to {steps - 1}, the last of the {steps} iterations")
        share = np.zeros(BOUND)
        if SHAPES[shape] in IN_FLOAT64:
            share[: steps - 1] = share_hidden(SHAPES[shape], np.arange(1, steps), steps, 2, float(self.power), np)
        high = np.round(share * 2**12) / 2**12
        return MaskedSchedule(
            **values(super().arrays()), hidden=jnp.asarray(np.stack([high, share - high]), jnp.float32)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskedSchedule(MaskedSampler):
    """Options as arrays, and the schedule of their iterations and shape."""

    hidden: Array = dataclasses.field(kw_only=True)
    """(2, steps): share of tokens hidden after each step, as a number of 12 bits and the remainder"""

    def arrays(self) -> MaskedSchedule:
        return self

    def remaining(self, step: Array, total: Array, now: Array) -> Array:
        """Tokens hidden after `step` (from 0), of `now` before it and `total` at the start, each int (b,).

        The floor of a share of the total, but at least one fewer than before and, until the last step, at least one.
        """
        high, low = self.hidden[0, step], self.hidden[1, step]
        whole = total * high  # exact in fp32 up to 4096 tokens, so the remainder decides
        floor = jnp.floor(whole)
        wanted = floor + jnp.floor(whole - floor + total * low)
        in_fp32 = self.original | (self.shape >= len(IN_FLOAT64))
        wanted = jnp.where(in_fp32, jnp.floor(total * self.share(step, total)), wanted).astype(jnp.int32)
        after = jnp.minimum(now - 1, jnp.maximum(wanted, 1))
        after = jnp.where(self.original, jnp.maximum(after, jnp.minimum(now, 1)), after)
        return jnp.maximum(jnp.where(step + 1 >= self.iterations, 0, after), 0)

    def share(self, step: Array, total: Array) -> Array:
        """Share of `total` tokens int (b,) that is hidden after `step`, in fp32 as the released MaskGIT computes it."""
        done = (step + 1) / self.iterations
        shares = [share_hidden(shape, done, 1, total.astype(jnp.float32), self.power) for shape in SHAPES]
        return jnp.stack(jnp.broadcast_arrays(*shares))[self.shape]

    def trips(self, most: Array) -> Array:
        """Number of steps that sample at most `most` tokens of an image, int scalar."""
        count = self.iterations - self.start
        return jnp.where(self.original, count, jnp.minimum(most, count))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiscreteSampler(GuidedOptions):
    """Options of discrete diffusion (`sampling.discrete`); all are traced, and guidance, truncation, top_k and
    temperature may be one per image."""

    truncation: Annotated[float | Array, Range(0, 1)] = 1.0
    """Keep the most probable codes of each p(x_0), while those before sum to less than this; 1 keeps all."""
    top_k: Annotated[int | Array, Range(0, LARGEST)] = 0
    """Keep the k most probable codes; 0 keeps all."""
    temperature: Annotated[float | Array, Range(low=0)] = 1.0
    """Use p(x_0)^(1/temperature)."""
    steps: Annotated[int | Array, Range(0, LARGEST)] = 0
    """Evaluations of the network, evenly spaced over the T times; 0 is T. With a `rule` it may exceed T."""
    stride: Annotated[int | Array, Range(0, LARGEST)] = 0
    """If not 0, visit every n-th time and then 0, and take one step n - 1 times lower, as in the authors' fast sampler,
    instead of the exact jumps that `steps` takes."""
    rule: int | Array = 0
    """0: each step samples from the posterior. Else each step samples from p(x_0), for a fixed number of the masked
    positions: 1, chosen at random; 2, by their purity max p(x_0) (Tang et al. 2022, 3.3)."""
    purity: Annotated[float | Array, Range(low=0)] = 0.0
    """With rule 2, sharpen p(x_0) to p^(1 + r score), score the purity (Tang et al. 2022, eq. 11)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiffusionSampler(GuidedOptions):
    """Options of Gaussian diffusion (`sampling.solvers`): numbers, or one per image where marked (b,); all but
    `spacing` are traced."""

    steps: Annotated[int | Array, Range(1, LARGEST)] = 50
    """Steps of the solver, at most `max_steps` of the process."""
    guidance_rescale: Annotated[float | Array, Range(0, 1)] = 0.0
    """Share of rescaling the guided prediction to the standard deviation of the unguided one, (b,); 0.7 in Lin et al.
    (2024)."""
    classifier_scale: Annotated[float | Array, Range()] = 1.0
    """Scale of the gradient of a classifier or of an image-text model, (b,), where one is given."""
    eta: Annotated[float | Array | None, Range(low=0)] = None
    """Share of new noise in each step, (b,). None: the solver's default (`solvers.default_eta`), 1 for ddpm and 0 for
    others."""
    clip: bool | Array = False
    """Clip the predicted image to [-1, 1]."""
    threshold: Annotated[float | Array, Range(0, 1)] = 0.0
    """Dynamic thresholding of models of pixels: divide the predicted image by this quantile of its absolute values,
    where that exceeds 1, and clip it (Saharia et al. 2022, Imagen, 2.3), (b,); 0: none."""
    threshold_most: Annotated[float | Array | None, Range(low=1)] = None
    """The most that dynamic thresholding divides by, (b,); None: no bound."""
    stride: bool | Array = False
    """Take every k-th of discrete steps, not the first, the last and evenly spaced ones; with the default spacing
    only."""
    noise_aug: Annotated[float | Array, Range(0, 1)] = 0.0
    """Level of the noise on the low-resolution image, (b,): hides its artefacts. A share of the root of its power, or
    of the steps of the model's `low_res_process`."""
    renew_noise_aug: bool | Array = False
    """Draw that noise anew for each step, as DeepFloyd's own program does; else once, as diffusers."""
    strength: Annotated[float | Array, Range(above=0, high=1)] = 1.0
    """Image-to-image: share of the path from noise that is run again on the given image, above 0; 1 ignores the
    image."""
    spacing: Spacing = dataclasses.field(default="default", metadata={"static": True})
    """Spacing of the stops: the process' default, even in its time, or made for few steps; those of `Named` are of one
    number of steps each. See `Spacing`."""
    guidance_low_snr: Annotated[float | Array | None, Range()] = None
    """Guide only where log(alpha^2 / sigma^2) is at least this; None: from the start. For EDM it is 2 log(data / s)."""
    guidance_high_snr: Annotated[float | Array | None, Range()] = None
    """Guide only where log(alpha^2 / sigma^2) is below this (Kynkaanniemi et al. 2024); None: to the end."""
    neighbour_guidance: Annotated[float | Array, Range()] = 3.0
    """Of a model that reads neighbours of the prompt: scale s of y' + s (y - y'), with y' predicted without them, in
    steps that guide with regard to them, (b,). In the other steps `guidance` is the scale, and y' is predicted without
    the caption. Not with a guide model, whose scale is `guidance` in all steps."""
    neighbour_share: Annotated[float | Array, Range(0, 1)] = 0.5
    """Share of the steps that guide with regard to neighbours, evenly spread among those with regard to the caption
    (Chen et al. 2022, Re-Imagen: interleaved guidance), (b,)."""
    resample: Annotated[int | Array, Range(1, 1000)] = 2
    """Inpainting only: evaluations at each stop, the solver's and before it rounds that make the rest agree with the
    known part (Lugmayr et al. 2022; `sampling.solvers.Rounds`). With 1 there are no rounds, and the rest sees half of
    what is known, however many steps there are. The error falls with rounds and with steps: `t2i bench solvers`
    measures it."""

    def check(self, most: int) -> None:
        """Check the options as far as their values are known (outside of `jit`).

        most: steps of the process. Errors: ValueError for invalid numbers.
        """
        fields, ranges = values(self), {"steps": (1, most), "strength": (0, 1), "noise_aug": (0, 1)}
        for name, (low, high) in ranges.items():
            given = fields[name]
            if isinstance(given, Tracer):
                continue
            least, largest = float(np.min(given)), float(np.max(given))
            if not (low <= least and largest <= high) or (name == "strength" and least == 0):
                odd = f"{least if least < low or largest <= high else largest:g}"
                about = f"1 to {most}, the bound of the process" if name == "steps" else f"{low} to {high}"
                raise ValueError(f"{name} {odd}: {about}{', and above 0' * (name == 'strength')}")
        if not isinstance(self.resample, Tracer) and np.min(self.resample) < 1:
            raise ValueError(f"resample {np.min(self.resample)}: at least 1, the solver's own evaluation of each step")
        if self.spacing not in (known := get_args(Spacing)):
            raise ValueError(f"spacing {self.spacing!r} is not one of {', '.join(known)}")

    @property
    def thresholds(self) -> bool:
        """Whether the predicted image is thresholded, as far as that is known (outside of `jit`)."""
        return not isinstance(self.threshold, Tracer) and bool(np.any(np.asarray(self.threshold) > 0))

    def eta_of(self, solver: str) -> Array:
        """The share of new noise in each step of a solver, a scalar or (b,)."""
        eta = jnp.asarray(math.nan if self.eta is None else self.eta, jnp.float32)
        return jnp.where(jnp.isnan(eta), default_eta(solver), eta)

    def guides_neighbours(self, done: Array | int) -> Array:
        """Whether the step after `done` others guides with regard to neighbours: a scalar, or (b,)."""
        before = lambda n: jnp.floor(n * jnp.asarray(self.neighbour_share) + 1e-4)  # shares are rounded
        return before(done + 1) > before(done)

    def with_guidance(self, of_neighbours: Array) -> Self:
        """The same options with the scale with regard to neighbours where that is in turn, bool (b,)."""
        return dataclasses.replace(self, guidance=jnp.where(of_neighbours, self.neighbour_guidance, self.guidance))

    def check_default(self, why: str, *names: str) -> None:
        """Errors: ValueError for one of these options with another value than its default, for which `why` is
        the reason; values are known outside of `jit`."""
        given, default = values(self), values(type(self)())
        for name in names:
            if isinstance(given[name], Tracer):
                continue
            if np.any(np.asarray(given[name], np.float32) != np.float32(default[name])):
                raise ValueError(f"{name} {given[name]}: {why}")

    def guidance_at(self, done: Array | int, total: Array | int, log_snr: Array | float = 0.0) -> Array:
        """The scale also depends on log(alpha^2 / sigma^2)."""
        low, high = self.guidance_low_snr, self.guidance_high_snr
        scale = super().guidance_at(done, total)
        return within(scale, log_snr, -math.inf if low is None else low, math.inf if high is None else high)

    def arrays(self) -> Self:
        """The same options as arrays: an `eta` of None becomes NaN, and bounds of None become infinite."""
        none = {"eta": math.nan, "guidance_low_snr": -math.inf, "guidance_high_snr": math.inf}
        none |= {"threshold_most": math.inf}
        given = values(self)
        missing = {k: jnp.float32(v) for k, v in none.items() if given[k] is None}
        return super(DiffusionSampler, dataclasses.replace(self, **missing)).arrays()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnCLIPSampler(DiffusionSampler):
    """Options of the decoder of unCLIP, and of its prior."""

    prior_steps: Annotated[int | Array, Range(1, LARGEST)] = 25
    """Steps of the prior's solver."""
    prior_similarity: Annotated[float | Array, Range(low=0, below=1)] = 0.5
    """For a prior that reads how similar caption and image are: it is drawn from what lies above this quantile in
    training, the upper half as in the paper."""
    prior_guidance: Annotated[float | Array, Range()] = 4.0
    """Scale of the prior's guidance; 1: no guidance. One number, or one per image (b,)."""
    image_noise: Annotated[int | Array, Range(0, LARGEST)] = 0
    """Noise level of the embedding, for a decoder that reads it noised, below the number of levels; (b,): more of it
    lets images vary more."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GANSampler(Options):
    """Options of a generator that makes an image in one evaluation; both are numbers, or one per image (b,)."""

    temperature: Annotated[float | Array, Range(low=0)] = 1.0
    """Factor of the noise: below 1 images are more alike and more typical."""
    truncation: Annotated[float | Array, Range(low=0)] = 0.0
    """Noise beyond this many standard deviations is drawn again, before the factor (Brock et al. 2019, BigGAN, 3.1);
    0: no bound."""

    def noise(self, keys: Array, size: int) -> Array:
        """One vector for each key of `keys` (b,): (b, size)."""
        bound = jnp.where(jnp.asarray(self.truncation) > 0, self.truncation, jnp.inf)
        bound = jnp.broadcast_to(bound, keys.shape).astype(jnp.float32)
        scale = jnp.broadcast_to(jnp.asarray(self.temperature, jnp.float32), keys.shape)
        draw = lambda key, bound: jax.random.truncated_normal(key, -bound, bound, (size,))
        return scale[:, None] * jax.vmap(draw)(keys, bound)


@functools.cache
def _dtypes(cls: type) -> dict[str, DTypeLike]:
    """Dtypes of the traced fields, by name."""
    hints = get_type_hints(cls, include_extras=True)
    traced = [f.name for f in dataclasses.fields(cls) if not f.metadata.get("static")]
    return {name: _dtype_of(hints[name]) for name in traced}


def _dtype_of(hint: object) -> DTypeLike:
    kinds = get_args(get_args(hint)[0] if get_origin(hint) is Annotated else hint)
    return jnp.bool_ if bool in kinds else jnp.float32 if float in kinds else jnp.int32


def validate_options(family: Family, options: O) -> O:
    """Sampling options as arrays. Errors: `ConfigError` for values that the family cannot sample with."""
    with refused("sampling options"):
        family.check(options)
        return options.arrays()


def plain_options(options: object) -> dict[str, float | str | None]:
    """Sampling options for a file: numbers as floats, names and None unchanged."""
    return {k: v if v is None or isinstance(v, str) else float(v) for k, v in values(options).items()}
