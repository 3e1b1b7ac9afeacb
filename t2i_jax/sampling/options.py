"""Options of samplers, which are traced: new values compile nothing anew."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from t2i_jax.core.fields import LARGEST, Checked, Range, values
from t2i_jax.core.types import Spacing
from t2i_jax.sampling.guidance import within
from t2i_jax.sampling.solvers import ETA


@dataclasses.dataclass(frozen=True)
class Options(Checked):
    """The base of sampling options; every field is a number, or an array with one for each image, or static."""

    def arrays(self) -> Self:
        """The same as arrays of one dtype per field, that of its annotation, so that `2` and `2.0` are one compilation;
        a field marked `static` stays as it is."""
        given = values(self)
        return dataclasses.replace(
            self, **{k: jnp.asarray(given[k], dtype) for k, dtype in _dtypes(type(self)).items()}
        )


@dataclasses.dataclass(frozen=True)
class GuidedOptions(Options):
    """The base of the options of families: those of classifier-free guidance."""

    guidance: Annotated[float | Array, Range()] = dataclasses.field(default=3.0, kw_only=True)
    """Scale s of y' + s (y - y'), with y' predicted without the condition (logits, log p, noise); 1 is none. One
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
    """How tokens are sampled one by one; every field is a number, or one per image (b,), and is traced."""

    guidance_power: Annotated[float | Array, Range(low=0)] = 0.0
    """The scale grows as 1 + (s - 1) u^power over the sequence, u in (0, 1]: 0 is constant, 1 linear."""
    guidance_cosine: bool | Array = False
    """Shape the growth by (1 - cos(pi u^power)) / 2 (Gao et al. 2023, MDT)."""
    temperature: Annotated[float | Array, Range(low=0)] = 1.0
    """Logits are divided by it; never by less than 1e-5."""
    top_k: Annotated[int | Array, Range(0, LARGEST)] = 0
    """Keep the k largest logits, and what ties with the k-th; 0 keeps all."""
    top_p: Annotated[float | Array, Range(0, 1)] = 1.0
    """Keep the smallest set of largest probabilities whose sum is above p; 1 keeps all."""
    greedy: bool | Array = False
    """Take the largest logit instead of drawing."""

    def guidance_at(self, done: Array | int, total: Array | int) -> Array:
        """The scale for the token after `done` of `total`: a scalar, or (b,)."""
        u = ((done + 1) / total) ** jnp.asarray(self.guidance_power, jnp.float32)
        u = jnp.where(self.guidance_cosine, (1 - jnp.cos(math.pi * u)) / 2, u)
        return within(1 + (self.guidance - 1) * u, done / total, self.guidance_start, self.guidance_stop)


Shape = Literal["cosine", "linear", "square"]

SHAPES: dict[Shape, Callable[[np.ndarray, int], np.ndarray]] = {
    "cosine": lambda i, n: np.cos(np.pi / 2.0 * i / n),  # operations in the order of published samplers
    "linear": lambda i, n: 1 - i / n,
    "square": lambda i, n: 1 - (i / n) ** 2,
}
"""Share of the tokens that is still hidden after i of n steps (Chang et al. 2022, MaskGIT, 3.3)."""

