"""Interfaces of what is trained: families, codecs and classifiers.

Protocols are for readers and the type checker. At run time objects are not inspected: a config declares what it can do
(`Capabilities`), and `core/narrow.py` has one function per capability, which narrows its type.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, ClassVar, Generic, Literal, NamedTuple, Protocol, Self, TypeVar

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from t2i_jax.core.conditions import Batch
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import FREE, Checked
from t2i_jax.core.noise import NoiseProcess
from t2i_jax.core.specs import BatchSpec, CodecSpec, SampleSpec

M = TypeVar("M", bound=nnx.Module)
"""the module of a model, with its parameters"""
M_co = TypeVar("M_co", bound=nnx.Module, covariant=True)
O = TypeVar("O", bound="SamplingOptions")
"""the options of a family's sampler"""
B = TypeVar("B", contravariant=True)
"""the batch of a loss: `Batch`, or a TypedDict where it also has frozen networks or shared outputs"""
S = TypeVar("S", bound="DecodeState")
"""the state of a network that decodes token by token"""
N = TypeVar("N", bound="CachedNetwork")
"""a network that decodes token by token"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """The argument `progress` of `Family.sample`: the call to report to, a traced number.

    None in its place makes a program without callbacks. A program with one is not stored in the compilation cache.
    """

    call: Array | np.integer
    """scalar int32"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Toward:
    """The argument `toward` of `Interpolates.sample`: the other end of an interpolation, and how far on the way."""

    condition: Batch
    """the condition at the other end, a row for each image"""
    keys: Array
    """(b,)"""
    share: Array
    """(b,) in [0, 1]: 0 is the condition and the key of the call itself, 1 those here"""


Once = float | Sequence[tuple[int, ...]]
"""How often a loop runs: a number, or for each time which branches the conds of its body take, in their order."""


@dataclasses.dataclass(frozen=True)
class InTurn:
    """How often each of several loops runs, which follow one another in a program."""

    each: tuple[Trips, ...]

    @property
    def flat(self) -> tuple[Once, ...]:
        """The same of single loops."""
        return tuple(own for trips in self.each for own in loops_of(trips))


Trips = Once | InTurn


def loops_of(trips: Trips) -> tuple[Once, ...]:
    """How often each loop runs."""
    return trips.flat if isinstance(trips, InTurn) else (trips,)


# -- training


class LossOutput(NamedTuple):
    """The result of a loss."""

    loss: Array
    """scalar, fp32"""
    metrics: Mapping[str, Array]
    """scalars by name"""
    state: nnx.Module | None = None
    """the model with new non-trainable state (codebook averages, running statistics), or None. Arrays identical to the
    model's own are not written; no two objectives may write the same one"""


@dataclasses.dataclass(frozen=True)
class Objective(Generic[M, B]):
    """A loss and the parameters that it trains; an ordinary model has one objective.

    All objectives of a model get the same batch and key in a step. Their gradients are taken at the same parameters and
    their updates applied together, except for those that are `after` others.
    """

    loss: Callable[[M, B, Array, Array, bool], LossOutput]
    """(model, batch, key, step, train) -> `LossOutput`; train is static, and False for held-out data, without dropout
    or corruption of the inputs. The batch has `outputs` if the model has a shared forward pass"""
    params: tuple[str, ...] = ()
    """dotted names, or prefixes, of the trained parameters, such as `decoder.out`; (): all of them"""
    optimizer: str = ""
    """name of the optimiser and of its state, by default that of the objective; objectives with the same parameters may
    share one, which then makes one update for each"""
    every: int = 1
    """update in steps 1, 2, ... that this divides; in others the gradient is not computed and the optimiser, whose
    schedule counts its own updates, does not change"""
    after: tuple[str, ...] = ()
    """objectives whose updates of the same step this loss depends on: it is computed in a later stage, after all
    updates of the stages before"""
    start: int = 0
    """step at which training begins: before it neither the parameters nor the optimiser's state change; the
    learning-rate schedule counts from it"""


def single_objective(loss: Callable[[M, Batch, Array, bool], LossOutput]) -> dict[str, Objective[M, Batch]]:
    """The objectives of a model with one loss (model, batch, key, train) that trains all its parameters."""
    return {"model": Objective(lambda model, batch, key, step, train: loss(model, batch, key, train))}


