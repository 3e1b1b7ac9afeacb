"""Interfaces of families, codecs, text encoders, heads, conditions and noise processes.

Protocols are for readers and the type checker. At run time objects are not inspected: a config declares what it can do
(`Capabilities`, `TextSpec`), and one function per capability narrows its type, or raises `ConfigError` if it is not
declared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeVar, cast

import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from t2i_jax.core.errors import ConfigError
from t2i_jax.core.specs import BatchSpec, CodecSpec, SampleSpec

M = TypeVar("M", bound=nnx.Module)

Batch = Mapping[str, Array]
"""Arrays by name, each with the batch dimension first."""


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
class Objective:
    """A loss and the parameters that it trains; an ordinary model has one objective.

    All objectives of a model get the same batch and key in a step. Their gradients are taken at the same parameters and
    their updates applied together, except for those that are `after` others.
    """

    loss: Callable[[Any, Any, Array, Array, bool], LossOutput]
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


def single_objective(loss: Callable[[Any, dict[str, Array], Array, bool], LossOutput]) -> dict[str, Objective]:
    """The objectives of a model with one loss (model, batch, key, train) that trains all its parameters."""
    return {"model": Objective(lambda model, batch, key, step, train: loss(model, batch, key, train))}


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """Capabilities of a config besides training; flags name their Protocol."""

    family: bool = False
    """`Family`: samples images, or their codes"""
    codec: bool = False
    """`Codec`: images to codes and back"""
    classifier: bool = False
    """`Classifier`: log p(condition | noised image), whose gradient guides a diffusion"""
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
    token_by_token: bool = False
    """`TokenByToken`: samples with a key-value cache, one token per step"""
    likelihood: bool = False
    """`Likelihood`: log p(codes | condition)"""
    inpaint: bool = False
    """`sample` takes `known` and `keep`: samples (b, *grid, ...), and a bool (b, rows, columns) of tokens to keep"""
    inpaint_prefix: bool = False
    """it can keep only the first tokens in raster order"""
    init_image: bool = False
    """`sample` takes `known` without `keep`, and its options have a `strength`"""
    super_resolution: bool = False
    """upsamples a low-resolution image, `low_res` of its condition"""
    classifier_guidance: bool = False
    """`GaussianFamily`, whose `sample` takes a classifier"""
    autoguidance: bool = False
    """`GaussianFamily`, whose `sample` takes a weaker model in place of the unconditional branch"""
    token_head: bool = False
    """its field `head` samples each token: a `heads.TokenHead`, which may be replaced"""
    int8: bool = False
    """samples with int8 matrices"""


@dataclasses.dataclass(frozen=True)
class Compute:
    """Numerics and memory options of a model; they do not change what it computes."""

    dtype: str = "float32"
    """dtype of matrix products and activations"""
    remat: str = ""
    """what a layer keeps for its backward pass, one of `remats`; empty if there is no choice"""
    attention: str = ""
    """implementation of attention, a `nn.kernels.Kind`; empty if there is no choice"""
    loss_chunk: int = 0
    """tokens per image whose logits are held at a time; 0: as many as fit the memory limit"""
    remats: tuple[str, ...] = ("none", "full", "dots", "branches")

    def changes(self, new: Compute, *same: str, **others: str) -> dict[str, Any]:
        """The field values to replace in a config so that it computes as `new`, by name.

        same: fields with the same name in the config; others: fields with other names. Errors: `ConfigError` for a
        change without a field.
        """
        mine, theirs, fields = dataclasses.asdict(self), dataclasses.asdict(new), {name: name for name in same} | others
        for name, value in theirs.items():
            if value != mine[name] and name not in fields:
                raise ConfigError(f"{name} {value!r}: this model leaves no choice of it")
        return {field: theirs[name] for name, field in fields.items()}


class Trainable(Protocol):
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

    def init(self, key: Array) -> nnx.Module:
        """A model with fresh parameters."""
        ...

    def objectives(self) -> Mapping[str, Objective]: ...


class SamplingOptions(Protocol):
    """Options of a sampler: numbers, or arrays with one per image."""

    def arrays(self) -> Any:
        """The same options as traced arrays: new values do not recompile."""
        ...


class Family(Trainable, Protocol):
    """The config of a generative model."""

    def sample_spec(self) -> SampleSpec: ...

    def condition_spec(self) -> BatchSpec:
        """The fields of `batch_spec` that are the condition of `sample`."""
        ...

    def options(self) -> Any:
        """Default `SamplingOptions`."""
        ...

    def check(self, options: Any) -> None:
        """Check sampling options. Errors: `ConfigError` or `ValueError` for options that cannot be sampled with."""
        ...

    def loop_trips(self, options: Any) -> int | Sequence[tuple[int, ...]]:
        """Trip count of the sampler's loop for these options; or the sizes that each of its steps uses, where a step
        selects among compiled ones (`flops.count`)."""
        ...

    def sample(
        self,
        model: Any,
        condition: Batch,
        keys: Array,
        options: Any = None,
        *,
        guided: bool | None = None,
        progress: Any = None,
    ) -> Array:
        """Samples as in `sample_spec`, one for each row of the condition and each key of `keys` (b,).

        guided: whether to compute the unconditional branch; False disables guidance at half the cost, None: if one was
            learned.
        progress: a `sampling.progress.Progress` to report (done, total, sample) to, by `report`: steps of this sampler,
            and the samples so far; a pytree.
        """
        ...


class TokenByToken(Family, Protocol):
    """A family that samples one token per step with a key-value cache."""

    @property
    def length(self) -> int:
        """Number of tokens of an image."""
        ...

    def prefill(self, model: Any, condition: Batch, dropped: Array) -> tuple[Array, Any]: ...

    def decode(self, *arguments: Any, **options: Any) -> Any: ...


class GaussianFamily(Family, Protocol):
    """A Gaussian diffusion, whose predictions other models can guide."""

    @property
    def process(self) -> NoiseProcess: ...

    @property
    def predicts(self) -> str:
        """Prediction type of the network: a `noise.gaussian.Predicts`."""
        ...

    @property
    def solver(self) -> str: ...


class Likelihood(Family, Protocol):
    """A family that computes the probability of an image's codes."""

    def log_likelihood(self, model: Any, batch: Batch) -> Array:
        """log p(codes | condition) of each image in nats: (b,) fp32."""
        ...


