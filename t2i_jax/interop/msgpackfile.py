"""Reads the arrays of a msgpack file that `flax.serialization` wrote, without running any code of the file's.

msgpack has numbers, strings, lists and dictionaries; an array is an extension with (shape, name of the dtype, bytes),
and a very large one a dictionary of chunks.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import msgpack
import numpy as np

DTYPES = {np.dtype(kind).name: np.dtype(kind) for kind in (ml_dtypes.bfloat16, *"?bhilqBHILQefdFD")}
"""Number formats by name."""
ARRAY, COMPLEX, SCALAR = 1, 2, 3
"""Extensions of flax.serialization."""
CHUNKED = "__msgpack_chunked_array__"
LONGEST = {"max_array_len": 4096, "max_map_len": 4096}
"""Bounds on items: memory is taken for as many as a file says, before they are read."""


def read_msgpack(path: str | os.PathLike) -> dict[str, object]:
    """What the file holds, by the names of its nested dictionaries joined by "/": arrays, and other values as they are.

    Arrays are read-only NumPy arrays, bfloat16 as in `ml_dtypes`. Errors: ValueError naming the file where it is cut
    short, damaged, or holds no dictionary.
    """
    path, flat = Path(path), {}
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            content = msgpack.unpackb(whole, ext_hook=_extension, object_pairs_hook=_dictionary, **LONGEST)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dictionary of arrays")
        _flatten(content, (), flat)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(f"{path}: cut short, damaged, or no checkpoint of Flax ({error})") from error
    return flat


def _flatten(content: Mapping[str, object], keys: tuple[str, ...], into: dict[str, object]) -> None:
    for key, value in content.items():
        name = "/".join((*keys, key))
        if isinstance(value, dict):
            _flatten(value, (*keys, key), into)
        elif name in into:
            raise ValueError(f"{name!r} is there twice")
        else:
            into[name] = value


def _dictionary(pairs: list[tuple[str, object]]) -> dict[str, object] | np.ndarray:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a dictionary has a name twice")
    if odd := [name for name in found if not isinstance(name, str)]:
        raise ValueError(f"a name is {odd[0]!r}")
    return _joined(found) if CHUNKED in found else found


def _joined(found: Mapping[str, object]) -> np.ndarray:
    """An array that is cut into chunks."""
    shape, chunks = ([*part.values()] if isinstance(part := found.get(k), dict) else [] for k in ("shape", "chunks"))
    arrays = [chunk for chunk in chunks if isinstance(chunk, np.ndarray) and chunk.ndim == 1]
    if not arrays or len(arrays) < len(chunks):
        raise ValueError("an array in chunks without all of them")
    return _shaped(np.concatenate(arrays), shape)


def _shaped(flat: np.ndarray, shape: list[object]) -> np.ndarray:
    sizes = [n for n in shape if isinstance(n, int) and n >= 0]
    if len(sizes) < len(shape) or math.prod(sizes) != flat.size:
        raise ValueError(f"an array of shape {shape} with {flat.size} numbers")
    return flat.reshape(sizes)


def _extension(code: int, data: bytes) -> object:
    if code == COMPLEX:
        return complex(*msgpack.unpackb(data, max_array_len=2))
    if code not in (ARRAY, SCALAR):
        raise ValueError(f"an extension of kind {code}, which is not of Flax")
    shape, kind, buffer = msgpack.unpackb(data, raw=True, **LONGEST)
    name = kind.decode() if isinstance(kind, bytes) else str(kind)
    if name not in DTYPES or not isinstance(shape, list) or not isinstance(buffer, bytes):
        raise ValueError(f"an array of kind {name!r}")
    array = _shaped(np.frombuffer(buffer, DTYPES[name]), shape)
    return array if code == ARRAY else array[()]