BOUND = 1024
"""Steps of a schedule at most."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskedSampler(ARSampler):
    """How sets of tokens are drawn; every field is a number, or one per image (b,), and is traced."""

    guidance_power: Annotated[float | Array, Range(low=0)] = 1.0
    """The scale grows as 1 + (s - 1) u^power with the share u of tokens known after the step: 0 constant, 1 linear."""
    iterations: Annotated[int | Array, Range(1, BOUND)] = 64
    """Steps in which sets of tokens become known; one for all images. More than there are tokens are as many."""
    shape: int | Array = 0
    """Which of SHAPES the sets follow: 0 cosine, 1 linear, 2 square."""
    choice_temperature: Annotated[float | Array, Range(low=0)] = 4.5
    """Of the noise on confidence, which falls to 0 at the last step."""

    def arrays(self) -> MaskedSchedule:
        """The same as arrays of one dtype per field. Errors: ValueError for too many iterations, or none, and for a
        shape that is not there.

        The schedule is made here, in float64: whether a share of the tokens falls just short of a whole number hangs on
        bits that fp32 does not have.
        """
        steps, shape = int(self.iterations), int(self.shape)
        if not 1 <= steps <= BOUND:
            raise ValueError(f"iterations {steps}: 1 to {BOUND}")
        if not 0 <= shape < len(SHAPES):
            raise ValueError(f"shape {shape}: {', '.join(f'{n} {name}' for n, name in enumerate(SHAPES))}")
        share = np.append(list(SHAPES.values())[shape](np.arange(1, steps), steps), np.zeros(BOUND + 1 - steps))
        high = np.round(share * 2**12) / 2**12
        return MaskedSchedule(
            **values(super().arrays()), hidden=jnp.asarray(np.stack([high, share - high]), jnp.float32)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskedSchedule(MaskedSampler):
    """Options as arrays, and the schedule that belongs to their iterations and shape."""

    hidden: Array = dataclasses.field(kw_only=True)
    """(2, steps): share of tokens hidden after each step, as a number of 12 bits and what is missing from it"""

    def arrays(self) -> MaskedSchedule:
        return self

    def remaining(self, step: Array, total: Array, now: Array) -> Array:
        """Tokens hidden after `step` (from 0), of `now` before it and `total` at the start, each int (b,).

        floor of a share of the total, but at least one fewer than before and, until the last step, at least one.
        """
        high, low = self.hidden[0, step], self.hidden[1, step]
        whole = total * high  # exact in fp32 up to 4096 tokens, so that what is added decides
        floor = jnp.floor(whole)
        wanted = (floor + jnp.floor(whole - floor + total * low)).astype(jnp.int32)
        after = jnp.minimum(now - 1, jnp.maximum(wanted, 1))
        return jnp.maximum(jnp.where(step + 1 >= self.iterations, 0, after), 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiscreteSampler(GuidedOptions):
    """How codes of a discrete diffusion are sampled: `sampling.discrete`; numbers, guidance, truncation,
    top_k and temperature also one per image, all traced."""

    truncation: Annotated[float | Array, Range(0, 1)] = 1.0
    """Keep of each p(x_0) the most probable codes, while those before sum to less than this; 1 keeps all."""
    top_k: Annotated[int | Array, Range(0, LARGEST)] = 0
    """Keep the k most probable codes; 0 keeps all."""
    temperature: Annotated[float | Array, Range(low=0)] = 1.0
    """p(x_0) is p^(1/temperature)."""
    steps: Annotated[int | Array, Range(0, LARGEST)] = 0
    """Evaluations of the network, evenly over the T times; 0 is T. With a `rule` it may be more than T."""
    stride: Annotated[int | Array, Range(0, LARGEST)] = 0
    """Not 0: visit every n-th time and then 0, and take one step n - 1 times lower, as the authors' fast sampler does,
    in place of the exact jumps that `steps` takes."""
    rule: int | Array = 0
    """0: each step draws from the posterior. Else it draws from p(x_0), for a fixed number of the masked positions: 1,
    chosen at random; 2, by their purity max p(x_0) (Tang et al. 2022, 3.3)."""
    purity: Annotated[float | Array, Range(low=0)] = 0.0
    """With rule 2: p(x_0) is sharpened to p^(1 + r score), score the purity (eq. 11 there)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiffusionSampler(GuidedOptions):
    """How images are sampled by a Gaussian diffusion: `sampling.solvers`; numbers, or one per image (b,) where it
    says so; all but `spacing` are traced."""

    steps: Annotated[int | Array, Range(1, LARGEST)] = 50
    """Steps of the solver, up to the bound of the process."""
    guidance_rescale: Annotated[float | Array, Range(0, 1)] = 0.0
    """How far the guided prediction gets back the spread of the unguided one, (b,) (Lin et al. 2024); 0.7 is theirs."""
    classifier_scale: Annotated[float | Array, Range()] = 1.0
    """Scale of the gradient of a classifier or of an image-text model, (b,), where one is given."""
    eta: Annotated[float | Array | None, Range(low=0)] = None
    """Share of new noise in each step, (b,). None: what the solver's name says, 1 for ddpm and 0 for ddim and dpm++."""
    clip: bool | Array = False
    """Keep the picture that the network has in mind within [-1, 1]."""
    stride: bool | Array = False
    """Of discrete steps take every k-th, not the first, the last and those evenly between; with the default spacing."""
    noise_aug: Annotated[float | Array, Range(0, 1)] = 0.0
    """Noise on the small picture that is enlarged, a share of its power's root, (b,): hides what is wrong in it."""
    strength: Annotated[float | Array, Range(above=0, high=1)] = 1.0
    """Of a given picture: how much of the way from noise is gone again, above 0; 1 forgets it."""
    spacing: Spacing = dataclasses.field(default="default", metadata={"static": True})
    """Where the stops are: as the process has them, even in its time, or spaced for fewer steps; see `Spacing`."""
    guidance_low_snr: Annotated[float | Array | None, Range()] = None
    """Guide only where log(alpha^2 / sigma^2) is at least this; None: from noise on. For EDM it is 2 log(data / s)."""
    guidance_high_snr: Annotated[float | Array | None, Range()] = None
    """Guide only where log(alpha^2 / sigma^2) is below this (Kynkaanniemi et al. 2024); None: to the end."""
    resample: Annotated[int | Array, Range(1, 1000)] = 2
    """Evaluations at each stop where part of a picture is kept: the solver's, and rounds before it that bring the rest
    to agree (Lugmayr et al. 2022; `sampling.solvers.Rounds`). 1 has no rounds: then the rest sees half of what is
    known, however many steps there are. What remains falls with rounds and with steps: `t2i bench solvers` measures
    it."""

    def check(self, most: int) -> None:
        """Errors: ValueError for numbers that mean nothing, as far as they are known, that is outside of `jit`.

        most: steps of the process.
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
        if self.spacing not in get_args(Spacing):
            raise ValueError(f"spacing {self.spacing!r} is not one of {', '.join(get_args(Spacing))}")

    def eta_of(self, solver: str) -> Array:
        """The share of new noise in each step of a solver, a scalar or (b,)."""
        eta = jnp.asarray(math.nan if self.eta is None else self.eta, jnp.float32)
        return jnp.where(jnp.isnan(eta), ETA[solver], eta)

    def guidance_at(self, done: Array, total: Array | int, log_snr: Array | float = 0.0) -> Array:
        """The scale also depends on log(alpha^2 / sigma^2)."""
        low, high = self.guidance_low_snr, self.guidance_high_snr
        scale = super().guidance_at(done, total)
        return within(scale, log_snr, -math.inf if low is None else low, math.inf if high is None else high)

    def arrays(self) -> Self:
        """The same options as arrays: an `eta` of None is NaN, and bounds that are None are infinite."""
        none = {"eta": math.nan, "guidance_low_snr": -math.inf, "guidance_high_snr": math.inf}
        given = values(self)
        missing = {k: jnp.float32(v) for k, v in none.items() if given[k] is None}
        return super(DiffusionSampler, dataclasses.replace(self, **missing)).arrays()


@functools.cache
def _dtypes(cls: type) -> dict[str, Any]:
    """Dtypes of the traced fields, by name."""
    hints = get_type_hints(cls, include_extras=True)
    traced = [f.name for f in dataclasses.fields(cls) if not f.metadata.get("static")]
    return {name: _dtype_of(hints[name]) for name in traced}


def _dtype_of(hint: Any) -> Any:
    kinds = get_args(get_args(hint)[0] if get_origin(hint) is Annotated else hint)
    return jnp.bool_ if bool in kinds else jnp.float32 if float in kinds else jnp.int32