Remat = Literal["none", "full", "dots", "branches"]
"""What a layer keeps for its backward pass: see `nn.transformer.REMAT`."""
AttentionKind = Literal["auto", "plain", "cudnn", "splash"]
"""Implementation of attention: "plain" einsums, "cudnn" on GPUs, "splash" on TPUs; "auto": by platform and length."""


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """Capabilities of a config besides training; flags name their Protocol."""

    family: bool = False
    """`Family`: samples images, or their codes"""
    codec: bool = False
    """`Codec`: images to codes and back"""
    classifier: bool = False
    """`Classifier`: log p(condition | noised image), whose gradient guides a diffusion"""
    reference: bool = False
    """a `Classifier` whose `log_p` reads `reference`, a noised image (b, i, j, c) that x is to be like, and
    `reference_weights` (b, 3), of the condition, of the agreement with the reference, and of the distance of layouts"""
    image_text: bool = False
    """encodes images and captions in one space, where `evaluation.matching` compares them"""
    frozen_networks: bool = False
    """`UsesFrozenNetworks`: a loss reads frozen networks"""
    shared_forward: bool = False
    """`SharesForward`: all objectives read the outputs of one forward pass"""
    measures_scale: bool = False
    """`MeasuresScale`: a codec whose codes are shifted and scaled"""

    unconditional: bool = False
    """has learned an unconditional branch, which `sample` guides by unless `guided` is False"""
    guidance: bool = False
    """the options have a scale `guidance`, and `sample` takes `guided`: False skips the unconditional branch"""
    neighbours: bool = False
    """reads images with captions near to the prompt, with regard to which its options have a scale
    `neighbour_guidance`"""
    token_by_token: bool = False
    """`TokenByToken`: samples with a key-value cache, one token per step"""
    likelihood: bool = False
    """`Likelihood`: log p(codes | condition)"""
    inpaint: bool = False
    """`sample` takes `known` and `keep`: samples (b, *grid, ...), and a bool (b, rows, columns) of tokens to keep"""
    inpaint_prefix: bool = False
    """it can keep only the first tokens in raster order"""
    negative: bool = False
    """`sample` takes `negative`, a condition whose branch takes the place of the unconditional one"""
    init_image: bool = False
    """`sample` takes `known` without `keep`, and its options have a `strength`"""
    super_resolution: bool = False
    """enlarges a small image, `low_res` of its condition, or its codes, `low_codes`"""
    classifier_guidance: bool = False
    """`GaussianFamily`, whose `sample` takes a classifier"""
    autoguidance: bool = False
    """`GaussianFamily`, whose `sample` takes a weaker model in place of the unconditional branch"""
    any_size: bool = False
    """`AnySize`: the same parameters serve samples of another grid"""
    fitted: bool = False
    """`Fitted`: has state that is computed from training examples before the first step"""
    reads_codec: bool = False
    """`ReadsCodec`: its network reads vectors of its codec, which it keeps a copy of"""
    token_head: bool = False
    """its field `head` samples each token: a `heads.TokenHead`, which may be replaced"""
    int8: bool = False
    """samples with int8 matrices"""
    image_embedding: bool = False
    """`sample` takes `image_features`, embeddings (b, k) of images in place of those that it draws"""
    interpolation: bool = False
    """`Interpolates`: `sample` takes `toward`, another condition and other noise"""

    remat: tuple[Remat, ...] = ()
    """choices of `compute.remat` besides none"""
    attention: bool = False
    """`compute.attention` may be chosen"""
    loss_chunk: bool = False
    """`compute.loss_chunk` may be chosen"""


