"""Published checkpoints to models of this library, and back.

`t2i_jax.interop` has published names and layouts; here each published format is bound to the configuration that
its tensors belong to. `convert("llamagen", read(path))` gives the configuration and the model, the released size
recognised from the shapes; `restore` gives the published names back.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t2i_jax.core.conditions import Tokenizer
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.params import HasInit, abstract
from t2i_jax.core.types import Trainable
from t2i_jax.interop import huggingface
from t2i_jax.interop.names import Fields, Table, Tensors, renamed, to_ours, to_theirs
from t2i_jax.interop.tensorfile import content
from t2i_jax.interop.wrapping import holds, located

MODULES = (
    *("ar", "clip", "coarse_to_fine", "codecs", "damsm", "diffusers", "discrete", "gan", "gaussian", "imagen"),
    *("masked", "staged_gan", "stream", "unclip", "var"),
)
"""Modules of this package that define FORMATS."""


class ModelFolder(NamedTuple):
    """The contents of a published folder."""

    tensors: Tensors
    hints: Fields
    """hints from its settings"""
    codec: tuple[Trainable, nnx.Module] | None = None
    """configuration and model of its codec"""
    text: Tokenizer | None = None
    """its tokenizer or text encoder"""


C = TypeVar("C", bound=HasInit)
"""the configuration of a model"""


@dataclasses.dataclass(frozen=True)
class Format(Generic[C]):
    """One kind of published file."""

    describe: Callable[..., C]
    """(tensors, **hints) -> the configuration whose model they fill; tensors may be abstract. Hints are keyword-only,
    say what shapes cannot, and default to the released values."""
    table: Callable[[C], Table]
    """configuration -> the name and layout of each variable in the file"""
    unused: str = ""
    """regular expression of names in the file that are ignored"""
    needed: tuple[tuple[str, ...], ...] = ()
    """names that identify the model in a file; further ones are for files that lack the first"""
    renames: tuple[tuple[str, str], ...] = ()
    """regular expressions of other names of the same tensors, and the names that the table has"""
    part: str = ""
    """prefix of its names in a file that holds other models too"""
    buffers: Callable[[C], Mapping[str, np.ndarray]] | None = None
    """configuration -> tensors that the published program expects besides the weights, and computes itself"""
    title: str = ""
    """a description for help texts"""
    example: str = ""
    """file and hints of a command that converts one"""
    adapt: Callable[..., tuple[Tensors, Fields]] | None = None
    """(tensors, **hints) -> the tensors that the table names, and the other hints: for a file that needs another one"""
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """regular expressions of the stems of several published files that make one model, and the prefix of the names of
    each: a folder that holds them is read as one file"""
    optional: tuple[str, ...] = ()
    """those of `files` that may be missing"""
    folder: Callable[[Path], ModelFolder] | None = None
    """reads a folder with settings, where the format has such folders"""
    alone: Callable[[nnx.Module], nnx.Module] | None = None
    """the model without the part that the file lacks, a copy of its codec's vectors (`core.types.ReadsCodec`)"""
    fit_text: Callable[[C, Tokenizer | None], Tokenizer | None] | None = None
    """(configuration, tokenizer of the folder if it has one) -> the tokenizer with what hints have set"""


def formats() -> dict[str, Format]:
    """Every known format by name."""
    return {
        name: format
        for module in MODULES
        for name, format in importlib.import_module(f"t2i_jax.convert.{module}").FORMATS.items()
    }


def find(name: str) -> Format:
    """The format of that name, hyphens or underscores. Errors: `ConfigError` with the known ones."""
    known = formats()
    for spelling in (name, name.lower().replace("_", "-"), name.lower().replace("-", "_")):
        if spelling in known:
            return known[spelling]
    near = difflib.get_close_matches(name.lower(), known, 1, 0.4)
    meant = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"there is no format {name!r}; {meant}known are {', '.join(sorted(known))}")


def read(path: str | os.PathLike, name: str) -> Tensors:
    """The tensors of a published file as NumPy arrays, under the published names.

    path: a safetensors or PyTorch file under any ending, of a dictionary or of a whole module; the index of a file that
    is cut into shards; a folder with one of these, or with the several files of a format.
    Errors: OSError, ValueError naming the file.
    """
    path, format = Path(path), find(name)
    if not path.is_dir() or not format.files:
        return dict(huggingface.Weights(path, *format.needed, part=format.part))
    there = sorted(path.iterdir())
    found = {stem: [file for file in there if re.fullmatch(stem, file.stem)] for stem in format.files}
    found = {stem: files for stem, files in found.items() if files or stem not in format.optional}
    for stem, files in found.items():
        if len(files) != 1:
            wanted, several = " and ".join(format.files), ", ".join(file.name for file in files) or "none"
            raise ValueError(f"{path}: {name} is read from one file each of {wanted}; of {stem} there is {several}")
    parts = {stem: unwrapped(content(file), format, str(file)) for stem, (file,) in found.items()}
    return {f"{format.files[stem]}{name}": tensor for stem, part in parts.items() for name, tensor in part.items()}


def unwrapped(content: object, format: Format, file: str = "the file") -> Tensors:
    """The tensors of a model in the content of a file, without the wrappers of training programs."""
    return dict(located(content, *format.needed, part=format.part, file=file))


def alike(tensors: Tensors) -> list[str]:
    """Formats that have such names."""
    return [name for name, format in formats().items() if format.needed and holds(tensors, *format.needed)]


def convert(name: str, tensors: Tensors, file: str = "the file", **hints: object) -> tuple[Trainable, nnx.Module]:
    """The configuration and the model of a published file's tensors (arrays, or `jax.ShapeDtypeStruct`s for a check).

    Errors: ValueError that lists every missing, unused or wrongly shaped name.
    """
    format = find(name)
    if format.renames:
        tensors = {renamed(name, format.renames): tensor for name, tensor in tensors.items()}
    if format.adapt is not None:
        tensors, hints = format.adapt(tensors, **hints)
    config = format.describe(tensors, **hints)
    model = part_in_files(format, abstract(config))
    fill = lambda tensors: to_ours(model, tensors, format.table(config), format.unused, file)
    if any(isinstance(t, jax.ShapeDtypeStruct) for t in tensors.values()):
        return config, jax.eval_shape(fill, dict(tensors))
    return config, jax.tree.map(jnp.asarray, fill(tensors))


def restore(name: str, config: Trainable, model: nnx.Module) -> dict[str, np.ndarray]:
    """The model's variables (or gradients) under the published names, in the published layouts."""
    format = find(name)
    return to_theirs(part_in_files(format, model), format.table(config))


def part_in_files(format: Format, model: nnx.Module) -> nnx.Module:
    """The part of a model that files of the format hold."""
    return model if format.alone is None else format.alone(model)