class Classifier(Trainable, Protocol):
    """A classifier, or an image-text model, of noised images."""

    @property
    def process(self) -> NoiseProcess: ...

    def log_p(self, model: Any, x: Array, t: Array, condition: Batch) -> Array:
        """log p(condition | x) (b,) up to a constant, of noised images x at network times t (b,)."""
        ...


class UsesFrozenNetworks(Trainable, Protocol):
    """A model whose loss reads frozen networks, as `batch["frozen"]`."""

    def frozen(self) -> Any:
        """The networks: a pytree of arrays."""
        ...


class SharesForward(Trainable, Protocol):
    """A model whose objectives read the outputs of one forward pass, as `batch["outputs"]`; gradients flow through it
    to those parameters of an objective that it depends on."""

    def forward(self, model: Any, batch: Any, key: Array, step: Array, train: bool) -> Any:
        """The outputs: a pytree of arrays; arguments as for `Objective.loss`."""
        ...


class Codec(Trainable, Protocol):
    """Images to codes and back."""

    @property
    def spec(self) -> CodecSpec: ...

    def encode(self, model: Any, images: Array, key: Array | None = None) -> Array:
        """Images float (b, i, j, 3) in [-1, 1] -> codes; sampled with the key if their distribution is not a point."""
        ...

    def decode(self, model: Any, codes: Array) -> Array:
        """Codes -> images float (b, i, j, 3), approximately in [-1, 1]."""
        ...

    def to_store(self, model: Any, images: Array) -> dict[str, Array]:
        """What `t2i encode` stores of images, by field name of a batch."""
        ...


class MeasuresScale(Codec, Protocol):
    """A codec whose codes are (latent - shift) scale, with its fields `scale` and `shift`."""

    def measure(self, model: Any, batches: Iterable[Any]) -> tuple[float, float]:
        """(scale, shift) that give codes of these images, batches of (b, i, j, 3), mean 0 and variance 1."""
        ...