@dataclasses.dataclass(frozen=True)
class Compute(Checked):
    """Numerics and memory options of a model; they do not change what it computes."""

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """dtype of matrix products and activations; parameters, norms, logits and losses are fp32. float64: codecs only"""
    remat: Annotated[Remat, FREE] = "none"
    """activations that each layer stores for its backward pass"""
    attention: AttentionKind = "auto"
    """implementation of self-attention over whole sequences"""
    loss_chunk: Annotated[int, FREE] = 0
    """tokens per image whose logits are in memory at a time; 0: all, or as `nn.losses.MOST_LOGITS` allows; below
    0: all"""

    def check(self, capabilities: Capabilities, float64: bool = False) -> None:
        """Errors: `ConfigError` for an option that a model of these capabilities does not have."""
        plain = Compute()
        if self.dtype == "float64" and not float64:
            raise ConfigError("compute.dtype 'float64': this model computes in float32 or bfloat16")
        if self.remat != plain.remat and self.remat not in capabilities.remat:
            choices = ", ".join(("none", *capabilities.remat))
            raise ConfigError(f"compute.remat {self.remat!r}: this model has {choices}")
        if self.attention != plain.attention and not capabilities.attention:
            raise ConfigError(f"compute.attention {self.attention!r}: this model leaves no choice of it")
        if self.loss_chunk != plain.loss_chunk and not capabilities.loss_chunk:
            raise ConfigError(f"compute.loss_chunk {self.loss_chunk}: this model has no logits to compute in chunks")


class Trainable(Protocol[M_co]):
    """A frozen config of something trainable: a family, a codec, a classifier."""

    @property
    def capabilities(self) -> Capabilities:
        """Capabilities, computed from the config, never a field of it."""
        ...

    @property
    def compute(self) -> Compute: ...

    def with_compute(self, compute: Compute) -> Self:
        """The same model with other compute options. Errors: `ConfigError` for an option that the config does not
        have."""
        ...

    def batch_spec(self) -> BatchSpec:
        """Fields that a batch must have."""
        ...

    def init(self, key: Array) -> M_co:
        """A model with fresh parameters."""
        ...

    def objectives(self) -> Mapping[str, Objective]: ...


class SamplingOptions(Protocol):
    """Options of a sampler: numbers, or arrays with one per image."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]

    def arrays(self) -> Self:
        """The same options as traced arrays: new values do not recompile."""
        ...


class Family(Trainable[M], Protocol[M, O]):
    """The config of a generative model."""

    def sample_spec(self) -> SampleSpec: ...

    def condition_spec(self) -> BatchSpec:
        """The fields of `batch_spec` that are the condition of `sample`."""
        ...

    def options(self) -> O:
        """Default options."""
        ...

    def check(self, options: O) -> None:
        """Check sampling options. Errors: `ConfigError` or `ValueError` for options that cannot be sampled with."""
        ...

    def loop_trips(self, options: O) -> Trips:
        """Trip count of the sampler's loop for these options, or of each of its loops; or the sizes that each step
        uses, where it selects among compiled ones (`flops.count`)."""
        ...

    def sample(
        self,
        model: M,
        condition: Batch,
        keys: Array,
        options: O | None = None,
        *,
        guided: bool | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Samples as in `sample_spec`, one for each row of the condition and each key of `keys` (b,).

        guided: whether to compute the unconditional branch; False disables guidance at half the cost, None: if one was
            learned.
        progress: a `Progress` to report (done, total, sample) to, by `report`: steps of this sampler,
            and the samples so far; a pytree.
        """
        ...


class DecodeState(Protocol):
    """The caches of a network that decodes token by token, and what else its next step reads: a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]

    @property
    def caches(self) -> object:
        """A pytree of arrays, which each step updates."""
        ...

    def grow(self, count: int) -> Self:
        """The same state with room for `count` tokens of the image."""
        ...


class CachedNetwork(nnx.Module, Generic[S]):
    """A network that predicts the tokens of an image one by one, and keeps what it computed of those before."""

    @abc.abstractmethod
    def prefill(self, condition: Batch, dropped: Array) -> tuple[Array, S]:
        """Logits (b, v) of token 0, and the state; dropped: bool (b,), rows without their condition."""

    @abc.abstractmethod
    def decode(self, state: S, codes: Array, i: Array | int) -> tuple[Array, S]:
        """Logits (b, v) of token i + 1 from the codes int (b,) of token i, and the new state."""


class TokenByToken(Family[N, O], Protocol[N, O]):
    """A family that samples one token per step with the key-value cache of its network."""

    @property
    def length(self) -> int:
        """Number of tokens of an image."""
        ...


class GaussianFamily(Family[M, O], Protocol[M, O]):
    """A Gaussian diffusion, whose predictions other models can guide."""

    @property
    def process(self) -> NoiseProcess: ...

    @property
    def predicts(self) -> str:
        """Prediction type of the network: a `noise.gaussian.Predicts`."""
        ...

    @property
    def solver(self) -> str: ...


class Likelihood(Family[M, O], Protocol[M, O]):
    """A family that computes the probability of an image's codes."""

    def log_likelihood(self, model: M, batch: Batch) -> Array:
        """log p(codes | condition) of each image in nats: (b,) fp32."""
        ...


