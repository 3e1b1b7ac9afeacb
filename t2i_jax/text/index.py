"""The stored form of a neighbour index: embeddings of records by one encoder, and where they are from.

A folder with `neighbours.json` and `embeddings-00000-of-00002.safetensors`, ...: fp32 `embedding` (n, k) and int64
`record` (n,), the numbers of the records in their split. Where there are `pairs-00000-of-00002.safetensors`, ..., they
have the uint8 `image` (n, i, j, 3) of the same records, and a caption of each in their metadata. Databases of other
programs, arrays in `.npy` and `.npz` files, are read, too; they do not say by what they were made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from t2i_jax.core.config import read_json
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.params import named

FACTS = "neighbours.json"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Index:
    """Embeddings, and what they are of."""

    rows: np.ndarray
    """fp32 (n, k)"""
    records: np.ndarray
    """int64 (n,): the number of each one's record in its split"""
    facts: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """the content of `neighbours.json`; empty for an array of another program"""

    def check(self, path: object, width: int, count: int, encoder: nnx.Module | None = None) -> None:
        """Errors: `ConfigError` for embeddings of another width than `width`, for fewer than `count`, and where the
        index says that they are by another encoder."""
        if self.rows.shape[1] != width or len(self.rows) < count:
            raise ConfigError(
                f"{path}: embeddings {self.rows.shape}; the encoder has {width} numbers, and {count} rows are read"
            )
        made_by = self.facts.get("digest")
        if encoder is not None and made_by and made_by != (own := weights_digest(encoder)):
            raise ConfigError(
                f"{path}: its embeddings are by another encoder ({self.facts.get('encoder')}, weights {made_by}) than "
                f"the model's (weights {own}); make it anew with `t2i data neighbours`"
            )


@dataclasses.dataclass(frozen=True)
class CaptionedImages:
    """Images of the records of an index with a caption of each, in the order of its rows."""

    images: np.ndarray
    """uint8 (n, i, j, 3)"""
    captions: list[str]


def read_pairs(path: str | Path, index: Index) -> CaptionedImages:
    """The images and captions of an index. Errors: `ConfigError` where it has none, or those of other rows."""
    files, made = parts_of(path, "pairs"), "make them with `t2i data neighbours CONFIG --out FOLDER --pairs`"
    if not files:
        raise ConfigError(f"{path}: has embeddings alone, and no images with captions; {made}")
    images, captions, records = [], [], []
    for file in files:
        try:
            with safe_open(file, "np") as part:
                images.append(part.get_tensor("image"))
                records.append(part.get_tensor("record"))
                captions += json.loads((part.metadata() or {})["captions"])
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise ConfigError(f"{file}: no images with captions of an index ({error})") from error
    if not np.array_equal(np.concatenate(records), index.records) or len(captions) != len(index.records):
        raise ConfigError(f"{path}: its images are not those of its {len(index.records)} embeddings; {made}")
    return CaptionedImages(np.concatenate(images), captions)


def weights_digest(model: nnx.Module) -> str:
    """Sixteen hexadecimal digits that identify the weights of an encoder, rounded to bf16: those of a run and of the
    model released of it are the same."""
    found = hashlib.sha256()
    for name, value in sorted(named(model).items()):
        array = np.asarray(jax.device_get(value))
        array = array.astype(ml_dtypes.bfloat16) if array.dtype.kind in "fV" else array
        found.update(f"{name} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def is_index(path: str | Path) -> bool:
    """Whether a folder is one that `t2i data neighbours` made."""
    return (Path(path) / FACTS).is_file()


def read_facts(path: str | Path) -> Mapping[str, object]:
    """What an index is of, without its embeddings."""
    return read_json(Path(path) / FACTS)


def parts_of(path: str | Path, kind: str = "embeddings") -> list[Path]:
    """The files of an index, in their order."""
    return sorted(Path(path).glob(f"{kind}-*-of-*.safetensors"))


def read_index(path: str | Path) -> Index:
    """An index, or embeddings of another program as one. Errors: FileNotFoundError; `ConfigError` for other content."""
    if not is_index(path):
        rows = read_database(path)
        return Index(rows, np.arange(len(rows)))
    facts, files = read_facts(path), parts_of(path)
    if not isinstance(version := facts.get("version"), int) or version > VERSION:
        raise ConfigError(f"{path}: version {version} of an index; this program reads versions up to {VERSION}")
    if len(files) != facts.get("files"):
        raise ConfigError(f"{path}: {len(files)} files of embeddings of {facts.get('files')}; copy the folder anew")
    parts = []
    for file in files:
        try:
            part = load_file(file)
            parts.append((part["embedding"], part["record"]))
        except (SafetensorError, KeyError, OSError) as error:
            raise ConfigError(f"{file}: no embeddings of an index ({error})") from error
    rows, records = (np.concatenate(several) for several in zip(*parts, strict=True))
    if rows.shape != (facts.get("count"), facts.get("width")):
        raise ConfigError(f"{path}: embeddings {rows.shape}, not {facts.get('count')}, {facts.get('width')}")
    return Index(rows.astype(np.float32), records, facts)


def read_database(path: str | Path) -> np.ndarray:
    """Embeddings fp32 (n, k): an index, a `.npy` file, the array `embedding` of a `.npz` file, or those of all in a
    folder.

    Published databases of RDM are such `.npz` files. Errors: FileNotFoundError; `ConfigError` for other content.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such database; `t2i data neighbours` makes one")
    if is_index(path):
        return read_index(path).rows
    files = sorted(path.glob("*.npz")) or sorted(path.glob("*.npy")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path}: no .npz or .npy file of embeddings in it, and no index")
    parts = []
    for file in files:
        try:
            content = np.load(file, allow_pickle=False)
            parts.append(content if isinstance(content, np.ndarray) else content["embedding"])
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ConfigError(f"{file}: no array of embeddings, or `embedding` of a .npz file ({error})") from error
    if any(part.ndim != 2 or part.shape[1] != parts[0].shape[1] or part.dtype.kind != "f" for part in parts):
        shapes = ", ".join(f"{part.dtype} {part.shape}" for part in parts[:4])
        raise ConfigError(f"{path}: {shapes}; embeddings are floats (n, k)")
    return np.concatenate(parts).astype(np.float32)