def as_trainable(value: object) -> Trainable:
    """Narrow a value of a config file to `Trainable`. Errors: `ConfigError` if it declares no `Capabilities`."""
    # The only place that inspects a model of unknown type; afterwards the type is known.
    if not isinstance(getattr(value, "capabilities", None), Capabilities):
        raise ConfigError(f"{value!r}: a family or a codec")
    return cast(Trainable, value)


def _narrow(config: Trainable, flag: str, what: str) -> Any:
    if not dataclasses.asdict(config.capabilities)[flag]:
        raise ConfigError(f"a {type(config).__name__} {what}")
    return config


def as_family(config: Trainable) -> Family:
    """Narrow to `Family`. Errors: `ConfigError` for a config that does not sample."""
    return cast(Family, _narrow(config, "family", "does not sample images"))


def as_codec(config: Trainable) -> Codec:
    """Narrow to `Codec`. Errors: `ConfigError` for a config that is not a codec."""
    return cast(Codec, _narrow(config, "codec", "is no codec"))


def check_codes(family: Family, codec: Codec, name: str, exact: bool = False) -> None:
    """Check that the codec `name` matches the codes that a family samples.

    A family may have more codes than its codec, such as a start token or a padded table, unless `exact`. Errors:
    `ConfigError` if they do not match.
    """
    ours, theirs = family.sample_spec().code, codec.spec.code
    fits = (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and all(
        a >= b for a, b in zip(ours.sizes, theirs.sizes, strict=True)
    )
    if ours != theirs if exact else not fits:
        raise ConfigError(f"{name} has {theirs}, the model {ours}: this is not its codec")


def uses_frozen_networks(config: Trainable) -> UsesFrozenNetworks:
    """Narrow to `UsesFrozenNetworks`. Errors: `ConfigError` for a config whose losses read no frozen networks."""
    return cast(UsesFrozenNetworks, _narrow(config, "frozen_networks", "has no frozen networks"))


def shares_forward(config: Trainable) -> SharesForward:
    """Narrow to `SharesForward`. Errors: `ConfigError` for a config whose objectives share no forward pass."""
    return cast(SharesForward, _narrow(config, "shared_forward", "has no forward pass that its objectives share"))


def measures_scale(config: Trainable) -> MeasuresScale:
    """Narrow to `MeasuresScale`. Errors: `ConfigError` for a config whose codes have no scale."""
    return cast(MeasuresScale, _narrow(config, "measures_scale", "has no scale of its codes"))


def as_classifier(config: Trainable) -> Classifier:
    """Narrow to `Classifier`. Errors: `ConfigError` for a config that is not a classifier of noised images."""
    return cast(Classifier, _narrow(config, "classifier", "does not classify noised images"))


def token_by_token(config: Trainable) -> TokenByToken:
    """Narrow to `TokenByToken`. Errors: `ConfigError` for a config that does not sample token by token."""
    return cast(TokenByToken, _narrow(config, "token_by_token", "does not sample token by token"))


def likelihood(config: Trainable) -> Likelihood:
    """Narrow to `Likelihood`. Errors: `ConfigError` for a config that computes no probabilities."""
    return cast(Likelihood, _narrow(config, "likelihood", "does not give the likelihood of an image"))


def inpainting(config: Trainable) -> Family:
    """Check for inpainting. Errors: `ConfigError` for a config that cannot keep a part of an image."""
    return cast(Family, _narrow(config, "inpaint", "keeps no part of an image"))


def image_to_image(config: Trainable) -> Family:
    """Check for image-to-image sampling. Errors: `ConfigError` for a config that cannot start from an image."""
    what = "keeps nothing of an image without a mask; a Gaussian diffusion can"
    return cast(Family, _narrow(config, "init_image", what))


def super_resolution(config: Trainable) -> Family:
    """Check for super-resolution. Errors: `ConfigError` for a config that does not upsample images."""
    return cast(Family, _narrow(config, "super_resolution", "reads no 'low_res', so it cannot make images larger"))


def classifier_guided(config: Trainable) -> GaussianFamily:
    """Check for classifier guidance. Errors: `ConfigError` for a config that does not support it."""
    what = "is not guided by a classifier; a Gaussian diffusion is"
    return cast(GaussianFamily, _narrow(config, "classifier_guidance", what))


def autoguided(config: Trainable) -> GaussianFamily:
    """Check for autoguidance. Errors: `ConfigError` for a config that can neither be guided by a weaker model nor be
    one."""
    what = "cannot guide, nor be guided by, a weaker model; a Gaussian diffusion can"
    return cast(GaussianFamily, _narrow(config, "autoguidance", what))


def int8_sampling(config: Trainable) -> Family:
    """Check for int8 sampling. Errors: `ConfigError` for a config that does not sample with int8 weights."""
    return cast(Family, _narrow(config, "int8", "has no int8 weights: they are for models that sample token by token"))


# -- text


class Tokenizer(Protocol):
    """Captions to token ids, on the host."""

    @property
    def spec(self) -> TextSpec: ...

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """n captions -> ids int32 (n, s) and a mask bool (n, s)."""
        ...


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """Capabilities of a tokenizer besides token ids; known without loading its files.

    Fields of a tokenizer that name files are marked in their types (`core.fields.File`).
    """

    features: bool = False
    """`TextEncoder`: computes features of ids, so models do not embed the ids"""
    image_features: bool = False
    """`ImageTextEncoder`: images have features in the same space, which replace those of captions in training"""
    limited: bool = False
    """`text.cut.Limited`: counts the tokens of a caption that are cut off"""


class TextEncoder(Tokenizer, Protocol[M]):
    """A frozen text encoder with parameters M."""

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Number of vectors per caption, and their size."""
        ...

    def load(self) -> M:
        """The parameters, on the host. Errors: FileNotFoundError; ValueError for files of another kind."""
        ...

    def features(self, model: M, ids: Array, mask: Array) -> Array:
        """Token ids and mask (b, s) -> features (b, s', k)."""
        ...


class ImageTextEncoder(TextEncoder[M], Protocol):
    """A frozen encoder of captions and images into a shared space."""

    def image_features(self, model: M, images: Array) -> Array:
        """Images float (b, i, j, 3) in [-1, 1] -> features (b, 1, k)."""
        ...


def as_tokenizer(value: object) -> Tokenizer:
    """Narrow a value of a config file to `Tokenizer`. Errors: `ConfigError` if it declares no `TextSpec`."""
    # The only place that inspects a text of unknown type; afterwards the type is known.
    if not isinstance(getattr(value, "spec", None), TextSpec):
        raise ConfigError(f"{value!r} is no tokenizer: its `spec` is no TextSpec")
    return cast(Tokenizer, value)


def gives_features(text: Tokenizer | None) -> bool:
    return text is not None and text.spec.features


def learns_from_images(text: Tokenizer | None) -> bool:
    """Whether training reads features of images, and captions are read only in sampling."""
    return text is not None and text.spec.image_features


def text_encoder(text: Tokenizer | None) -> TextEncoder[nnx.Module]:
    """Narrow to `TextEncoder`. Errors: `ConfigError` for a tokenizer without features, and if there is no text."""
    if not gives_features(text):
        raise ConfigError(f"{_named(text)} gives no features: a frozen text encoder is wanted")
    return cast(TextEncoder[nnx.Module], text)


def image_text_encoder(text: Tokenizer | None) -> ImageTextEncoder[nnx.Module]:
    """Narrow to `ImageTextEncoder`. Errors: `ConfigError` for a text that does not read images."""
    if not learns_from_images(text):
        raise ConfigError(f"{_named(text)} gives no features of images: an encoder of both is wanted, as ClipEmbedding")
    return cast(ImageTextEncoder[nnx.Module], text)


def _named(text: Tokenizer | None) -> str:
    return "no text" if text is None else f"text: a {type(text).__name__}"


# -- conditions


@dataclasses.dataclass(frozen=True)
class ConditionSpec:
    """Properties of a condition besides its tokens."""

    has_null: bool = True
    """the unconditional tokens do not depend on the batch; else the batch has `null_features`"""
    has_padding: bool = False
    """some tokens may be padding, which is masked"""
    gives_ids: bool = False
    """tokens are ids (b, s) of the image's own vocabulary, which the network embeds itself"""
    gives_summary: bool = False
    """`SummarizedTokens`: has a vector that summarises all tokens"""
    classes: int | None = None
    """number of classes that `label` indexes; 0: unconditional; None: a condition other than a class"""


class ConditionTokens(Protocol):
    """The module of a condition."""

    def __call__(self, batch: Batch, drop: Array, dtype: DTypeLike) -> tuple[Array, Array]:
        """Tokens (b, s, d) of the dtype, and a mask (b, s) of those that a network may read.

        drop: bool (b,) marks rows that get the unconditional tokens instead of their own.
        """
        ...


class SummarizedTokens(ConditionTokens, Protocol):
    """The module of a condition with a summary vector."""

    def whole(self, batch: Batch, drop: Array) -> Array:
        """The summary vector (b, d)."""
        ...


class Condition(Protocol):
    """The config of a condition, as tokens of a network."""

    @property
    def spec(self) -> ConditionSpec: ...

    @property
    def length(self) -> int:
        """Number of tokens."""
        ...

    def batch_spec(self) -> BatchSpec:
        """Fields that it reads of a batch."""
        ...

    def token_width(self, width: int) -> int:
        """Width of a token, for a network of this width."""
        ...

    def init(self, key: Array, width: int) -> ConditionTokens: ...


# -- noise


Predicts = Literal["eps", "x0", "v", "velocity", "drift", "score"]
"""Prediction type of a network at x_t; see `noise.gaussian.split`."""


Spacing = Literal["default", "even", "karras", "log_snr"]
"""Spacing of the stops of a sampling grid: the process' default, even in its own time, even in (sigma / alpha)^(1 / 7)
(Karras et al. 2022, eq. 5), or even in log(alpha / sigma) (Lu et al. 2022, DPM-Solver).

`karras` and `log_snr` end at the least noise of the process: that of the first step of Discrete, of `low` of EDM, of
the last of `max_steps` steps of Flow. Where a grid begins in pure noise, or nearly (alpha below `processes.NOISE`),
log(alpha / sigma) is -inf: they keep the first two stops of the default grid and space the others from the second on.
"""


class SamplingGrid(NamedTuple):
    """The stops of a sampler, from noise to image, in tables of fixed size; entries after stop `steps` are unused."""

    t: Array
    """(n + 1,): time input of the network"""
    alpha: Array
    """(n + 1,)"""
    sigma: Array
    """(n + 1,), 0 at the clean end"""
    low: Array
    """(n,): log-variance of a reverse step, given the clean image"""
    high: Array
    """(n,): log-variance of the forward step between the same stops"""
    steps: Array
    """number of steps, 1 to n"""


VarianceBound = Callable[[Array, Array, Array, Array, Array, Predicts], Array]
"""(x0, x, t, prediction, v, predicts) -> (b,)"""


class NoiseProcess(Protocol):
    """x_t = alpha_t x_0 + sigma_t eps: a frozen config of the noise process of training and sampling."""

    @property
    def max_steps(self) -> int:
        """Maximum number of sampling steps."""
        ...

    @property
    def scale(self) -> float:
        """Factor by which images are multiplied before noise is added."""
        ...

    @property
    def solver(self) -> str:
        """The default solver, a key of `sampling.solvers.SOLVERS`."""
        ...

    @property
    def starts_from_pure_noise(self) -> bool:
        """Whether alpha is 0 where a sampler begins."""
        ...

    @property
    def time_levels(self) -> int | None:
        """Number of noise levels, if network times are their indices; None for other times."""
        ...

    @property
    def variance_bound(self) -> VarianceBound | None:
        """The term of the variational bound in bits per dimension, which trains the variance v of a reverse step; None
        if steps have no variance to learn."""
        ...

    def same_noise(self, other: NoiseProcess) -> bool:
        """Whether the noise at each network time is the same in both processes."""
        ...

    def quantile(self, u: Array) -> Array:
        """Quantiles (b,) of training times at u (b,) in (0, 1)."""
        ...

    def alpha_sigma(self, t: Array, like: Array) -> tuple[Array, Array]:
        """alpha and sigma at times t (b,), shaped to multiply `like`."""
        ...

    def network_time(self, t: Array) -> Array:
        """The time input of the network."""
        ...

    def timesteps(self, steps: Array | int, stride: Array | bool = False, spacing: Spacing = "default") -> SamplingGrid:
        """The grid of a traced number of reverse steps, 1 to `max_steps`; stride: take every k-th of discrete steps."""
        ...