class ReadsCodec(Family[M, O], Protocol[M, O]):
    """A family whose network reads the vectors of its codec: the model holds a copy of them, which is not trained."""

    def with_codec(self, model: M, codec: Codec, weights: nnx.Module) -> M:
        """The model with the vectors of a codec, from its configuration and weights; traced or not.

        Errors: `ConfigError` for a codec of another kind, or whose vectors have other shapes.
        """
        ...


class AnySize(Family[M, O], Protocol[M, O]):
    """A family whose parameters do not depend on the grid of its samples."""

    def sized(self, grid: tuple[int, int]) -> Self:
        """The same family with samples of `grid`, rows and columns as in `sample_spec`. Errors: `ConfigError` or
        `ValueError` for a grid that it cannot have."""
        ...

    def adopt(self, model: M) -> M:
        """A model of this family from one of another grid: its parameters, with positions of this grid."""
        ...


class Fitted(Trainable[M], Protocol[M]):
    """A model with state that is computed from training examples before the first step: principal axes, statistics."""

    @property
    def fit_examples(self) -> int:
        """Number of examples that it is computed from."""
        ...

    @property
    def fit_fields(self) -> tuple[str, ...]:
        """Fields of a training batch that it is computed from."""
        ...

    def fitted(self, model: M, batches: Iterable[Mapping[str, np.ndarray]]) -> M:
        """The model with this state, of batches on the host. Errors: `ConfigError` for examples that do not do."""
        ...


class Interpolates(Family[M, O], Protocol[M, O]):
    """A family whose images change smoothly with the condition and the noise."""

    def sample(
        self,
        model: M,
        condition: Batch,
        keys: Array,
        options: O | None = None,
        *,
        guided: bool | None = None,
        progress: Progress | None = None,
        toward: Toward | None = None,
    ) -> Array:
        """As `Family.sample`; toward: draw images between this condition and noise, and others."""
        ...


class Classifier(Trainable[M], Protocol[M]):
    """A classifier, or an image-text model, of noised images."""

    @property
    def process(self) -> NoiseProcess: ...

    def log_p(self, model: M, x: Array, t: Array, condition: Batch) -> Array:
        """log p(condition | x) (b,) up to a constant, of noised images x at network times t (b,)."""
        ...


class UsesFrozenNetworks(Trainable[M_co], Protocol[M_co]):
    """A model whose loss reads frozen networks, as `batch["frozen"]`."""

    def frozen(self) -> object:
        """The networks: a pytree of arrays."""
        ...


class SharesForward(Trainable[M], Protocol[M, B]):
    """A model whose objectives read the outputs of one forward pass, as `batch["outputs"]`; gradients flow through it
    to those parameters of an objective that it depends on."""

    def forward(self, model: M, batch: B, key: Array, step: Array, train: bool) -> object:
        """The outputs: a pytree of arrays; arguments as for `Objective.loss`."""
        ...


class Codec(Trainable[M], Protocol[M]):
    """Images to codes and back."""

    @property
    def spec(self) -> CodecSpec: ...

    def encode(self, model: M, images: Array, key: Array | None = None) -> Array:
        """Images float (b, i, j, 3) in [-1, 1] -> codes; sampled with the key if their distribution is not a point."""
        ...

    def decode(self, model: M, codes: Array) -> Array:
        """Codes -> images float (b, i, j, 3), approximately in [-1, 1]."""
        ...

    def to_store(self, model: M, images: Array) -> dict[str, Array]:
        """What `t2i encode` stores of images, by field name of a batch."""
        ...


class MeasuresScale(Codec[M], Protocol[M]):
    """A codec whose codes are (latent - shift) scale, with its fields `scale` and `shift`."""

    def measure(self, model: M, batches: Iterable[ArrayLike]) -> tuple[float, float]:
        """(scale, shift) that give codes of these images, batches of (b, i, j, 3), mean 0 and variance 1."""
        ...
