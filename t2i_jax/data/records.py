"""The data sets that this library writes: a folder of ArrayRecord files and an `index.json`.

A record is a flat dictionary of JSON values, byte strings and arrays. On disk it is self-describing: four bytes of
header length, a JSON header, then the bytes and arrays in a row, at offsets that the header gives.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from t2i_jax.core.errors import DataError as DataError
from t2i_jax.core.outputs import check_parent, check_utf8, write_text
from t2i_jax.core.text import clean_text, decode_text, mend

Record = dict[str, Any]
INDEX = "index.json"
WEIGHTS = "caption_weights"
"""The field of a record with the weight of each of its captions, where they are not drawn with equal ones."""


class Reader(Protocol):
    """Random access to records, by many threads at once; worker processes get a pickled copy."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Record: ...

    def key(self, i: int) -> str:
        """The name of an unreadable record: its file, and its position there."""
        ...

    def notes(self, captions: bool) -> list[str]:
        """Remarks on the source: which files are not read; or, on captions, how many are missing and where they are
        looked for."""
        return []


class Captions(list[str]):
    """The captions of a record, and why they cannot be used, for where captions are needed."""

    fault: str = ""
    """the fault where one is no text; there are no captions then"""
    missing: str = "the record has no caption"
    """why there are none"""


def as_captions(value: object, missing: str = Captions.missing) -> Captions:
    """One caption, several or none, as a file, JSON or a column has them: the clean strings that are not blank.

    None and NaN are no captions; bytes are read by `decode_text`. Of several with one that is no text there are none.
    """
    if isinstance(value, Captions):
        return value
    found = Captions()
    several = value.tolist() if isinstance(value, np.ndarray) else value
    several = several if isinstance(several, list | tuple) else [several]
    several = [v for v in several if v is not None and not (isinstance(v, float | np.floating) and np.isnan(v))]
    found.missing = "the caption is blank" if several else missing
    try:
        found += [text for text in map(_caption, several) if text]
    except DataError as error:
        found.fault = str(error)
    return found


def words_of(row: Mapping[str, object], name: str) -> object:
    """The captions in a field of a row: a string or several; tags become one, with commas."""
    value = row.get(name)
    if "tag" in name.lower() and isinstance(value, list) and all(isinstance(tag, str) for tag in value):
        return ", ".join(value)
    return value


def join_captions(several: Sequence[Captions], weights: Sequence[float] = ()) -> Record:
    """The captions of all kinds in turn, as `captions` of a record, with the weight of each where there are several.

    weights: how often each kind is drawn, in any unit; () is equally often. The captions of one kind share its weight.
    There is a fault only where no kind has a caption.
    """
    if len(several) == 1:
        return {"captions": several[0]}
    found = Captions(caption for captions in several for caption in captions)
    found.fault = "" if found else next((captions.fault for captions in several if captions.fault), "")
    found.missing = "; ".join(captions.missing for captions in several)
    shares = zip(weights or [1.0] * len(several), several, strict=True)
    return {"captions": found, WEIGHTS: [w / len(captions) for w, captions in shares for _ in captions]}


def check_weights(weights: Sequence[float], kinds: Sequence[str], what: str) -> None:
    """Errors: `DataError` for weights that do not belong to kinds of captions. what: the field that has them."""
    if weights and (len(weights) != len(kinds) or not all(0 < w < float("inf") for w in weights)):
        raise DataError(f"{what} are {tuple(weights)}; one above 0 is needed for each of {tuple(kinds)}")


def clean_captions(stored: Sequence[object]) -> Captions:
    """Stored captions, as many as there are, so that they match rows of features; what is no text is blank."""
    return Captions(clean_text(c) if isinstance(c, str) else "" for c in stored)


def _caption(value: object) -> str:
    if isinstance(value, bytes):
        value = decode_text(value)
    if not isinstance(value, str):
        raise DataError(f"a caption is a string, not {type(value).__name__}: {str(value)[:60]}")
    return clean_text(value)


def title(record: Record) -> str:
    """The title of an image: its first caption, or its key where it has none."""
    return next(iter(record.get("captions") or ()), str(record.get("key", "")))


def encode(record: Record) -> bytes:
    """The bytes of a record. Errors: `TypeError` for a value that is no JSON, bytes or array, naming its field."""
    header, blobs, end = {}, [], 0
    for name, value in record.items():
        if isinstance(value, bytes):
            blob, kind = value, {"bytes": len(value)}
        elif isinstance(value, np.ndarray):
            blob, kind = value.tobytes(), {"dtype": value.dtype.name, "shape": value.shape}
        else:
            header[name] = [_plain(name, value)]
            continue
        header[name] = {**kind, "at": end}
        blobs.append(blob)
        end += len(blob)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    head = (text if text.isprintable() else mend(text)).encode()
    return b"".join([len(head).to_bytes(4, "little"), head, *blobs])


