"""The contract: what a family, a codec, a text encoder, a head, a condition and a noise process offer.

Protocols are for readers and for the type checker. At run time nothing asks an object what it has: a config declares
what it can do (`Capabilities`, `TextSpec`), and the function named after a capability narrows its type, or raises
`ConfigError` where it is not declared.
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
"""Arrays by name, the first dimension of each that of the batch."""


# -- what is trained


class LossOutput(NamedTuple):
    """What a loss returns."""

    loss: Array
    """scalar, fp32"""
    metrics: Mapping[str, Array]
    """scalars by name"""
    state: nnx.Module | None = None
    """the model with new non-trainable state (codebook averages, running statistics); None where there is none. An
    array that is the model's own is not written; no two objectives may write the same one"""


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss and the parameters that follow its gradient; an ordinary model has one objective.

    All objectives of a model get the same batch and key in a step. Their gradients are taken at the same model and
    their updates made at once, but for those that are `after` others.
    """

    loss: Callable[[Any, Any, Array, Array, bool], LossOutput]
    """(model, batch, key, step, train) -> `LossOutput`; train is False for held-out data, where nothing is dropped or
    corrupted to regularise; static. The batch has `outputs` where the model has a shared forward pass"""
    params: tuple[str, ...] = ()
    """dotted names of the parameters that are trained, or what they begin with: `decoder.out`; () is all of them"""
    optimizer: str = ""
    """name of the optimiser and of its state, by default that of the objective; objectives with the same parameters may
    share one, which then makes an update for each of them"""
    every: int = 1
    """updates are made in steps 1, 2, ... that this divides; in others the gradient is not computed and the optimiser,
    whose schedule counts its own updates, stays as it is"""
    after: tuple[str, ...] = ()
    """objectives whose updates of the same step the loss sees: it is computed in a later stage than they, at the model
    with all updates of the stages before"""
    start: int = 0
    """step at which training begins: before it neither the parameters nor the optimiser's state change, and the
    learning-rate schedule counts from there"""


def single_objective(loss: Callable[[Any, dict[str, Array], Array, bool], LossOutput]) -> dict[str, Objective]:
    """The objectives of a model with one loss (model, batch, key, train) that all its parameters follow."""
    return {"model": Objective(lambda model, batch, key, step, train: loss(model, batch, key, train))}


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What a config can do besides being trained; each flag stands for the Protocol that is named."""

    family: bool = False
    """`Family`: samples images, or codes of them"""
    codec: bool = False
    """`Codec`: images to codes and back"""
    classifier: bool = False
    """`Classifier`: log p(condition | noised image), whose gradient guides a diffusion"""
    frozen_networks: bool = False
    """`UsesFrozenNetworks`: a loss reads networks that nothing trains"""
    shared_forward: bool = False
    """`SharesForward`: all objectives read the outputs of one forward pass"""
    measures_scale: bool = False
    """`MeasuresScale`: a codec whose codes are shifted and scaled"""

    unconditional: bool = False
    """learned an unconditional branch: `sample` guides by it unless it is told not to"""
    guidance: bool = False
    """the options have a scale `guidance`, and `sample` takes `guided`: False leaves the unconditional branch out"""
    token_by_token: bool = False
    """`TokenByToken`: a cache of keys and values, one token a step"""
    likelihood: bool = False
    """`Likelihood`: log p(codes | condition)"""
    inpaint: bool = False
    """`sample` takes `known` and `keep`: samples (b, *grid, ...), and a bool (b, rows, columns) of tokens that stay"""
    inpaint_prefix: bool = False
    """it keeps the first tokens in raster order only"""
    init_image: bool = False
    """`sample` takes `known` alone, and its options a `strength`"""
    super_resolution: bool = False
    """enlarges a small image, `low_res` of its condition"""
    classifier_guidance: bool = False
    """`GaussianFamily`, whose `sample` takes a classifier"""
    autoguidance: bool = False
    """`GaussianFamily`, whose `sample` takes a weaker model in the place of the unconditional branch"""
    token_head: bool = False
    """its field `head` samples each token, a `heads.TokenHead` that another one may replace"""
    int8: bool = False
    """samples with matrices of 8-bit integers"""


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model is computed, whatever it computes."""

    dtype: str = "float32"
    """of products and activations"""
    remat: str = ""
    """what a layer keeps for its backward pass, one of `remats`; empty where there is no choice"""
    attention: str = ""
    """what computes attention, a `nn.kernels.Kind`; empty where there is no choice"""
    loss_chunk: int = 0
    """tokens of an image whose logits are held at a time; 0: as many as memory is kept for"""
    remats: tuple[str, ...] = ("none", "full", "dots", "branches")

    def changes(self, new: Compute, *same: str, **others: str) -> dict[str, Any]:
        """What to replace in a config to compute as `new` says: values by the names of its fields.

        same: fields that the config has under their names here; others: under other names. Errors: `ConfigError` for a
        change of what has no field.
        """
        mine, theirs, fields = dataclasses.asdict(self), dataclasses.asdict(new), {name: name for name in same} | others
        for name, value in theirs.items():
            if value != mine[name] and name not in fields:
                raise ConfigError(f"{name} {value!r}: this model leaves no choice of it")
        return {field: theirs[name] for name, field in fields.items()}


class Trainable(Protocol):
    """A frozen config of something that is trained: a family, a codec, a classifier."""

    @property
    def capabilities(self) -> Capabilities:
        """Computed from the config, never a field of it."""
        ...

    @property
    def compute(self) -> Compute: ...

    def with_compute(self, compute: Compute) -> Self:
        """The same model, computed in another way. Errors: `ConfigError` for what the config leaves no choice of."""
        ...

    def batch_spec(self) -> BatchSpec:
        """What a batch has to hold."""
        ...

    def init(self, key: Array) -> nnx.Module:
        """A model with fresh parameters."""
        ...

    def objectives(self) -> Mapping[str, Objective]: ...


class SamplingOptions(Protocol):
    """Options of a sampler: numbers, or arrays with one for each image."""

    def arrays(self) -> Any:
        """The same options as arrays, which are traced: new values compile nothing anew."""
        ...


class Family(Trainable, Protocol):
    """The config of a generative model."""

    def sample_spec(self) -> SampleSpec: ...

    def condition_spec(self) -> BatchSpec:
        """What `sample` reads of its condition: the part of `batch_spec` that describes what an image is made for."""
        ...

    def options(self) -> Any:
        """`SamplingOptions` at their defaults."""
        ...

    def check(self, options: Any) -> None:
        """Errors: `ConfigError` or `ValueError` for options with which nothing can be sampled."""
        ...

    def loop_trips(self, options: Any) -> int | Sequence[tuple[int, ...]]:
        """How often the sampler's loop runs with these options; or which sizes each of its steps takes, where a step
        chooses among compiled ones (`flops.count`)."""
        ...

    def sample(
        self,
        model: Any,
        condition: Batch,
        keys: Array,
        options: Any = None,
        *,
        guided: bool | None = None,
        progress: Callable[[Any, Any, Any], None] | None = None,
    ) -> Array:
        """Samples as `sample_spec` says, one for each row of the condition and each key of `keys` (b,).

        guided: whether the unconditional branch is computed, without which there is no guidance and half the work;
            None: where one was learned.
        progress: called as (done, total, sample) with steps of this sampler and the samples so far; static.
        """
        ...


class TokenByToken(Family, Protocol):
    """A family that samples one token a step from a cache of keys and values."""

    @property
    def length(self) -> int:
        """Tokens of an image."""
        ...

    def prefill(self, model: Any, condition: Batch, dropped: Array) -> tuple[Array, Any]: ...

    def decode(self, *arguments: Any, **options: Any) -> Any: ...


class GaussianFamily(Family, Protocol):
    """A family that removes Gaussian noise, whose prediction other models may guide."""

    @property
    def process(self) -> NoiseProcess: ...

    @property
    def predicts(self) -> str:
        """What the network predicts: a `noise.gaussian.Predicts`."""
        ...

    @property
    def solver(self) -> str: ...


class Likelihood(Family, Protocol):
    """A family that knows the probability of an image's codes."""

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
    """A model whose loss reads networks that nothing trains, as `batch["frozen"]`."""

    def frozen(self) -> Any:
        """The networks: a pytree of arrays."""
        ...


