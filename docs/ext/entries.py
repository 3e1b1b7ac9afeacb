"""What the reference says of one class or function, read from its source: signature, docstring, fields, methods."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple, Protocol

import t2i_jax as t2i
from docs.ext.words import words
from t2i_jax.core.fields import FLOAT_MAX, FREE, LARGEST, SAMPLED, File, Range

PUBLIC = {getattr(t2i, name): f"t2i_jax.{name}" for name in t2i.__all__ if callable(getattr(t2i, name))}
"""Public classes and functions, and the names by which users import them."""


class Field(NamedTuple):
    """A row of a table of fields."""

    name: str
    kind: str
    default: str
    range: str
    about: str


def name_of(thing: type | types.FunctionType) -> str:
    """The name under which the reference has it: the public one if there is one."""
    return PUBLIC.get(thing, f"{thing.__module__}.{thing.__qualname__}")


def link(thing: type) -> str:
    """A link to its entry."""
    return f"{{py:obj}}`{thing.__name__} <{name_of(thing)}>`"


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(importlib.import_module(module)))


def _node(thing: type | types.FunctionType) -> ast.ClassDef | ast.FunctionDef | None:
    """The definition in the source; None of what is generated, such as a `NamedTuple` by a call."""
    found: ast.AST | None = _tree(thing.__module__)
    for name in thing.__qualname__.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef)
        inside = [n for n in ast.walk(found) if isinstance(n, kinds) and n.name == name]
        if not inside:
            return None
        found = inside[-1]  # the last of overloads is the implementation
    assert isinstance(found, ast.ClassDef | ast.FunctionDef)
    return found


def _texts(cls: type) -> dict[str, str]:
    """The strings under the fields of a class."""
    node = _node(cls)
    body = node.body if node else []
    found, last = {}, ""
    for one in body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            last = one.target.id
        elif isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant) and isinstance(one.value.value, str):
            found |= {last: " ".join(inspect.cleandoc(one.value.value).split())} if last else {}
        else:
            last = ""
    return found


def fields(cls: type) -> Iterator[Field]:
    """The fields that the constructor of a dataclass takes, those of its bases first."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("t2i_jax"):
            texts |= _texts(base)
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        if field.init:
            hint = hints[field.name]
            notes = list(_marks(hint))
            said = texts.get(field.name) or words(cls.__name__, field.name) or _of_held(hint)
            about = " ".join([said[:1].upper() + said[1:], *notes]).strip()
            yield Field(field.name, kind_of(hint), _default(field), range_of(hint), about)


def _of_held(hint: object) -> str:
    """The first sentence on the class that a field holds."""
    inside = [hint, *typing.get_args(hint)]
    held = [k for k in inside if isinstance(k, type) and (dataclasses.is_dataclass(k) or Protocol in k.__bases__)]
    return first(held[0]) if len(held) == 1 else next((s for k in inside[1:] if not held and (s := _of_held(k))), "")


def first(thing: object) -> str:
    """The first sentence of a docstring."""
    block = " ".join(docstring(thing)).split("  ")[0].strip()
    sentence = re.split(r"(?<!al)\. (?=[A-Z`])|: ?$", block)[0].rstrip(".:")
    return f"{sentence}." if sentence else ""


def _marks(hint: object) -> Iterator[str]:
    for mark in typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ():
        if mark is FREE:
            yield "(A run may go on with another value.)"
        elif mark is SAMPLED:
            yield "(A trained model may be sampled with another value.)"
        elif isinstance(mark, File):
            yield f"(The file goes with a released model, as `{mark.name}`.)"


