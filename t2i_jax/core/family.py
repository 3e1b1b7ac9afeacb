"""The members that most families, and most codecs, have in common, and fields of their configs by name."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Generic, Self, TypeVar

from flax import nnx
from jax import Array

from t2i_jax.core.errors import ConfigError, did_you_mean
from t2i_jax.core.fields import Checked, values
from t2i_jax.core.params import Named, abstract, named, rebuild
from t2i_jax.core.specs import WEIGHT, BatchSpec, FieldSpec, SampleSpec
from t2i_jax.core.types import Capabilities, Compute, LossOutput, M, O, Objective, Trips, single_objective


class BaseFamily(Checked, abc.ABC, Generic[O]):
    """A family with one loss and a field `sampling`; a subclass overrides what differs.

    It is a convenience: `core.types.Family` is what other code needs. O: its options.
    """

    sampling: O
    loss: Callable[..., LossOutput]
    """(model, batch, key, train)"""
    compute: Compute

    def __post_init__(self):
        super().__post_init__()
        self.compute.check(self.capabilities)
        if self.reads_low_codes:
            self._check_low_codes()

    @property
    def reads_low_codes(self) -> bool:
        """Whether it is the second stage of a cascade, whose condition is codes of a small image."""
        return "low_codes" in self.condition_spec()

    def _check_low_codes(self) -> None:
        """Errors: `ConfigError` where these are not codes of this model's codec, one map of them."""
        spec, low = self.sample_spec(), self.condition_spec()["low_codes"]
        if spec.scales or not spec.code.is_discrete or spec.field.high != low.high:
            its = f"{spec.code}, in maps of several sizes" if spec.scales else str(spec.code)
            raise ConfigError(f"the condition reads codes 0 to {low.high} of small images: the model has {its}")

    @property
    @abc.abstractmethod
    def capabilities(self) -> Capabilities: ...

    @property
    def length(self) -> int:
        """Tokens of an image."""
        return self.sample_spec().length

    def with_compute(self, compute: Compute) -> Self:
        """The same model with other compute options."""
        return dataclasses.replace(self, compute=compute)  # pyright: ignore[reportArgumentType]

    @abc.abstractmethod
    def sample_spec(self) -> SampleSpec: ...

    def adopt(self, model: nnx.Module) -> nnx.Module:
        """A model of this family from one of another grid, with the same parameters; see `core.types.AnySize`."""
        own = {**named(model), **self.of_grid()}
        return rebuild(abstract(self), own)  # pyright: ignore[reportArgumentType]

    def of_grid(self) -> Named:
        """Variables of a model that are computed from the grid."""
        return {}

    @abc.abstractmethod
    def condition_spec(self) -> BatchSpec: ...

    def batch_spec(self) -> BatchSpec:
        """Fields of a training batch."""
        return {"codes": self.sample_spec().field, **self.condition_spec(), "weight": WEIGHT}

    def objectives(self) -> dict[str, Objective]:
        """The loss, which trains all parameters."""
        return single_objective(self.loss)

    def options(self) -> O:
        """Default options of `sample`."""
        return self.sampling

    def check(self, options: O) -> None:
        """Raises nothing: the options validate themselves."""

    def loop_trips(self, options: O) -> Trips:
        """1: every loop of the sampler has a static length."""
        return 1


class BaseCodec(Checked, abc.ABC, Generic[M]):
    """A codec of images of any size that stores its codes; a subclass overrides what differs.

    It is a convenience: `core.types.Codec` is what other code needs. M: its module.
    """

    @property
    @abc.abstractmethod
    def factor(self) -> int:
        """Pixels per code along a side."""

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        return Capabilities(codec=True)

    @abc.abstractmethod
    def encode(self, model: M, images: Array, key: Array | None = None) -> Array:
        """Codes of images (b, i, j, 3) in [-1, 1]."""

    def to_store(self, model: M, images: Array) -> dict[str, Array]:
        """Arrays to store for the images: `codes`."""
        return {"codes": self.encode(model, images)}

    def batch_spec(self) -> BatchSpec:
        """Fields of a training batch: images whose sides are multiples of `factor`."""
        return {"image": FieldSpec((None, None, 3), "float32", multiple=self.factor)}


T = TypeVar("T")
PARTS = ("network", "transformer", "conditioning", "compute", "positions", "coarse")
"""Fields of a configuration that hold a configuration whose fields need no path: `heads` is that of `transformer`."""
NAMES = {
    "condition": ("conditioning", "what"),
    "condition_dropout": ("conditioning", "dropout"),
    "rotary_base": ("positions", "base"),
}
"""Fields that need another name there, as two parts have a `dropout`."""


def with_fields(config: T, /, **fields: object) -> T:
    """The configuration with other values of fields, its own or those of its parts; a given part is changed further.

    Errors: `ConfigError` for a name that neither it nor a part has.

    >>> from t2i_jax import AR
    >>> with_fields(AR(), width=512, heads=8).transformer.width
    512
    """
    own: dict[str, object] = {}
    inner: dict[str, dict[str, object]] = {}
    for name, value in fields.items():
        path = path_of(config, name)
        if not path:
            raise ConfigError(f"a {type(config).__name__} has no field '{name}'{did_you_mean(name, names_of(config))}")
        if len(path) == 1:
            own[name] = value
        else:  # a part of a part finds its fields itself
            inner.setdefault(path[0], {})[path[1] if len(path) == 2 else name] = value
    for part, some in inner.items():
        own[part] = with_fields(own.get(part, values(config)[part]), **some)
    return dataclasses.replace(config, **own) if own else config  # pyright: ignore[reportArgumentType]


def path_of(config: object, name: str) -> tuple[str, ...]:
    """The path of the field `name` in a configuration or its parts; () if there is none."""
    there = values(config)
    if name in there:
        return (name,)
    part, field = NAMES.get(name, ("", ""))
    if there.get(part) is not None and field in values(there[part]):
        return part, field
    for part in PARTS:
        if part in there and there[part] is not None and (rest := path_of(there[part], name)):
            return (part, *rest)
    return ()


def names_of(config: object) -> list[str]:
    """The names that `with_fields` takes."""
    there = values(config)
    inner = [names_of(there[part]) for part in PARTS if there.get(part) is not None]
    return [*there, *NAMES, *(name for names in inner for name in names)]
