"""Ranges of config fields, as part of their types, and the check of them.

@dataclasses.dataclass(frozen=True)
class Train(Checked):
    steps: Size = 1000
    ema: Share = 0.0
    log_every: Annotated[Size, FREE] = 20
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Container
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Protocol, Union, cast, get_args, get_origin, get_type_hints

from jax.core import Tracer

from t2i_jax.core.errors import ConfigError

Check = Callable[[object], str]
"""what is wrong with a value; empty if nothing is"""


@dataclasses.dataclass(frozen=True)
class Range:
    """The range of a field, bounds included (`low`, `high`) or excluded (`above`, `below`)."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def fits(self, x: float) -> bool:
        """Whether a number is in the range; NaN and infinities never are."""
        return (
            _finite(x)
            and (self.low is None or x >= self.low)
            and (self.high is None or x <= self.high)
            and (self.above is None or x > self.above)
            and (self.below is None or x < self.below)
        )

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{_short(self.low)} to {_short(self.high)}"
        words = {"at least": self.low, "at most": self.high, "above": self.above, "below": self.below}
        said = [f"{word} {_short(value)}" for word, value in words.items() if value is not None]
        return " and ".join(said) or "a finite number"


FLOAT_MAX = 3.4028235e38
"""Larger numbers are infinite in fp32, in which models compute."""


def _finite(x: float) -> bool:
    return isinstance(x, numbers.Integral) or math.isfinite(x)  # an integer may be larger than any float


def _short(x: float) -> str:
    return str(x) if isinstance(x, int) else f"{x:g}"


LARGEST = 2**31 - 1
"""Maximum of steps, sizes and counts: devices count in 32 bits."""
Size = Annotated[int, Range(1, LARGEST)]
Count = Annotated[int, Range(0, LARGEST)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(low=0)]
Finite = Annotated[float, Range()]
Share = Annotated[float, Range(0, 1)]
Rate = Annotated[float, Range(low=0, below=1)]
"""Rate of dropout and the like, below 1."""
Grid = Annotated[tuple[int, int], Range(1, LARGEST)]
DEEPEST = 1000
Layers = Annotated[int, Range(1, DEEPEST)]
"""Number of layers, in networks that build them one by one."""
Sizes = Annotated[tuple[int, ...], Range(1, LARGEST)]
Seed = Annotated[int, Range(0, 2**64 - 1)]
Workers = Annotated[int, Range(0, 1024)]
"""Number of processes or threads."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """A mark on a field, in its type: log_every: Annotated[Size, FREE] = 20."""

    name: str


FREE = Mark("free")
"""Changes neither the batches nor the mathematics of a run, nor intentionally its rounding: a resumed run may change
it."""
SAMPLED = Mark("sampled")
"""Affects training, but no parameter depends on it: a trained model may be sampled with other values."""


@dataclasses.dataclass(frozen=True)
class File:
    """Marks a field that names a file or a folder, which is copied with a released model."""

    name: str
    """name of the copy"""
    large: bool = False
    """copied with released models only, not with every run"""


VOCABULARY, ENCODER = File("vocabulary"), File("text", large=True)
DATABASE = File("database", large=True)
"""For fields such as path: Annotated[str, VOCABULARY]."""


class Checked:
    """A dataclass that checks its fields against their types when it is constructed.

    Only concrete numbers are checked: a traced array of options has no value yet. Errors: `ConfigError` that names the
    field, its value and what would be right.
    """

    def __post_init__(self):
        given = values(self)
        for name, check in _checks(type(self)).items():
            value = given[name]
            if fault := check(value):
                raise ConfigError(f"{type(self).__name__}.{name} {value!r}: {fault}")


def values(config: object) -> dict[str, Any]:
    """The `__init__` fields of a dataclass by name: a shallow `dataclasses.asdict`.

    This is the only place that reads config fields by name, as there is no other way to get their values.
    """
    assert dataclasses.is_dataclass(config)
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}


@functools.cache
def _checks(cls: type) -> dict[str, Check]:
    hints = get_type_hints(cls, include_extras=True)
    fields = (f.name for f in dataclasses.fields(cls) if f.init)
    return {name: check for name in fields if (check := _check_of(hints[name]))}


def free_fields(config: object, marks: tuple[Mark, ...] = (FREE,), at: str = "") -> set[str]:
    """Dotted names of the fields of a config, nested ones included, that have one of the marks."""
    if isinstance(config, dict):
        within = {f"{at}{k}": v for k, v in config.items()}
        marked = set()
    elif dataclasses.is_dataclass(config):
        within = {f"{at}{name}": value for name, value in values(config).items()}
        marked = {f"{at}{name}" for name, own in _marks(type(config)).items() if any(mark in marks for mark in own)}
    else:
        return set()
    return marked.union(*(free_fields(v, marks, f"{k}.") for k, v in within.items() if k not in marked))


def files(cls: type) -> dict[str, File]:
    """The fields of a config that are marked with a `File`, and these marks."""
    return {k: mark for k, marks in _marks(cls).items() for mark in marks if isinstance(mark, File)}


@functools.cache
def _marks(cls: type) -> dict[str, tuple[object, ...]]:
    """The `Annotated` metadata of the fields of a dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: get_args(h)[1:] for f in dataclasses.fields(cls) if get_origin(h := hints[f.name]) is Annotated}