def kind_of(hint: object) -> str:
    """A type in words: `int`, `"a" or "b"`, `several of float`, links to configs."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return kind_of(inside[0])
    if origin in (typing.Union, types.UnionType):
        kinds = list(dict.fromkeys(kind_of(k) for k in inside if k is not types.NoneType))
        return " or ".join(kinds + ["None"] * (types.NoneType in inside))
    if origin is Literal:
        return " or ".join(f'`"{word}"`' if isinstance(word, str) else f"`{word}`" for word in inside)
    if origin is tuple:
        if inside[1:] == (...,):
            return f"several: {kind_of(inside[0])}"
        kinds = [kind_of(k) for k in inside]
        return f"{len(kinds)} of {kinds[0]}" if len(set(kinds)) == 1 else f"({', '.join(kinds)})"
    if origin is not None and inside:
        if issubclass(origin, typing.Mapping):
            return f"by name: {kind_of(inside[1])}"
        return f"several: {kind_of(inside[0])}" if issubclass(origin, typing.Sequence) else kind_of(origin)
    if isinstance(hint, type) and Protocol in hint.__bases__:
        links = [link(c) for c in _fitting(hint)]
        return f"`{hint.__name__}`" + (f": {', '.join(links)}" if 0 < len(links) <= SHOWN else "")
    if isinstance(hint, type):
        own = hint.__module__.startswith("t2i_jax")
        documented = own and (dataclasses.is_dataclass(hint) or hint in PUBLIC) and hint in _entries()
        return link(hint) if documented else f"`{hint.__name__}`"
    return f"`{str(hint).replace('typing.', '')}`"


SHOWN = 12
"""At most so many configs are listed of those that fit a Protocol."""


def _fitting(protocol: type) -> tuple[type, ...]:
    from docs.ext.reach import fitting

    return fitting(protocol)


@functools.cache
def _entries() -> frozenset[object]:
    from docs.ext.reach import documented

    return frozenset(documented())


def range_of(hint: object) -> str:
    """The range of a number, or of each of several; empty if there is none."""
    for mark in typing.get_args(hint):
        if isinstance(mark, Range):
            said = str(mark).replace(f" to {LARGEST}", " or more").replace(f" to {FLOAT_MAX:g}", " or more")
            said = re.sub(r"\b(\d{10,})\b", lambda found: _power(int(found[1])), said)
            return said.replace("a finite number", "finite")
        if typing.get_origin(hint) in (typing.Union, types.UnionType) and (said := range_of(mark)):
            return said
    return ""


def _power(number: int) -> str:
    bits = (number + 1).bit_length() - 1
    return f"2^{bits} - 1" if number == 2**bits - 1 else str(number)


def _default(field: dataclasses.Field) -> str:
    missing = dataclasses.MISSING
    if field.default is not missing:
        return f"`{short(field.default)}`"
    if field.default_factory is not missing:
        return f"`{short(field.default_factory())}`"
    return "needed"


def short(value: object) -> str:
    """A value as Python writes it, configs with what differs from their defaults alone."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown = []
        for field in dataclasses.fields(value):
            if not field.init:
                continue
            own = getattr(value, field.name)
            usual = field.default
            if field.default_factory is not dataclasses.MISSING:
                usual = field.default_factory()
            if usual is dataclasses.MISSING or own != usual:
                shown.append(f"{field.name}={short(own)}")
        return f"{type(value).__name__}({', '.join(shown)})"
    if isinstance(value, typing.Mapping):
        return "{" + ", ".join(f"{k!r}: {short(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        inside = ", ".join(map(short, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, types.FunctionType | type):
        return value.__name__
    return repr(value).replace('"', "'") if isinstance(value, str) else repr(value)


def table(cls: type) -> list[str]:
    """The fields of a dataclass as lines of Markdown."""
    lines = ["```{table}", ":class: fields", "", _row(["field", "type and default", "what it is"]), "|---|---|---|"]
    rows = []
    for field in fields(cls):
        range = f", {field.range}" if field.range else ""
        default = ", needed" if field.default == "needed" else f"; default {field.default}"
        rows.append(_row([f"`{field.name}`", f"{field.kind}{range}{default}", field.about]))
    return [*lines, *rows, "```", ""] if rows else []


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def docstring(thing: object) -> list[str]:
    """A docstring as lines of Markdown. An indented block in it is Python."""
    text = inspect.getdoc(thing) or ""
    if isinstance(thing, type) and dataclasses.is_dataclass(thing) and text.startswith(f"{thing.__name__}("):
        text = ""  # made by `dataclass`
    blocks = re.split(r"\n\s*\n", text)
    lines = []
    for block in blocks:
        if block.startswith("    "):
            lines += ["```python", *textwrap.dedent(block).split("\n"), "```", ""]
        elif block.startswith(">>> "):
            lines += ["```pycon", *block.split("\n"), "```", ""]
        else:
            lines += [*block.split("\n"), ""]
    return lines


def signature(node: ast.FunctionDef) -> list[str]:
    """The head of a function as its source has it, an argument a line where it is long."""
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args]
    if every and every[0].arg in ("self", "cls"):
        every = every[1:]
    defaults = [None] * (len(every) - len(arguments.defaults)) + list(arguments.defaults)[-len(every) or None :]
    words = [_argument(a, d) for a, d in zip(every, defaults, strict=False)]
    if arguments.vararg:
        words.append(f"*{_argument(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        words.append("*")
    words += [_argument(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        words.append(f"**{_argument(arguments.kwarg, None)}")
    gives = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    one = f"{node.name}({', '.join(words)}){gives}"
    if len(one) <= 88:
        return [one]
    return [f"{node.name}(", *(f"    {word}," for word in words), f"){gives}"]


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    return argument.arg + kind + (f"{' = ' if kind else '='}{ast.unparse(default)}" if default else "")


def methods(cls: type) -> Iterator[tuple[str, ast.FunctionDef, object]]:
    """The methods and properties that a class itself documents: kind, source and value."""
    node = _node(cls)
    for one in node.body if isinstance(node, ast.ClassDef) else ():
        named = isinstance(one, ast.FunctionDef) and (not one.name.startswith("_") or one.name == "__call__")
        if not isinstance(one, ast.FunctionDef) or not named or not ast.get_docstring(one):
            continue
        value = vars(cls).get(one.name)
        if isinstance(value, property | functools.cached_property):
            yield "property", one, value
        elif isinstance(value, classmethod | staticmethod):
            yield type(value).__name__, one, value.__func__
        elif callable(value):
            yield "method", one, value


def entry(thing: type | types.FunctionType, level: int = 2) -> list[str]:
    """The entry of a class or a function as lines of Markdown."""
    name, kind = name_of(thing), "class" if isinstance(thing, type) else "function"
    lines = [f"{'#' * level} {thing.__name__ if thing not in PUBLIC else name.rpartition('.')[2]}", ""]
    lines += [f"```{{py:{kind}}} {name}", ":no-typesetting:", "```", ""]
    where = f"{thing.__module__}:{thing.__qualname__}"
    lines += [f"`{where}`" if thing not in PUBLIC else f"`t2i.{name.rpartition('.')[2]}`, in `{where}`", ""]
    node = _node(thing)
    if kind == "function" and isinstance(node, ast.FunctionDef):
        lines += ["```python", *signature(node), "```", ""]
    lines += docstring(thing)
    if isinstance(thing, type) and dataclasses.is_dataclass(thing):
        lines += table(thing)
    if isinstance(thing, type) and Protocol not in thing.__bases__:
        for what, source, value in methods(thing):
            directive = {"property": "property", "classmethod": "method", "staticmethod": "method"}.get(what, "method")
            lines += [f"```{{py:{directive}}} {name}.{source.name}", ":no-typesetting:", "```", ""]
            if what == "property":
                gives = f": {ast.unparse(source.returns)}" if source.returns else ""
                lines += ["```python", f"{source.name}{gives}", "```", ""]
            else:
                made = ["@classmethod"] if what == "classmethod" else []
                lines += ["```python", *made, *signature(source), "```", ""]
            lines += docstring(value)
    return lines
