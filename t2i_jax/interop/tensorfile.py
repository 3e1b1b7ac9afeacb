"""One file of weights, whatever its ending: safetensors, written too, or what `torch.save` or Flax wrote."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TypedDict, TypeVar

import jax
import ml_dtypes
import numpy as np
from jax.typing import ArrayLike

from t2i_jax.core.sniff import is_msgpack, sniff_file
from t2i_jax.core.specs import Shaped
from t2i_jax.interop.msgpackfile import read_msgpack
from t2i_jax.interop.torchfile import read_torch

DTYPES: dict[str, type[np.generic]] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""Number formats of safetensors files."""

R = TypeVar("R")
Reader = Callable[[], np.ndarray]
Readers = Mapping[str, Reader]


class TensorEntry(TypedDict):
    """The entry of a tensor in the header of a safetensors file."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


class Lazy(Mapping[str, np.ndarray]):
    """Tensors by name, each read when it is asked for."""

    def __init__(self, readers: Readers):
        self.readers = readers

    def __getitem__(self, name: str) -> np.ndarray:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


class SafeTensors(Lazy):
    """The tensors of a safetensors file, bfloat16 and float8 as in `ml_dtypes`.

    Errors: ValueError naming the file where it is damaged or cut short.
    """

    def __init__(self, path: str | os.PathLike):
        path = Path(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError(f"{path}: cut short: its header has {length} bytes, the whole file {size}")
            header = file.read(length)
        try:
            entries: object = json.loads(header, object_pairs_hook=_unique)
            if not isinstance(entries, dict):
                raise ValueError(f"it is a {type(entries).__name__}")
            spans = {name: _span(entry) for name, entry in entries.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged: its header is not one of safetensors ({error})") from error
        whole = 8 + length + max((end for *_, end in spans.values()), default=0)
        if size < whole:
            raise ValueError(f"{path}: cut short: {size} of {whole} bytes; fetch it again")
        self.path, self.offsets = path, {name: 8 + length + start for name, (_, _, start, _) in spans.items()}
        said = entries.get("__metadata__")
        self.metadata: dict[str, str] = said if isinstance(said, dict) else {}
        """entries of the program that wrote the file"""
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {}
        readers: dict[str, Reader] = {}
        for name, (kind, shape, start, end) in spans.items():
            if kind not in DTYPES:
                raise ValueError(f"{path}: {name} holds numbers of kind {kind}; known are {', '.join(DTYPES)}")
            dtype = np.dtype(DTYPES[kind])
            if end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{path}: damaged: {name} has {end - start} bytes for {kind} of shape {shape}")
            self.shapes[name] = jax.ShapeDtypeStruct(shape, dtype)
            readers[name] = partial(_read, path, dtype, shape, 8 + length + start, end - start)
        super().__init__(readers)

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """`self[name][index]`, of which nothing else is read."""
        shape, dtype = self.shapes[name].shape, self.shapes[name].dtype
        if math.prod(shape) == 0:
            return self[name][index]
        return np.array(np.memmap(self.path, dtype, "r", self.offsets[name], shape)[index])


SCALE = "#scale"
"""End of the name of the scales of a tensor that is stored in 8 bits."""


class Restored(Lazy):
    """The tensors of a file, of which those stored in 8 bits with scales are fp32 again: a number times its scale."""

    def __init__(self, stored: SafeTensors):
        self.stored, self.metadata = stored, stored.metadata
        scaled = {k.removesuffix(SCALE) for k in stored.shapes if k.endswith(SCALE)}
        kind = lambda name, x: jax.ShapeDtypeStruct(x.shape, np.float32 if name in scaled else x.dtype)
        self.scaled = scaled & stored.shapes.keys()
        self.shapes = {
            k: kind(k, x) for k, x in stored.shapes.items() if k.removesuffix(SCALE) not in scaled or k in scaled
        }
        super().__init__({k: partial(self._whole, k) for k in self.shapes})

    def _whole(self, name: str) -> np.ndarray:
        return self.part(name, ()) if name in self.scaled else self.stored[name]

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """`self[name][index]`."""
        if name not in self.scaled:
            return self.stored.part(name, index)
        scale = np.broadcast_to(self.stored[name + SCALE], self.shapes[name].shape)
        return self.stored[name][index].astype(np.float32) * scale[index]


def in_8_bits(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix, or a stack of them, as int8 and fp32 scales: x is about their product, up to half a scale.

    The scale is that of an output; in a table, with far more rows than columns, that of a row.
    """
    axis = _scaled_along(x.shape)
    scale = np.maximum(np.abs(x).max(axis, keepdims=True), np.finfo(np.float32).tiny * 127) / 127
    return np.round(x / scale).astype(np.int8), scale.astype(np.float32)


