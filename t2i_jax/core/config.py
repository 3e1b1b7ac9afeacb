"""Experiments as values: a config file is Python that builds one frozen dataclass named `experiment`.

Loading a file, overriding fields from the command line (`--train.steps=100`), writing the resolved value as JSON and
reading it back, and comparing two of them.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import io
import json
import linecache
import re
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any, Protocol, TypeVar, cast, get_args

import tyro
from jax import Array
from tyro.constructors._struct_spec import InvalidDefaultInstanceError

from t2i_jax.core.errors import ConfigError as ConfigError
from t2i_jax.core.errors import did_you_mean
from t2i_jax.core.fields import values
from t2i_jax.core.migration import VERSION, Json, Object, migrated
from t2i_jax.core.outputs import write_text
from t2i_jax.core.sniff import sniff_file

T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def refused(what: str = "") -> Iterator[None]:
    """Within the block a `ValueError` becomes a `ConfigError`, whose message begins with `what`.

    For code that builds configs and options: their errors are the user's to correct.
    """
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{what}: {error}" if what else str(error)) from error
    except RecursionError as error:
        raise ConfigError(f"{what}: nested too deeply" if what else "nested too deeply") from error


def load(path: str | Path, overrides: Sequence[str] = ()) -> object:
    """The experiment of a config file (`.py`, or a resolved `config.json`), with command-line overrides applied.

    Errors: `ConfigError` for a missing file, a file that cannot be run or does not build `experiment`, a field that
    does not exist, a value that is refused.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.py")), 0.4)
        raise ConfigError(f"{path}: there is no such config file{near}")
    if path.suffix not in (".py", ".json"):
        raise ConfigError(f"{path}: a config is a Python file, or the config.json of a run")
    experiment = read_stored(path) if path.suffix == ".json" else _run_file(path)
    if path.suffix == ".json" and isinstance(experiment, dict):
        raise ConfigError(f"{path}: is no config of a run; a released model has neither data nor training")
    if not dataclasses.is_dataclass(experiment) or isinstance(experiment, type):
        raise ConfigError(f"{path}: must build a dataclass value named `experiment`")
    return override(experiment, overrides) if overrides else experiment


def write_stored(path: Path, value: object) -> None:
    """Write a config, or a dictionary of them, into a file that later versions of the library can read."""
    write_text(path, json.dumps(stored_form(value), indent=2))


def stored_form(value: object) -> Object:
    """Plain JSON of a config, or of a dictionary of them, with the version that it is written in."""
    content = to_json(value)
    assert isinstance(content, dict)
    return {"version": VERSION, **content}


def read_stored(path: Path) -> object:
    """A config written by `write_stored` of this version or an earlier one. Errors: `ConfigError` that names the file
    where it is cut short, edited so that it cannot be read, or of a later version."""
    content = read_migrated(path)
    with refused(str(path)):
        return from_json(content)


def read_migrated(path: Path) -> Object:
    """The plain JSON of a stored config as this version writes it. Errors: as `read_stored`."""
    content = read_json(path)
    with refused(str(path)):
        return migrated(content)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Errors: `ConfigError` that names it where it is cut short or something else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply") from error
    except ValueError as error:
        what = sniff_file(path)
        said = f"is {what}, not JSON" if what and "JSON" not in what else f"cut short, or no JSON: {error}"
        raise ConfigError(f"{path}: {said}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}; an object with fields is wanted")
    return content


def _run_file(path: Path) -> object:
    """The `experiment` of a Python file. Errors: `ConfigError` with the line of the file that failed."""
    try:
        return runpy.run_path(str(path)).get("experiment")
    except (Exception, SystemExit) as error:  # any error of the user's code
        if isinstance(error, SyntaxError):
            raise ConfigError(f"{path}, line {error.lineno}: {error.msg}") from error
        frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        near = _nearest_field(error) if isinstance(error, TypeError) else ""
        if isinstance(error, ModuleNotFoundError):
            near = "; if it is a file of this folder: PYTHONPATH=. t2i ..., else install it"
        at = f", line {frames[-1]}" if frames else ""
        raise ConfigError(f"{path}{at}: {kind}{error}{near}") from error