def _plain(name: str, value: object) -> object:
    if isinstance(value, np.generic):
        value = value.item()
    try:
        json.dumps(value)
    except TypeError as error:
        raise TypeError(f"field '{name}' of a record must be JSON, bytes or an array: {error}") from error
    return value


def decode(data: bytes) -> Record:
    """The record that `encode` wrote; arrays are read-only views."""
    start = 4 + int.from_bytes(data[:4], "little")

    def value(entry):
        if isinstance(entry, list):
            return entry[0]
        at = start + entry["at"]
        if "bytes" in entry:
            return data[at : at + entry["bytes"]]
        dtype = np.dtype(entry["dtype"])  # NumPy knows those of ml_dtypes once that is imported
        count = int(np.prod(entry["shape"], dtype=np.int64))
        return np.frombuffer(data, dtype, count, at).reshape(entry["shape"])

    return {name: value(entry) for name, entry in json.loads(data[4:start]).items()}


def may_become(path: Path) -> None:
    """Errors: `DataError` if something is at `path` that is no data set, which will not be overwritten, or if it is the
    working folder or one above it, which cannot be put in place whole."""
    check_utf8(path)
    check_parent(path)
    if Path.cwd().is_relative_to(os.path.realpath(path)):
        raise DataError(f"{path}: is the working folder or holds it; name a folder of its own, as ./name")
    if path.exists() and not (path / INDEX).exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path}: exists and is no data set; it will not be overwritten")


def put_in_place(new: Path, path: Path) -> None:
    """The folder `new` becomes `path`, in place of an older data set there."""
    old = new.with_name(new.name + ".old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)  # of a time before, that was killed below
        os.rename(path, old)
    os.rename(new, path)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error.

    It takes the place of an older data set there. Errors: `DataError` if anything else is there.
    """
    may_become(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    new.chmod(0o777 & ~umask())
    try:
        yield new
        put_in_place(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def umask() -> int:
    """The process's mask of permissions."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_records(path: str | Path, records: Iterable[Record], shards: int = 1, about: Record | None = None) -> Record:
    """Write records as a folder that `ArrayRecord(path, split)` reads; returns its index.

    A record goes to the split named by its field "split" ("train" without one); the records of a split are dealt to
    its `shards` files in turn, and read back in the order in which they were written. `about` is added to
    `index.json`. The folder appears whole or not at all.
    """
    path = Path(path)
    with atomic_folder(path) as folder:
        index = {**(about or {}), **write_shards(folder, records, shards)}
        write_text(folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False) + "\n")
    return index


def write_shards(folder: Path, records: Iterable[Record], shards: int = 1) -> Record:
    """The files of `write_records`, into a folder that exists; returns `{"splits": {name: {"count", "shards"}}}`."""
    writers: dict[str, list] = {}
    counts: Counter[str] = Counter()
    for record in records:
        split = record.get("split", "train")
        if split not in writers:
            writers[split] = [_writer(folder / shard_name(split, i, shards)) for i in range(shards)]
        writers[split][counts[split] % shards].write(encode(record))
        counts[split] += 1
    for writer in (w for ws in writers.values() for w in ws):
        writer.close()
    if not counts:
        raise DataError(f"{folder}: there are no records to write")
    return {"splits": {name: {"count": n, "shards": shards} for name, n in sorted(counts.items())}}


def _writer(path: Path):
    from array_record.python.array_record_module import ArrayRecordWriter  # pyright: ignore[reportMissingImports]

    # One record a group: random access then reads nothing but the record that is asked for.
    return ArrayRecordWriter(str(path), "group_size:1")


def write_file(path: Path, records: Iterable[Record]) -> int:
    """One ArrayRecord file, whole or not at all, perhaps without any record; how many it holds."""
    new, count = path.with_name(f".{path.name}"), 0
    writer = _writer(new)
    try:
        for record in records:
            writer.write(encode(record))
            count += 1
    finally:
        writer.close()
    os.rename(new, path)
    return count


def count_records(path: Path) -> int:
    """How many records an ArrayRecord file holds."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return len(ArrayRecordDataSource([str(path)]))


def shard_name(split: str, shard: int, shards: int) -> str:
    """The name of one of the files of a split."""
    return f"{split}-{shard:05d}-of-{shards:05d}.arrayrecord"
