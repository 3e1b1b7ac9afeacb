"""Configs as the Python files that build them."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping

from t2i_jax.core.config import ConfigError
from t2i_jax.core.fields import values

WIDTH = 120


def config_file(experiment: object, about: str, **notes: str) -> str:
    """The text of a config file that builds `experiment`: imports, and one call with the fields that differ from their
    defaults.

    about: its docstring. notes: a comment for a field of the experiment, above its line. Errors: `ConfigError` for a
    value that is no plain one, no dataclass and no tuple or dictionary of these.
    """
    modules: dict[str, set[str]] = {}
    call = _written(experiment, modules, "", len("experiment = "), notes)
    imports = "\n".join(f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(modules.items()))
    doc = textwrap.fill(about, WIDTH, break_long_words=False, break_on_hyphens=False).replace("\\", "\\\\")
    return f'"""{doc}"""\n\n{imports}\n\nexperiment = {call}\n'


def _written(
    value: object, modules: dict[str, set[str]], indent: str, used: int, notes: Mapping[str, str] | None = None
) -> str:
    """The expression of a value. indent: of its line; used: columns that are taken of the first line."""
    if value is None or isinstance(value, bool | int | float | str):
        if (isinstance(value, float) and value != value) or value in (float("inf"), -float("inf")):
            return f"float({str(value)!r})"
        plain = isinstance(value, str) and value.isprintable() and not {'"', "\\"} & set(value)
        return f'"{value}"' if plain else repr(value)
    deeper = indent + "    "
    if isinstance(value, tuple | list):
        parts = [_written(x, modules, deeper, len(deeper)) for x in value]
        return _joined("(", parts, ",)" if len(parts) == 1 else ")", indent, used, [])
    if isinstance(value, dict):
        parts = [f"{k!r}: {_written(v, modules, deeper, len(deeper) + len(repr(k)) + 2)}" for k, v in value.items()]
        return _joined("{", parts, "}", indent, used, [])
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise ConfigError(f"a config file holds plain values and dataclasses, not {type(value).__name__}: {value!r}")
    kind = type(value)
    modules.setdefault(kind.__module__, set()).add(kind.__qualname__)
    given = values(value)
    missing = object()
    parts, said = [], []
    for field in dataclasses.fields(value):
        made = field.default_factory
        default = made() if made is not dataclasses.MISSING else field.default
        default = missing if default is dataclasses.MISSING else default
        if field.name not in given or given[field.name] == default:
            continue
        inner = _written(given[field.name], modules, deeper, len(deeper) + len(field.name) + 1)
        parts.append(f"{field.name}={inner}")
        said.append((notes or {}).get(field.name, ""))
    return _joined(f"{kind.__qualname__}(", parts, ")", indent, used, said)


def _joined(start: str, parts: list[str], end: str, indent: str, used: int, notes: list[str]) -> str:
    flat = start + ", ".join(parts) + end
    if "\n" not in flat and used + len(flat) < WIDTH and not any(notes):
        return flat
    lines = []
    for part, note in zip(parts, notes or [""] * len(parts), strict=True):
        lines += [f"{indent}    # {note}"] if note else []
        lines.append(f"{indent}    {part},")
    return "\n".join([start, *lines, f"{indent}{end.lstrip(',')}"])
