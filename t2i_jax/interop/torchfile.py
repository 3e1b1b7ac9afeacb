"""Reads the tensors of a PyTorch file (.pth, .pt, .ckpt) as NumPy arrays, without PyTorch and without running its code.

A PyTorch file is a pickle in which every tensor is a call `_rebuild_tensor_v2(storage, offset, size, stride, ...)`,
with the raw storages apart: as members of a zip archive (PyTorch 1.6 and later) or after the pickle (before). Only
that call, its relatives and ordered dictionaries are admitted; no name in a file ever reaches an import.
"""

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
    "UntypedStorage": np.uint8,
}
TENSOR_DTYPES = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
}
"""Of tensors in a storage of bytes."""
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
PICKLE_ERRORS = (pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError, AttributeError, ValueError)


class TorchFileError(ValueError):
    """The file is not one of PyTorch's, is damaged, or holds objects that this reader does not admit."""


def read_torch(path: str | os.PathLike) -> object:
    """The object saved by `torch.save`, in the zip or the older format, its tensors as read-only NumPy arrays.

    It is usually a dict from name to array; parameters become arrays, bfloat16 is `ml_dtypes.bfloat16`. In the place of
    objects that are not tensors (training checkpoints hold callbacks and configs too) is an inert `StandIn`.
    Errors: `TorchFileError` for another format or a damaged file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                return _read_zip(path, zipfile.ZipFile(file))
            file.seek(0)
            if file.read(2) == b"PK":
                raise TorchFileError(f"{path}: cut short: a zip archive, as PyTorch writes, without its end")
            file.seek(0)
            return _read_legacy(path, file)
    except TorchFileError:
        raise
    except (*PICKLE_ERRORS, zipfile.BadZipFile) as error:
        raise TorchFileError(f"{path}: damaged, or not a PyTorch file ({type(error).__name__}: {error})") from error


def read_pickle(path: str | os.PathLike) -> object:
    """The numbers, strings, lists and dictionaries of a plain pickle; no name in it reaches an import.

    Raises:
        TorchFileError: a damaged file, or one that holds objects of classes.
    """
    path = Path(path)

    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        raise TorchFileError(f"{path}: refers to a tensor's storage, which a plain pickle does not have")

    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, path, storage).load()
    except TorchFileError:
        raise
    except PICKLE_ERRORS as error:
        raise TorchFileError(f"{path}: damaged, or no pickle ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


class StandIn:
    """An object whose class was not admitted: it has a name, and its saved state, and no behaviour."""

    name = ""
    state: object = None

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def _nothing(self, *args, **kwargs):
        pass

    __init__ = __setitem__ = append = extend = _nothing

    def __setstate__(self, state):
        self.state = state

    def __repr__(self):
        return f"StandIn({self.name})"


def tensors_below(module: StandIn, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of what was saved, by dotted name: of a dictionary, of a whole module, of an archive of TorchScript.

    Of a module it is what its `state_dict` would hold: its parameters, its lasting buffers, and those of its parts, in
    the state that was saved with them; no program is run.
    """
    content = module.state if isinstance(module, StandIn) else module
    if not isinstance(content, Mapping):
        return
    if isinstance(module, StandIn) and "_parameters" in content and "_modules" in content:
        passing = content.get("_non_persistent_buffers_set") or ()
        lasting = {k: v for k, v in content.get("_buffers", {}).items() if k not in passing}
        content = {**content["_parameters"], **lasting, **content["_modules"]}
    for name, value in content.items():
        if is_tensor(value):
            yield f"{prefix}{name}", value
        else:
            yield from tensors_below(value, f"{prefix}{name}.")


def is_tensor(value: object) -> bool:
    """Whether a value of a file, of which anything may be saved, is a tensor, read or lazy."""
    return hasattr(value, "shape")


def _tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_) -> np.ndarray:
    if len(size) != len(stride) or min((offset, *size, *stride)) < 0:
        raise TorchFileError(f"a tensor has offset {offset}, size {size}, strides {stride}")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    # The file chooses the strides: without this check they could reach beyond the storage.
    if 0 not in size and last >= len(storage):
        raise TorchFileError(f"a tensor of size {size} and strides {stride} reaches beyond its storage")
    strides = tuple(s * storage.itemsize for s in stride)
    plain = storage.view(np.uint8) if storage.itemsize == 1 else storage  # NumPy has no code for float8
    return as_strided(plain[offset:], size, strides, writeable=False).view(storage.dtype)