def override(value: T, arguments: Sequence[str], prog: str = "t2i") -> T:
    """`value` with fields replaced by `--a.b=c` arguments; unions keep the branch that the value already has.

    Errors: `ConfigError` for a field that does not exist, with the nearest one, and for a value that is refused.
    """
    kind, args, only = type(value), list(arguments), (tyro.conf.AvoidSubcommands,)
    return _parsed(kind, lambda: tyro.cli(kind, args=args, prog=prog, default=value, config=only, registry=_registry))


def parse(kind: type[T], arguments: Sequence[str], prog: str) -> T:
    """A dataclass parsed from command-line arguments by tyro; `--help` prints and exits.

    Errors: `ConfigError`, one line with the fault and a suggestion.
    """
    return _parsed(kind, lambda: tyro.cli(kind, args=list(arguments), prog=prog))


def parse_some(kind: type[T], arguments: Sequence[str], prog: str) -> tuple[T, list[str]]:
    """As `parse`, and the arguments that are not fields of the dataclass."""
    return _parsed(kind, lambda: tyro.cli(kind, args=list(arguments), prog=prog, return_unknown_args=True))


def _parsed(kind: type, parser: Callable[[], R]) -> R:
    """What tyro parses. Errors: as `parse`."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of generic classes; it would be part of the message
            return parser()
    except SystemExit as stop:
        if not stop.code:
            raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    message = _one_line(said.getvalue())
    # A dataclass's message about its field becomes one about the argument.
    refused = re.fullmatch(r"Error parsing (\S+): \w+\.(\w+) (.*)", message)
    if refused:
        name = refused[2] if refused[1] == kind.__name__ else f"{refused[1]}.{refused[2]}"
        message = f"--{name.replace('_', '-')} {refused[3]}"
    # A short word is close to every flag.
    raise ConfigError(message if len(message) <= MOST else f"{message[:MOST].rpartition(' ')[0] or message[:MOST]} ...")


MOST = 700
"""Characters of a message about arguments."""


def _one_line(box: str) -> str:
    """tyro's message, a box of several parts, without the help of the whole command."""
    rows = [row.strip("│ ") for row in box.splitlines() if not row.startswith(("╭", "╰"))]
    if re.fullmatch("-+", "".join(rows[1:2])):  # where the terminal has no boxes, the title is a row of its own
        rows = rows[2:]
    parts = [[]]
    for row in rows:
        if re.fullmatch("[─-]+", row):
            parts.append([])
        elif row:
            parts[-1].append(" ".join(row.split()))
    kept = [" ".join(part) for part in parts if part and not part[0].startswith(("For full helptext", "Argument help"))]
    return ". ".join(kept) or " ".join(box.split())


_registry = tyro.constructors.ConstructorRegistry()


