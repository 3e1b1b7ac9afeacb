"""Inputs and outputs of components, as data: fields of a batch, codes, samples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np

from t2i_jax.core.errors import ConfigError, DataError

KINDS = {"int32": "iu", "uint8": "u", "bool": "b"}
"""NumPy kinds accepted for each dtype of a field other than floats."""


class Shaped(Protocol):
    """An array, or its abstract shape and dtype."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...


@dataclasses.dataclass(frozen=True)
class FieldSpec:
    """One field of a batch that a model reads.

    Integers of any width are accepted for `int32`, floats of any width for `float32`. Bounds are inclusive; they are
    not checked for `uint8` images and floats, as only integers index tables.
    """

    shape: tuple[int | None, ...]
    """without the batch dimension; None: any size"""
    dtype: Literal["int32", "uint8", "bool", "float32"]
    low: int | None = None
    """least value"""
    high: int | None = None
    """largest value"""
    optional: bool = False
    """a batch may omit it"""
    one_of: str = ""
    """name of a group of optional fields, at least one of which a batch holds; the first one present is read"""
    multiple: int = 1
    """sizes that are None are multiples of this"""

    def fault(self, value: Shaped, batched: bool = False) -> str:
        """What is wrong with a value, and what is accepted; empty if nothing is.

        value: array, or its abstract shape and dtype, whose bounds are not checked. batched: it has a batch dimension
        first.
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
    """A readable shape: 4x4x3, or `one number`."""
    return "x".join("any" if n is None else str(n) for n in shape) or "one number"


BatchSpec = Mapping[str, FieldSpec]
"""Fields of a batch that a model reads, by name; other fields of a batch are ignored."""


def in_common(specs: Sequence[BatchSpec]) -> BatchSpec:
    """The fields that batches of all these specs have; a size in which they differ may be any."""
    first = dict(specs[0])
    for spec in specs[1:]:
        for name, field in spec.items():
            sizes = tuple(a if a == b else None for a, b in zip(first[name].shape, field.shape, strict=True))
            first[name] = dataclasses.replace(first[name], shape=sizes)
    return first


WEIGHT = FieldSpec((), "float32", optional=True)
"""Weight of an example in a loss; 0 excludes it."""

SOURCES = {
    "image": "a data source with images",
    "codes": "a codec (`codec` of the experiment), or a data set that `t2i encode` has written",
    "label": "a data source with class labels",
    "text": "the tokenizer of the experiment (`text`)",
    "text_mask": "the tokenizer of the experiment (`text`)",
    "features": "a frozen text encoder (`text` of the experiment), or a data set that `t2i encode` has written",
    "null_features": "the same encoder, from an empty caption",
    "image_features": "an encoder of captions and images (`text` of the experiment), or the prior of unCLIP",
    "similarity": "unCLIP, from the embeddings of caption and image",
    "neighbour_image": "a text that retrieves images with captions (`text` of the experiment: NeighbourPairs)",
    "neighbour_features": "the same text, from the captions of neighbours",
    "prefix": "the caller: the first tokens of the sequence",
    "crop": "a data source with images, or what `t2i encode` has written of them",
    "low_res": "the caller: the small image to enlarge; or `upscale` of the model makes it of the image, or training "
    "with a codec",
    "low_codes": "the codec of the experiment, from images, or a data set that `t2i encode` has written",
    "low_res_noise": "the caller: the noise level of the small image",
}
"""Source of each field of a batch."""


def missing(name: str, batch: Iterable[str]) -> str:
    """The error message for a batch, or an example, that lacks a field."""
    source = f"; it comes from {SOURCES[name]}" if name in SOURCES else ""
    return f"there is no '{name}', which the model takes{source}. There is: {', '.join(sorted(batch)) or 'nothing'}"


def check_example(spec: BatchSpec, example: Mapping[str, Shaped], batched: bool = False) -> None:
    """Check an example against a spec.

    batched: the first dimension of every array is that of a batch, as for `check_batch`. Errors: `DataError` that names
    the field that a model cannot read.
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


