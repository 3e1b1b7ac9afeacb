"""What a part of the library takes and gives, as data: fields of a batch, codes, samples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from t2i_jax.core.errors import ConfigError, DataError

KINDS = {"int32": "iu", "uint8": "u", "bool": "b"}
"""NumPy kinds that are taken for each dtype of a field but floats."""


@dataclasses.dataclass(frozen=True)
class FieldSpec:
    """What a model takes under one name of a batch.

    Integers of any width are taken for `int32`, floats of any width for `float32`. Bounds are inclusive; for an image
    as `uint8` and for floats they are not looked at, as only integers index tables.
    """

    shape: tuple[int | None, ...]
    """without the batch dimension; None is any size"""
    dtype: Literal["int32", "uint8", "bool", "float32"]
    low: int | None = None
    """least value"""
    high: int | None = None
    """largest value"""
    optional: bool = False
    """a batch may lack it"""
    one_of: str = ""
    """name of a group of optional fields, one of which a batch holds at least; the first that is there is read"""
    multiple: int = 1
    """sizes that are not given are multiples of this"""

    def fault(self, value: Any, batched: bool = False) -> str:
        """What is wrong with a value, and what is taken; empty if nothing is.

        value: array, or its abstract shape and dtype, of which no bounds are looked at. batched: its first dimension is
        that of a batch.
        """
        shape, dtype = tuple(value.shape)[batched:], np.dtype(value.dtype)
        floating = dtype.kind == "f" or dtype.name in ("bfloat16", "float16")
        if not (floating if self.dtype == "float32" else dtype.kind in KINDS[self.dtype]):
            return f"is {dtype.name}; the model takes {self.dtype} {self._sizes()}"
        free = lambda n, m: m % self.multiple == 0 if n is None else n == m
        if len(shape) != len(self.shape) or not all(map(free, self.shape, shape)):
            return f"has shape {_by(shape)}; the model takes {self._sizes()}"
        if self.dtype != "int32" or not isinstance(value, np.ndarray | np.generic) or not value.size:
            return ""
        low, high = int(value.min()), int(value.max())
        if (self.low is not None and low < self.low) or (self.high is not None and high > self.high):
            worst = low if self.low is not None and low < self.low else high
            return f"holds {worst}; the model takes {self.low} to {self.high}"
        return ""

    def _sizes(self) -> str:
        several = f", multiples of {self.multiple}" if self.multiple > 1 else ""
        return _by(self.shape) + several


def _by(shape: tuple[int | None, ...]) -> str:
    """A shape for people: 4x4x3, or `one number`."""
    return "x".join("any" if n is None else str(n) for n in shape) or "one number"


BatchSpec = Mapping[str, FieldSpec]
"""What a model takes of a batch, by name; what a batch has beyond it is not looked at."""

WEIGHT = FieldSpec((), "float32", optional=True)
"""Of an example in a loss; 0 leaves it out."""

SOURCES = {
    "image": "a data source with images",
    "codes": "a codec (`codec` of the experiment), or a data set that `t2i encode` has written",
    "label": "a data source with class labels",
    "text": "the tokenizer of the experiment (`text`)",
    "text_mask": "the tokenizer of the experiment (`text`)",
    "features": "a frozen text encoder (`text` of the experiment), or a data set that `t2i encode` has written",
    "null_features": "the same encoder, from an empty caption",
    "prefix": "the caller: the first tokens of the sequence",
    "low_res": "the caller: the small image to enlarge; or `enlarges` of the model makes it of the image",
    "low_res_noise": "the caller, who knows how noisy the small image is",
}
"""Where a field of a batch comes from."""


def missing(name: str, batch: Mapping[str, Any]) -> str:
    """What to say of a batch, or of an example, that lacks a field."""
    source = f"; it comes from {SOURCES[name]}" if name in SOURCES else ""
    return f"there is no '{name}', which the model takes{source}. There is: {', '.join(sorted(batch)) or 'nothing'}"


def check_example(spec: BatchSpec, example: Mapping[str, Any], batched: bool = False) -> None:
    """Errors: `DataError` that names the field of an example that a model cannot take.

    batched: the first dimension of every array is that of a batch, as it is for `check_batch`.
    """
    for name, field in spec.items():
        group = [n for n, f in spec.items() if f.one_of == field.one_of] if field.one_of else []
        there = [n for n in group if n in example]
        if group and not there:
            raise DataError(f"there is none of {', '.join(map(repr, group))}: " + missing(group[0], example))
        if there and name != there[0]:
            continue
        if name not in example:
            if not field.optional:
                raise DataError(missing(name, example))
        elif fault := field.fault(example[name], batched):
            raise DataError(f"'{name}' {fault}")


def check_batch(spec: BatchSpec, batch: Mapping[str, Any]) -> None:
    """Errors: `DataError` that names the field of a batch, of arrays or of abstract ones, that a model cannot take."""
    check_example(spec, batch, batched=True)


@dataclasses.dataclass(frozen=True)
class CodeSpec:
    """What one position of a grid of codes holds: numbers of a codebook, or a vector of real ones."""

    dtype: Literal["int32", "float32"]
    shape: tuple[int, ...] = ()
    """of one position: () for one number"""
    sizes: tuple[int, ...] = ()
    """how many values each of the whole numbers of a position takes, from 0 on; () for real numbers"""

    @property
    def is_discrete(self) -> bool:
        return self.dtype == "int32"

    @property
    def values(self) -> int:
        """How many values a discrete code takes."""
        return math.prod(self.sizes)

    def __str__(self) -> str:
        return f"{self.values} codes" if self.is_discrete else f"codes of {_by(self.shape)} numbers"

    def of_position(self, patch: int) -> CodeSpec:
        """The code of one position, where this is that of a token of `patch` x `patch` positions (`nn.tokens`).

        Errors: `ConfigError` where a token cannot be made of so many.
        """
        if patch == 1:
            return self
        if len(self.shape) != 1 or self.shape[0] % patch**2:
            size = "one number" if not self.shape else f"{_by(self.shape)} numbers"
            raise ConfigError(f"patch {patch}: a code of {size} cannot be made of those of {patch}x{patch} positions")
        return CodeSpec(self.dtype, (self.shape[0] // patch**2,), self.sizes[:: patch**2])

    def field(self, grid: tuple[int, int]) -> FieldSpec:
        """The codes of an image, rows x columns of them, as a field of a batch."""
        if not self.is_discrete:
            return FieldSpec((*grid, *self.shape), "float32")
        return FieldSpec((*grid, *self.shape), "int32", 0, max(self.sizes) - 1)


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """What a family samples."""

    grid: tuple[int, int]
    """rows and columns of codes, of latents, or of pixels"""
    code: CodeSpec
    """of one position"""
    patch: int = 1
    """a token of the model is a square of so many positions a side; `grid` is a multiple of it"""

    @property
    def kind(self) -> Literal["tokens", "latents", "pixels"]:
        """Code numbers and latents need a codec; pixels, three numbers, are images in [-1, 1] without one."""
        return "tokens" if self.code.is_discrete else "pixels" if self.code.shape == (3,) else "latents"

    @property
    def tokens(self) -> tuple[int, int]:
        """Rows and columns of tokens of the model."""
        return self.grid[0] // self.patch, self.grid[1] // self.patch

    @property
    def field(self) -> FieldSpec:
        """Samples as a field of a batch."""
        return self.code.field(self.grid)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return (*self.grid, *self.code.shape)


@dataclasses.dataclass(frozen=True)
class CodecSpec:
    """What a codec makes of an image of any size whose sides are multiples of `factor`."""

    factor: int
    """pixels of a side for each code"""
    code: CodeSpec
    encodes: bool = True
    decodes: bool = True
    """False for one half of a codec, as some published files hold"""