class SharesForward(Trainable, Protocol):
    """A model whose objectives read the outputs of one forward pass, as `batch["outputs"]`; gradients go through it to
    the parameters of an objective that it depends on."""

    def forward(self, model: Any, batch: Any, key: Array, step: Array, train: bool) -> Any:
        """The outputs: a pytree of arrays; arguments as for `Objective.loss`."""
        ...


class Codec(Trainable, Protocol):
    """Images to codes and back."""

    @property
    def spec(self) -> CodecSpec: ...

    def encode(self, model: Any, images: Array, key: Array | None = None) -> Array:
        """Images float (b, i, j, 3) in [-1, 1] -> codes; drawn by the key where they have a distribution."""
        ...

    def decode(self, model: Any, codes: Array) -> Array:
        """Codes -> images float (b, i, j, 3), about [-1, 1]."""
        ...

    def to_store(self, model: Any, images: Array) -> dict[str, Array]:
        """What `t2i encode` keeps of images, by the names of a batch."""
        ...


class MeasuresScale(Codec, Protocol):
    """A codec whose codes are (latent - shift) scale, by its fields `scale` and `shift`."""

    def measure(self, model: Any, batches: Iterable[Any]) -> tuple[float, float]:
        """(scale, shift) with which codes of these images, batches of (b, i, j, 3), have mean 0 and variance 1."""
        ...


