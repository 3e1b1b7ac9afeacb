"""Which classes the reference has: the public names, and every config that an experiment or a comparison may hold."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import types
import typing
from typing import Protocol

import t2i_jax
from docs.ext.entries import PUBLIC
from t2i_jax.comparison.plan import Comparison
from t2i_jax.training.experiment import Experiment

PARTS = ("codecs", "data", "heads", "models", "networks", "nn", "noise", "sampling", "text", "training")
"""Packages whose dataclasses may be the value of a field that names a Protocol."""

WITHOUT = ("t2i_jax.data.glyphs", "t2i_jax.data.glyph_styles")
"""Modules that build a data set, and need tensorflow-datasets for it: no config is there."""


@functools.cache
def dataclasses_of_parts() -> tuple[type, ...]:
    """Every frozen dataclass of these packages."""
    found = {}
    for package in PARTS:
        home = importlib.import_module(f"t2i_jax.{package}")
        names = [home.__name__, *(m.name for m in pkgutil.walk_packages(home.__path__, f"{home.__name__}."))]
        for name in names:
            if name in WITHOUT:
                continue
            for value in vars(importlib.import_module(name)).values():
                if isinstance(value, type) and value.__module__ == name and _is_config(value):
                    found[value] = None
    return tuple(found)


def _is_config(cls: type) -> bool:
    frozen = dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # pyright: ignore
    return frozen and Protocol not in cls.__bases__ and not cls.__name__.startswith("_")


def _members(protocol: type) -> set[str]:
    """The names that a class needs to have to fit a Protocol."""
    names: set[str] = set()
    for base in protocol.__mro__:
        if Protocol in base.__bases__:
            names |= {n for n in [*vars(base), *vars(base).get("__annotations__", {})] if not n.startswith("_")}
    return names


@functools.cache
def fitting(protocol: type) -> tuple[type, ...]:
    """The configs that have the members of a Protocol."""
    wanted = _members(protocol)
    return tuple(c for c in dataclasses_of_parts() if wanted and wanted <= {*dir(c), *_field_names(c)})


def _field_names(cls: object) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]


def _classes(hint: object) -> set[type]:
    """The classes that a type names, at any depth."""
    inside = typing.get_args(hint)
    found = set().union(*map(_classes, inside)) if inside else set()
    return found | ({hint} if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) else set())


def held(hint: object) -> set[type]:
    """The configs that a field of this type may have as its value."""
    named = {c for c in _classes(hint) if c.__module__.startswith("t2i_jax")}
    protocols = {c for c in named if Protocol in c.__bases__}
    return {c for c in (named - protocols).union(*map(fitting, protocols)) if c in configs()}


@functools.cache
def configs() -> tuple[type, ...]:
    """Every config class that a config file may hold, from `Experiment` and `Comparison` down."""
    found, waiting = {}, [Experiment, Comparison]
    while waiting:
        cls = waiting.pop()
        if Protocol in cls.__bases__:
            waiting += [c for c in fitting(cls) if c not in found]
        elif dataclasses.is_dataclass(cls) and cls.__module__.startswith("t2i_jax") and cls not in found:
            found[cls] = None
            hints = typing.get_type_hints(cls, include_extras=True)
            for name in _field_names(cls):
                waiting += [c for c in _classes(hints[name]) if c.__module__.startswith("t2i_jax")]
    return tuple(found)


def documented() -> list[type | types.FunctionType]:
    """All entries of the reference, by module and in the order of their sources."""
    things = [*PUBLIC, *(c for c in configs() if c not in PUBLIC)]
    return sorted(things, key=lambda t: (t.__module__, getattr(t, "__qualname__", "")))


def package(thing: type | types.FunctionType) -> str:
    """The part of the library that it belongs to, as `models`."""
    return thing.__module__.removeprefix(f"{t2i_jax.__name__}.").partition(".")[0]