@_registry.struct_rule
def _of_a_protocol(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    """Fields whose type is a Protocol, or one or None, are parsed as the dataclass that they hold."""
    kinds = get_args(info.type) or (info.type,)
    if not any(isinstance(k, type) and Protocol in k.__bases__ for k in kinds) or info.default is None:
        return None
    kind = type(info.default)
    if not dataclasses.is_dataclass(kind):
        # Of a branch of a union tyro asks without a value; it would take a Protocol of Protocols for a class to call.
        refusal = cast(tyro.constructors.StructConstructorSpec, InvalidDefaultInstanceError(()))
        return refusal if len(kinds) == 1 else None
    plain = tyro.constructors.StructTypeInfo.make(kind, info.default, info.in_union_context)
    spec = tyro.constructors.ConstructorRegistry.get_struct_spec(plain)
    return spec if isinstance(spec, tyro.constructors.StructConstructorSpec) else None


@_registry.primitive_rule
def _traced(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Options that are a number, or an array with one for each image, take a number from the command line."""
    optional = NoneType in get_args(info.type)
    plain = [t for t in get_args(info.type) if t not in (Array, NoneType)]
    if Array not in get_args(info.type) or len(plain) != 1 or plain[0] not in (bool, int, float):
        return None
    kind, words = plain[0], {"true": True, "false": False}

    def read(given: list[str]) -> float | None:
        if optional and given[0].lower() == "none":
            return None
        if kind is not bool:
            return kind(given[0])
        word = given[0].lower() if given else "true"
        if len(given) > 1 or word not in words:
            raise ValueError(f"{' '.join(given)!r} is neither true nor false")
        return words[word]

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*" if kind is bool else 1,
        metavar=("[TRUE|FALSE]" if kind is bool else kind.__name__.upper()) + "|NONE" * optional,
        instance_from_str=read,
        is_instance=lambda x: isinstance(x, kind | int if kind is float else kind) or (optional and x is None),
        str_from_instance=lambda x: [str(x)],
    )


def _nearest_field(error: TypeError) -> str:
    """A suggestion for a keyword argument that a dataclass does not take; empty for other errors."""
    words = str(error).split("'")
    kind = _called(error)
    if "unexpected keyword argument" not in str(error) or kind is None:
        return ""
    fields = [f.name for f in dataclasses.fields(kind) if f.init]
    return did_you_mean(words[1], fields) or (f"; the fields are {', '.join(fields)}" if fields else "")


def _called(error: TypeError) -> type | None:
    """The dataclass whose call raised an error before any code of its own ran; None where something else did.

    It is the callee at the position of the innermost frame: a name alone is ambiguous, as several classes have the same
    one.
    """
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    if at is None:
        return None
    code, names = at.tb_frame.f_code, {**at.tb_frame.f_globals, **at.tb_frame.f_locals}
    line, last_line, column, last_column = next(islice(code.co_positions(), at.tb_lasti // 2, None))
    place = (line, column, last_line, last_column)
    for node in ast.walk(ast.parse("".join(linecache.getlines(code.co_filename)))):
        if isinstance(node, ast.Call) and place == (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset):
            path, found = ast.unparse(node.func), None
            with contextlib.suppress(Exception):  # the callee has no name
                found = eval(path, names) if re.fullmatch(r"[\w.]+", path) else None
            return found if isinstance(found, type) and dataclasses.is_dataclass(found) else None
    return None


def to_json(value: object) -> Json:
    """Plain JSON of a config; a dataclass becomes an object with its class under "type"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        fields = {name: to_json(content) for name, content in values(value).items()}
        return {"type": f"{cls.__module__}:{cls.__qualname__}", **fields}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"a config holds plain values and dataclasses, not {type(value).__name__}: {value!r}")


def from_json(value: Json) -> object:
    """The config that `to_json` wrote. Lists come back as tuples: configs are immutable.

    Classes are taken from this library, or from a module that the program has imported already, never from elsewhere.
    """
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    fields = {k: from_json(v) for k, v in value.items() if k != "type"}
    if "type" not in value:
        return fields
    module, _, name = str(value["type"]).partition(":")
    if not (module.startswith("t2i_jax.") or module in sys.modules):
        raise ConfigError(
            f'config names the class "{value["type"]}": import its module before you load this config; '
            f"a command does so with T2I_IMPORT={module} before it"
        )
    # A stored class is known by its name alone.
    cls = getattr(importlib.import_module(module), name, None)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ConfigError(f'config names the class "{value["type"]}", which is no dataclass of that module')
    known = [f.name for f in dataclasses.fields(cls)]
    for field in fields:
        if field not in known:
            raise ConfigError(f"{name} has no field '{field}'{did_you_mean(field, known)}")
    with refused(name):
        try:
            return cls(**fields)
        except TypeError as error:  # a field without a default is missing, or one is of another type
            raise ConfigError(str(error)) from error


def changes(old: Json, new: Json, at: str = "") -> dict[str, tuple[Json, Json]]:
    """Where two JSON configs differ: the values before and after, by the field's dotted name."""
    if isinstance(old, dict) and isinstance(new, dict):
        names, found = [*old, *(k for k in new if k not in old)], {}
        for name in names:
            found |= changes(old.get(name), new.get(name), f"{at}.{name}" if at else name)
        return found
    return {} if old == new else {at: (old, new)}


def differences(old: Json, new: Json) -> list[str]:
    """Where two JSON configs differ, one line a field: `train.seed: 1 -> 2`."""
    return [f"{k}: {json.dumps(a)} -> {json.dumps(b)}" for k, (a, b) in changes(old, new).items()]