def _tensor_of_bytes(
    storage: np.ndarray, offset: int, size: tuple, stride: tuple, grad: bool, hooks: object, dtype: _StorageType, *_
) -> np.ndarray:
    return _tensor(storage.view(dtype.dtype), offset, size, stride)


ADMITTED: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_bytes,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": lambda make, kind, arguments, state: make(*arguments),
    "torch.Size": tuple,
    "__builtin__.set": set,
}


class _Unpickler(pickle.Unpickler):
    """Admits the names of `ADMITTED` and the storage types; storages come from `storage(key, dtype, count)`."""

    def __init__(self, file: IO[bytes], path: Path, storage: Callable[[str, np.dtype, int], np.ndarray]):
        super().__init__(file, encoding="utf-8")
        self.path, self.storage = path, storage

    def find_class(self, module: str, name: str) -> object:
        full = f"{module}.{name}"
        if full in ADMITTED:
            return ADMITTED[full]
        if module in ("torch", "torch.storage") and name in DTYPES:
            return _StorageType(np.dtype(DTYPES[name]))
        if module == "torch" and name in TENSOR_DTYPES:
            return _StorageType(np.dtype(TENSOR_DTYPES[name]))
        return type("StandIn", (StandIn,), {"name": full})

    def persistent_load(self, pid: object) -> object:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":  # a class with its source, older format
            return pid[1]
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], _StorageType)):
            raise TorchFileError(f"{self.path}: refers to {pid!r}, which is no storage of a known kind")
        _, kind, key, _, count, *view = pid
        whole = self.storage(str(key), kind.dtype, int(count))
        if view and view[0] is not None:  # legacy: a storage that is a window into another
            _, offset, count = view[0]
            return whole[offset : offset + count]
        return whole


class _PlainUnpickler(_Unpickler):
    """Refuses other classes."""

    def find_class(self, module: str, name: str) -> object:
        found = super().find_class(module, name)
        if isinstance(found, type) and issubclass(found, StandIn):
            raise TorchFileError(
                f"{self.path}: holds an object of {found.name}; only tensors, numbers, strings, lists and dicts are "
                "admitted"
            )
        return found


def _read_zip(path: Path, archive: zipfile.ZipFile) -> object:
    pickles = [n for n in archive.namelist() if n == "data.pkl" or n.endswith("/data.pkl")]
    if len(pickles) != 1:
        inside = ", ".join(archive.namelist()[:3]) or "nothing"
        raise TorchFileError(f"{path}: a zip archive that holds {inside}, not PyTorch's data.pkl; unpack it")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise TorchFileError(f"{path}: written on a big-endian machine")
    known: dict[str, np.ndarray] = {}

    def storage(key, dtype, count):
        if key not in known:
            data = archive.read(f"{root}data/{key}")
            if len(data) < count * dtype.itemsize:
                raise TorchFileError(f"{path}: storage {key} has {len(data)} bytes, not {count * dtype.itemsize}")
            known[key] = np.frombuffer(data, np.uint8)
        return known[key][: count * dtype.itemsize].view(dtype)

    with archive.open(pickles[0]) as file:
        return _Unpickler(file, path, storage).load()


def _read_legacy(path: Path, file: BufferedReader) -> object:
    total = path.stat().st_size
    known: dict[str, np.ndarray] = {}

    def storage(key, dtype, count):  # filled below: the bytes come after the pickle that names them
        if key not in known:
            if not 0 <= count * dtype.itemsize <= total:
                raise TorchFileError(f"{path}: storage {key} of {count} {dtype} is longer than the file")
            known[key] = np.zeros(count, dtype)
        return known[key]

    def load():
        return _Unpickler(file, path, storage).load()

    if load() != LEGACY_MAGIC:
        raise TorchFileError(f"{path}: not a PyTorch file")
    load()  # the version of the format
    if not load().get("little_endian", True):
        raise TorchFileError(f"{path}: written on a big-endian machine")
    result, keys = load(), load()
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        if key not in known or count != len(known[key]):
            raise TorchFileError(f"{path}: cut short, or storage {key} of {count} elements does not fit its pickle")
        if file.readinto(known[key].view(np.uint8).data) != known[key].nbytes:
            raise TorchFileError(f"{path}: cut short in storage {key}")
    return result