def as_trainable(value: object) -> Trainable:
    """A value of a config file as what is trained. Errors: `ConfigError` for one that declares no `Capabilities`."""
    # The one place where a model of unknown type is looked at; after it the type is known.
    if not isinstance(getattr(value, "capabilities", None), Capabilities):
        raise ConfigError(f"{value!r}: a family or a codec")
    return cast(Trainable, value)


def _narrow(config: Trainable, flag: str, what: str) -> Any:
    if not dataclasses.asdict(config.capabilities)[flag]:
        raise ConfigError(f"a {type(config).__name__} {what}")
    return config


def as_family(config: Trainable) -> Family:
    """Errors: `ConfigError` for a config that samples nothing."""
    return cast(Family, _narrow(config, "family", "does not sample images"))


def as_codec(config: Trainable) -> Codec:
    """Errors: `ConfigError` for a config that is no codec."""
    return cast(Codec, _narrow(config, "codec", "is no codec"))


def check_codes(family: Family, codec: Codec, name: str, exact: bool = False) -> None:
    """Errors: `ConfigError` where the codec of this name cannot be that of the codes that a family samples.

    A family may have more code numbers than its codec, such as a start token or a padded table; exact: it may not.
    """
    ours, theirs = family.sample_spec().code, codec.spec.code
    fits = (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and all(
        a >= b for a, b in zip(ours.sizes, theirs.sizes, strict=True)
    )
    if ours != theirs if exact else not fits:
        raise ConfigError(f"{name} has {theirs}, the model {ours}: this is not its codec")


def uses_frozen_networks(config: Trainable) -> UsesFrozenNetworks:
    """Errors: `ConfigError` for a config whose losses read the model and the batch alone."""
    return cast(UsesFrozenNetworks, _narrow(config, "frozen_networks", "has no frozen networks"))


def shares_forward(config: Trainable) -> SharesForward:
    """Errors: `ConfigError` for a config whose objectives share no forward pass."""
    return cast(SharesForward, _narrow(config, "shared_forward", "has no forward pass that its objectives share"))


def measures_scale(config: Trainable) -> MeasuresScale:
    """Errors: `ConfigError` for a config without codes that have a scale."""
    return cast(MeasuresScale, _narrow(config, "measures_scale", "has no scale of its codes"))


def as_classifier(config: Trainable) -> Classifier:
    """Errors: `ConfigError` for a config that is no classifier of noised images."""
    return cast(Classifier, _narrow(config, "classifier", "does not classify noised images"))


def token_by_token(config: Trainable) -> TokenByToken:
    """Errors: `ConfigError` for a config that does not sample token by token."""
    return cast(TokenByToken, _narrow(config, "token_by_token", "does not sample token by token"))


def likelihood(config: Trainable) -> Likelihood:
    """Errors: `ConfigError` for a config that gives no probabilities."""
    return cast(Likelihood, _narrow(config, "likelihood", "does not give the likelihood of an image"))


def inpainting(config: Trainable) -> Family:
    """Errors: `ConfigError` for a config that cannot keep a part of an image."""
    return cast(Family, _narrow(config, "inpaint", "keeps no part of an image"))


def image_to_image(config: Trainable) -> Family:
    """Errors: `ConfigError` for a config that cannot start from an image."""
    what = "keeps nothing of an image without a mask; a Gaussian diffusion can"
    return cast(Family, _narrow(config, "init_image", what))


def super_resolution(config: Trainable) -> Family:
    """Errors: `ConfigError` for a config that enlarges no image."""
    return cast(Family, _narrow(config, "super_resolution", "reads no 'low_res', so it cannot make images larger"))


def classifier_guided(config: Trainable) -> GaussianFamily:
    """Errors: `ConfigError` for a config that no classifier guides."""
    what = "is not guided by a classifier; a Gaussian diffusion is"
    return cast(GaussianFamily, _narrow(config, "classifier_guidance", what))


def autoguided(config: Trainable) -> GaussianFamily:
    """Errors: `ConfigError` for a config that neither is guided by a weaker model nor guides as one."""
    what = "cannot guide, nor be guided by, a weaker model; a Gaussian diffusion can"
    return cast(GaussianFamily, _narrow(config, "autoguidance", what))


def int8_sampling(config: Trainable) -> Family:
    """Errors: `ConfigError` for a config that does not sample with 8-bit weights."""
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
    """What a tokenizer can do besides making ids; it is known without any of its files.

    Fields of a tokenizer that name files are marked in their types (`core.fields.File`).
    """

    features: bool = False
    """`TextEncoder`: gives features of ids, which no model has to embed then"""
    image_features: bool = False
    """`ImageTextEncoder`: images have features in the same space, and teach in the place of captions"""
    limited: bool = False
    """`text.cut.Limited`: counts the tokens of a caption that are not read"""


class TextEncoder(Tokenizer, Protocol[M]):
    """A frozen text encoder with parameters M."""

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Vectors of a caption, and numbers of each."""
        ...

    def load(self) -> M:
        """The parameters, on the host. Errors: FileNotFoundError, ValueError for files that are none of it."""
        ...

    def features(self, model: M, ids: Array, mask: Array) -> Array:
        """Token ids and mask (b, s) -> features (b, s', k)."""
        ...


class ImageTextEncoder(TextEncoder[M], Protocol):
    """A frozen encoder of captions and images into one space."""

    def image_features(self, model: M, images: Array) -> Array:
        """Images float (b, i, j, 3) in [-1, 1] -> features (b, 1, k)."""
        ...


def as_tokenizer(value: object) -> Tokenizer:
    """A value of a config file as a tokenizer. Errors: `ConfigError` for one that declares no `TextSpec`."""
    # The one place where a text of unknown type is looked at; after it the type is known.
    if not isinstance(getattr(value, "spec", None), TextSpec):
        raise ConfigError(f"{value!r} is no tokenizer: its `spec` is no TextSpec")
    return cast(Tokenizer, value)


def gives_features(text: Tokenizer | None) -> bool:
    return text is not None and text.spec.features


def learns_from_images(text: Tokenizer | None) -> bool:
    """Whether features of images teach, and captions are read only to sample."""
    return text is not None and text.spec.image_features


def text_encoder(text: Tokenizer | None) -> TextEncoder[nnx.Module]:
    """Errors: `ConfigError` for a tokenizer alone, and where there is no text."""
    if not gives_features(text):
        raise ConfigError(f"{_named(text)} gives no features: a frozen text encoder is wanted")
    return cast(TextEncoder[nnx.Module], text)


def image_text_encoder(text: Tokenizer | None) -> ImageTextEncoder[nnx.Module]:
    """Errors: `ConfigError` for a text that does not read images."""
    if not learns_from_images(text):
        raise ConfigError(f"{_named(text)} gives no features of images: an encoder of both is wanted, as ClipEmbedding")
    return cast(ImageTextEncoder[nnx.Module], text)


def _named(text: Tokenizer | None) -> str:
    return "no text" if text is None else f"text: a {type(text).__name__}"


# -- conditions


@dataclasses.dataclass(frozen=True)
class ConditionSpec:
    """What a condition offers besides tokens."""

    has_null: bool = True
    """the unconditional tokens need nothing of a batch; else it brings `null_features`"""
    has_padding: bool = False
    """some tokens may be padding, which nothing looks at"""
    gives_ids: bool = False
    """tokens are ids (b, s) of the image's own vocabulary, which the network embeds itself"""
    gives_summary: bool = False
    """`SummarizedTokens`: a vector stands for all tokens"""
    classes: int | None = None
    """number of classes, of which `label` is one; 0 where there is no condition; None for what is no class"""


class ConditionTokens(Protocol):
    """The module of a condition."""

    def __call__(self, batch: Batch, drop: Array, dtype: DTypeLike) -> tuple[Array, Array]:
        """Tokens (b, s, d) of the dtype, and a mask (b, s) of those that a network may look at.

        drop: bool (b,) marks rows that get the unconditional tokens instead of their own.
        """
        ...


class SummarizedTokens(ConditionTokens, Protocol):
    """The module of a condition with a vector for the whole."""

    def whole(self, batch: Batch, drop: Array) -> Array:
        """(b, d)."""
        ...


class Condition(Protocol):
    """The config of what an image is made for, as tokens of a network."""

    @property
    def spec(self) -> ConditionSpec: ...

    @property
    def length(self) -> int:
        """Tokens."""
        ...

    def batch_spec(self) -> BatchSpec:
        """What it reads of a batch."""
        ...

    def token_width(self, width: int) -> int:
        """Numbers of a token, for a network of a width."""
        ...

    def init(self, key: Array, width: int) -> ConditionTokens: ...


# -- noise


Predicts = Literal["eps", "x0", "v", "velocity", "drift", "score"]
"""What a network predicts of x_t; see `noise.gaussian.split`."""


Spacing = Literal["default", "even", "karras", "log_snr"]
"""Where the stops of a path are: as the process has them by default, evenly in its own time, evenly in
(sigma / alpha)^(1 / 7) (Karras et al. 2022, eq. 5), or evenly in log(alpha / sigma) (Lu et al. 2022, DPM-Solver).

`karras` and `log_snr` end in the least noise that the process has: that of the first step of Discrete, of `low` of EDM,
of the last of `bound` steps of Flow. Where a path begins in pure noise, or nearly (alpha below `processes.NOISE`),
log(alpha / sigma) is -inf: they keep the first two stops of the default path and space the others from the second on.
"""


class SamplingGrid(NamedTuple):
    """The stops of a sampler, from noise to the picture, in tables of one bound; what is behind the last is idle."""

    t: Array
    """(n + 1,): the time that the network is told"""
    alpha: Array
    """(n + 1,)"""
    sigma: Array
    """(n + 1,), 0 where nothing is left to do"""
    low: Array
    """(n,): log-variance of a step back, given the picture"""
    high: Array
    """(n,): log-variance of the step forth between the same stops"""
    steps: Array
    """how many steps there are, 1 to n"""


VarianceBound = Callable[[Array, Array, Array, Array, Array, Predicts], Array]
"""(x0, x, t, prediction, v, predicts) -> (b,)"""


class NoiseProcess(Protocol):
    """x_t = alpha_t x_0 + sigma_t eps: a frozen config of what a model is trained on and solvers go back along."""

    @property
    def max_steps(self) -> int:
        """Most steps of a sampler."""
        ...

    @property
    def scale(self) -> float:
        """What images are multiplied by before they are noised."""
        ...

    @property
    def solver(self) -> str:
        """The key of `sampling.solvers.SOLVERS` that models of it sample with by default."""
        ...

    @property
    def starts_from_pure_noise(self) -> bool:
        """alpha is 0 where a sampler begins."""
        ...

    @property
    def time_levels(self) -> int | None:
        """Network times are numbers of noise levels from 0 on, below this; None: other numbers."""
        ...

    @property
    def variance_bound(self) -> VarianceBound | None:
        """The term of the variational bound in bits per dimension, which teaches the variance v of a step back; None
        where steps have no variance to learn."""
        ...

    def same_noise(self, other: NoiseProcess) -> bool:
        """Whether networks trained on both read the same noise at the same time."""
        ...

    def quantile(self, u: Array) -> Array:
        """Training times (b,) below which a share u (b,) in (0, 1) of them lies."""
        ...

    def alpha_sigma(self, t: Array, like: Array) -> tuple[Array, Array]:
        """alpha and sigma at times t (b,), shaped to multiply `like`."""
        ...

    def network_time(self, t: Array) -> Array:
        """The time that the network is told."""
        ...

    def timesteps(self, steps: Array | int, stride: Array | bool = False, spacing: Spacing = "default") -> SamplingGrid:
        """The stops of so many steps back, 1 to `bound`, which are traced; stride: of discrete steps, every k-th."""
        ...
