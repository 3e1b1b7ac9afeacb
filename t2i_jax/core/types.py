"""What the parts of the library say of each other, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from t2i_jax.core.errors import DataError

KINDS = {"int32": "iu", "uint8": "u", "bool": "b", "float32": "f"}
"""NumPy kinds that are taken for each dtype of a field; floats of any width are (`bfloat16` has kind V)."""


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

    def fault(self, value: Any) -> str:
        """What is wrong with one value without a batch dimension, and what is taken; empty if nothing is.

        value: array, or its abstract shape and dtype, of which no bounds are looked at.
        """
        shape, dtype = tuple(value.shape), np.dtype(value.dtype)
        floating = dtype.kind == "f" or dtype.name in ("bfloat16", "float16")
        if not (floating if self.dtype == "float32" else dtype.kind in KINDS[self.dtype]):
            return f"is {dtype.name}; the model takes {self.dtype} {_sizes(self.shape)}"
        fits = len(shape) == len(self.shape) and all(n in (None, m) for n, m in zip(self.shape, shape, strict=True))
        if not fits:
            return f"has shape {_sizes(shape)}; the model takes {_sizes(self.shape)}"
        if self.dtype != "int32" or not isinstance(value, np.ndarray | np.generic) or not value.size:
            return ""
        low, high = int(value.min()), int(value.max())
        if (self.low is not None and low < self.low) or (self.high is not None and high > self.high):
            worst = low if self.low is not None and low < self.low else high
            return f"holds {worst}; the model takes {self.low} to {self.high}"
        return ""


BatchSpec = Mapping[str, FieldSpec]
"""What a model takes of a batch, by name; what a batch has beyond it is not looked at."""


def check_example(spec: BatchSpec, example: Mapping[str, Any]) -> None:
    """Errors: `DataError` that names the field of an example (no batch dimension) that a model cannot take."""
    for name, field in spec.items():
        if name not in example:
            if not field.optional:
                has = ", ".join(sorted(example)) or "nothing"
                raise DataError(f"there is no '{name}', which the model takes; there is {has}")
        elif fault := field.fault(example[name]):
            raise DataError(f"'{name}' {fault}")


def check_batch(spec: BatchSpec, batch: Mapping[str, Any]) -> None:
    """Errors: `DataError` that names the field of a batch, of arrays (b, ...) or of abstract ones, that a model cannot
    take."""
    batched = {name: dataclasses.replace(field, shape=(None, *field.shape)) for name, field in spec.items()}
    check_example(batched, batch)


def _sizes(shape: tuple[int | None, ...]) -> str:
    return "x".join("any" if n is None else str(n) for n in shape) or "one number"