def _scaled_along(shape: tuple[int, ...]) -> int:
    return -1 if shape[-2] > 4 * shape[-1] else -2


Use = Callable[[str, ArrayLike], object]
"""Called with the name of an array and the array."""


def stored_shapes(
    arrays: Mapping[str, Shaped], half: bool = False, int8: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of arrays in a file. half: fp32 as bf16. int8: matrices of fp32 as int8, with their scales."""
    dtype = lambda x: ml_dtypes.bfloat16 if half and x.dtype == np.float32 else x.dtype
    found = {k: jax.ShapeDtypeStruct(x.shape, dtype(x)) for k, x in arrays.items()}
    for name, x in arrays.items() if int8 else ():
        if x.dtype == np.float32 and len(x.shape) > 1 and min(x.shape[-2:]) > 1:
            axis, shape = _scaled_along(x.shape), list(x.shape)
            shape[axis] = 1
            found[name] = jax.ShapeDtypeStruct(x.shape, np.int8)
            found[name + SCALE] = jax.ShapeDtypeStruct(tuple(shape), np.float32)
    return found


def write(path: str | os.PathLike, shapes: Mapping[str, Shaped], fill: Callable[[Use], R], about: str) -> R:
    """A safetensors file of arrays of these shapes and dtypes, whose bytes come one array after the other: `fill(put)`
    calls `put(name, array)` for each, in any order, and again for one that is to be written anew. Returns what `fill`
    does. about: the program that writes the file. Errors: ValueError for a dtype that the format lacks.
    """
    kinds = {np.dtype(dtype): kind for kind, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": about}}
    offsets, at = {}, 0
    # The larger numbers first, so that each array begins at a multiple of their size.
    for name, x in sorted(shapes.items(), key=lambda item: (-np.dtype(item[1].dtype).itemsize, item[0])):
        if np.dtype(x.dtype) not in kinds:
            raise ValueError(f"{path}: {name}: safetensors files hold no numbers of kind {x.dtype}")
        size = math.prod(x.shape) * np.dtype(x.dtype).itemsize
        header[name] = {"dtype": kinds[np.dtype(x.dtype)], "shape": list(x.shape), "data_offsets": [at, at + size]}
        offsets[name], at = at, at + size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)

        def put(name: str, x: ArrayLike) -> None:
            if name + SCALE in shapes:
                x, scale = in_8_bits(np.asarray(x, np.float32))
                put(name + SCALE, scale)
            file.seek(8 + len(text) + offsets[name])
            file.write(np.ascontiguousarray(np.asarray(x, shapes[name].dtype)).reshape(-1).view(np.uint8).data)

        return fill(put)


def content(path: str | os.PathLike) -> object:
    """What a file of weights holds: `SafeTensors`, the object that `torch.save` wrote, other classes inert, or what
    `flax.serialization` wrote.

    The first bytes say which of them it is, not the ending.
    Errors: OSError; ValueError that says what the file is where it holds no weights.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, not a file of weights")
    with path.open("rb") as file:
        head = file.read(9)
    if head[4:] == b"\0\0\0\0{":  # a length, which may begin as the others do, and its JSON
        return SafeTensors(path)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return read_torch(path)
    if is_msgpack(head):
        return read_msgpack(path)
    what = sniff_file(path) or "of no known kind"
    raise ValueError(f"{path}: is {what}, not a safetensors or PyTorch file, nor one of Flax")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it has a name twice")
    return found


def _span(entry: TensorEntry) -> tuple[str, tuple[int, ...], int, int]:
    """Number format, shape, and where the bytes begin and end."""
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)) or start > end:
        raise ValueError(f"shape {shape}, offsets {start} to {end}")
    return str(entry["dtype"]), shape, start, end


def _read(path: Path, dtype: np.dtype, shape: tuple[int, ...], start: int, count: int) -> np.ndarray:
    return np.fromfile(path, np.uint8, count, offset=start).view(dtype).reshape(shape)
