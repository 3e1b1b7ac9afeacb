"""Hints of `t2i convert`, `--grid 24 24`: values of a configuration that a published file lacks."""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence

from t2i_jax.convert import Format
from t2i_jax.core.config import ConfigError
from t2i_jax.core.family import names_of
from t2i_jax.core.fields import values
from t2i_jax.interop.names import Fields

FLAGS = ("codec", "text", "back", "out", "help")
"""Flags of the command, for which hints may be mistaken."""


def parse(name: str, format: Format, arguments: Sequence[str]) -> Fields:
    """`--grid 24 24`, `--heads=16`, `--legacy` as values by name.

    Errors: `ConfigError` for a word that is no hint, a hint that the format does not take, and a value of a wrong kind.
    """
    found: dict[str, list[str]] = {}
    last: list[str] | None = None
    for word in arguments:
        if m := re.fullmatch(r"--([A-Za-z][\w-]*)(=(.*))?", word, re.DOTALL):
            last = found[m[1].replace("-", "_")] = [m[3]] if m[2] else []
            last = None if m[2] else last
        elif last is not None and not word.startswith("--"):
            last.append(word)
        else:
            raise ConfigError(f"what is {word!r}? Hints are --name value")
    known = takes(format)
    signature = inspect.signature(format.describe).parameters.values()
    for key in found:
        if key not in known and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature):
            raise ConfigError(unknown(name, format, key))
    values = {key: value(words) for key, words in found.items()}
    for key, one in values.items():
        said = " ".join((f"--{key.replace('_', '-')}", *found[key]))
        _check(said, one, known.get(key, object))
        kind = known.get(key, float)
        counts = [] if float in (kind, *typing.get_args(kind)) else one if isinstance(one, tuple) else [one]
        if any(isinstance(n, int) and n < 0 for n in counts):
            raise ConfigError(f"{said}: it is not negative")
    return values


def takes(format: Format) -> Fields:
    """The hints that a format names, and their types."""
    signature = inspect.signature(format.describe, eval_str=True).parameters.values()
    return {p.name: p.annotation for p in signature if p.kind is inspect.Parameter.KEYWORD_ONLY}


def kind_name(kind: object) -> str:
    """The kind of a hint, in few words."""
    if isinstance(kind, type) and not typing.get_args(kind):
        return kind.__name__
    return str(kind).replace("typing.", "").replace("collections.abc.", "")


def unknown(name: str, format: Format, key: str) -> str:
    """The error of a hint that a format does not take, with the nearest that it takes."""
    made = inspect.signature(format.describe, eval_str=True).return_annotation
    fields = names_of(made()) if dataclasses.is_dataclass(made) and isinstance(made, type) and _optional(made) else []
    near = difflib.get_close_matches(key, [*takes(format), *fields, *FLAGS], 1, 0.6)
    meant = f"; did you mean --{near[0].replace('_', '-')}?" if near else ""
    return f"{name} takes no hint --{key.replace('_', '-')}{meant}"


def _optional(kind: type) -> bool:
    """Whether all fields of a dataclass have defaults."""
    missing = dataclasses.MISSING
    return all(f.default is not missing or f.default_factory is not missing for f in dataclasses.fields(kind))


def check_fields(config: object, given: Collection[str]) -> None:
    """Errors: `ConfigError` where a field that was given as a hint has a value of a wrong kind."""
    check_values(type(config), {k: v for k, v in values(config).items() if k in given})
    for part in values(config).values():
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            check_fields(part, given)


def check_values(kind: type, values: Mapping[str, object]) -> None:
    """Errors: `ConfigError` where a value is not of the kind of the dataclass's field of that name."""
    kinds = typing.get_type_hints(kind)
    for name, value in values.items():
        _check(f"--{name.replace('_', '-')}", value, kinds[name])


def _check(said: str, value: object, kind: object) -> None:
    if not suits(value, kind):
        raise ConfigError(f"{said}: {value!r} is not of the kind {kind_name(kind)}")


def suits(value: object, kind: object) -> bool:
    """Whether a value is of an annotated kind, as far as it is one of numbers, words, tuples of them, and unions."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(suits(value, one) for one in inside)
    if origin is typing.Literal:
        return value in inside
    if origin is tuple:
        inside = inside[:1] * len(value) if inside[1:] == (...,) and isinstance(value, tuple) else inside
        return isinstance(value, tuple) and len(value) == len(inside) and all(map(suits, value, inside))
    if origin in (collections.abc.Sequence, list):
        return isinstance(value, tuple | list) and all(suits(one, inside[0]) for one in value)
    if kind is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (None, types.NoneType):
        return value is None
    return not isinstance(kind, type) or isinstance(value, kind)


def value(words: Sequence[str]) -> object:
    """No word gives True, one a value, more a tuple."""

    def one(word: str) -> object:
        try:
            return ast.literal_eval(word.title() if word in ("true", "false", "none") else word)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return word

    if len(words) < 2:
        return one(words[0]) if words else True
    return tuple(map(one, words))


def text_of(hints: Mapping[str, object]) -> str:
    """The hints as command-line flags."""
    return " ".join(f"--{key.replace('_', '-')}={value}" for key, value in hints.items())