def check_batch(spec: BatchSpec, batch: Mapping[str, Shaped]) -> None:
    """Check a batch of arrays or abstract arrays. Errors: `DataError` that names the field that a model cannot read."""
    check_example(spec, batch, batched=True)


@dataclasses.dataclass(frozen=True)
class CodeSpec:
    """The code at one position of a grid: indices into a codebook, or a vector of real numbers."""

    dtype: Literal["int32", "float32"]
    shape: tuple[int, ...] = ()
    """shape at one position: () for one number"""
    sizes: tuple[int, ...] = ()
    """number of values of each integer of a position, from 0 on; () for real numbers"""

    @property
    def is_discrete(self) -> bool:
        return self.dtype == "int32"

    @property
    def values(self) -> int:
        """Number of values of a discrete code."""
        return math.prod(self.sizes)

    def __str__(self) -> str:
        return f"{self.values} codes" if self.is_discrete else f"codes of {_by(self.shape)} numbers"

    def of_position(self, patch: int) -> CodeSpec:
        """The code of one position, if this is the code of a token of `patch` x `patch` positions (`nn.tokens`).

        Errors: `ConfigError` if a token cannot be split into that many positions.
        """
        if patch == 1:
            return self
        if len(self.shape) != 1 or self.shape[0] % patch**2:
            size = "one number" if not self.shape else f"{_by(self.shape)} numbers"
            raise ConfigError(f"patch {patch}: a code of {size} cannot be made of those of {patch}x{patch} positions")
        return CodeSpec(self.dtype, (self.shape[0] // patch**2,), self.sizes[:: patch**2])

    def field(self, grid: tuple[int, ...]) -> FieldSpec:
        """The codes of an image, such as rows x columns, as a field of a batch."""
        if not self.is_discrete:
            return FieldSpec((*grid, *self.shape), "float32")
        return FieldSpec((*grid, *self.shape), "int32", 0, max(self.sizes) - 1)


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """The samples of a family."""

    grid: tuple[int, int]
    """rows and columns of codes, of latents, or of pixels"""
    code: CodeSpec
    """code of one position"""
    patch: int = 1
    """side of a token of the model, in positions; `grid` is a multiple of it"""
    scales: tuple[int, ...] = ()
    """sides of several maps of codes, the last that of `grid`: a sample is all their codes, one map after the other,
    each in raster order; (): it is one map"""

    @property
    def kind(self) -> Literal["tokens", "latents", "pixels"]:
        """Kind of sample: code indices (tokens) and latents need a codec; pixels, three numbers, are images in [-1,
        1]."""
        return "tokens" if self.code.is_discrete else "pixels" if self.code.shape == (3,) else "latents"

    @property
    def tokens(self) -> tuple[int, int]:
        """Rows and columns of tokens of the model."""
        return self.grid[0] // self.patch, self.grid[1] // self.patch

    @property
    def length(self) -> int:
        """Number of tokens of the model."""
        return sum(n * n for n in self.scales) or math.prod(self.tokens)

    @property
    def field(self) -> FieldSpec:
        """Samples as a field of a batch."""
        return self.code.field(self.places)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (*self.places, *self.code.shape)

    @property
    def places(self) -> tuple[int, ...]:
        """Shape of the codes of one sample: rows and columns, or the codes of all scales in one dimension."""
        return (self.length,) if self.scales else self.grid


@dataclasses.dataclass(frozen=True)
class CodecSpec:
    """The codes of an image of any size whose sides are multiples of `factor`, or of one size where it has `scales`."""

    factor: int
    """pixels per code along each side"""
    code: CodeSpec
    encodes: bool = True
    decodes: bool = True
    """False for an encoder alone, as some published files hold"""
    scales: tuple[int, ...] = ()
    """sides of several maps of codes, as of a `SampleSpec`: images are square, of `factor` times the last"""