def changed_fields(old: object, new: object, but: Container[str] = (), at: str = "") -> list[str]:
    """Dotted names of the fields in which two configs of one class differ, except those in `but` and fields nested in
    them."""
    found = []
    after = values(new)
    for field, a in values(old).items():
        name, b = f"{at}{field}", after[field]
        if name in but or a == b:
            continue
        nested = type(a) is type(b) and dataclasses.is_dataclass(a)
        found += changed_fields(a, b, but, f"{name}.") if nested else [name]
    return found


def _check_of(hint: object) -> Check | None:
    """A function from a value to a description of what is wrong with it, or None for a type that restricts nothing."""
    ranges = [x for x in get_args(hint) if isinstance(x, Range)] if get_origin(hint) is Annotated else []
    if get_origin(hint) is Annotated and not ranges:
        hint = get_args(hint)[0]
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return functools.partial(_no_word, inner)
    if get_origin(hint) is tuple and inner[1:] == (...,) and get_origin(inner[0]) is Literal:
        return functools.partial(_no_word, get_args(inner[0]))
    if hint in (bool, str):
        return lambda value: "" if isinstance(value, hint) else f"a {hint.__name__}"
    if kinds := _configs(hint):
        return functools.partial(_no_config, kinds, _takes_none(hint))
    if ranges:
        kind = inner[0]
        return functools.partial(_no_number, ranges[0], {kind, *get_args(kind)})
    return None if _takes_none(hint) else lambda value: "it needs a value" if value is None else ""


def _takes_none(hint: object) -> bool:
    if get_origin(hint) is Annotated:
        return _takes_none(get_args(hint)[0])
    return hint in (Any, object, None, NoneType) or any(map(_takes_none, get_args(hint)) if _is_union(hint) else ())


def _configs(hint: object) -> tuple[type, ...]:
    """The dataclasses, or Protocols of configs, that a type allows; empty if it allows anything else besides None."""
    kinds = [k for k in (get_args(hint) if _is_union(hint) else (hint,)) if k is not NoneType]
    found = [k for k in kinds if isinstance(k, type) and (dataclasses.is_dataclass(k) or Protocol in k.__bases__)]
    return tuple(found) if len(found) == len(kinds) else ()


def _no_config(kinds: tuple[type, ...], none: bool, value: object) -> str:
    """What is wrong with a plain value in place of a config. An object of another class is not checked: a missing
    attribute is an error where it is used."""
    if value is None:
        return "" if none else "it needs a value"
    plain = isinstance(value, bool | int | float | str | bytes | dict | list | tuple | type)
    return f"a {' or a '.join(k.__name__ for k in kinds[:4])}" if plain else ""


def _is_union(hint: object) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _no_word(words: tuple[object, ...], value: object) -> str:
    """What is wrong with a literal, or with one of several; empty if nothing is."""
    several = isinstance(value, tuple | list)
    fits = all(x in words for x in (value if several else (value,)))
    return "" if fits else f"{'some' if several else 'one'} of {', '.join(map(str, words))}"


def _no_number(range: Range, kinds: set[object], value: object) -> str:
    """What is wrong with a number, or with one of several; empty if nothing is. kinds: types of the field.

    Arrays and tracers are not checked.
    """
    whole, several = int in kinds and float not in kinds, any(get_origin(k) is tuple or k is tuple for k in kinds)
    traced = any(k not in (int, float, type(None)) for k in kinds) and not several
    if several != isinstance(value, tuple | list) and not traced:
        return f"{'several numbers' if several else 'a number'}, {range}"
    for x in value if isinstance(value, tuple | list) else (value,):
        if isinstance(x, Tracer) and not x.ndim:
            continue
        if isinstance(x, bool) or not isinstance(x, numbers.Real):
            if traced or (x is None and type(None) in kinds):
                continue
            return f"a number, {range}"
        if whole and not isinstance(x, numbers.Integral):
            return f"a whole number, {range}"
        number = cast(float, x)
        if not range.fits(number):
            finite = "" if _finite(number) or range == Range() else "a finite number, "
            return f"{finite}{range}"
        if not whole and abs(float(x)) > FLOAT_MAX:
            return f"it is infinite in 32 bits, more than {FLOAT_MAX:g}"
    return ""
