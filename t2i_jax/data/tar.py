"""Random access into webdataset tar files: where each sample's members lie, found once and kept in a file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from t2i_jax.data.records import DataError, Record

log = logging.getLogger(__name__)
IMAGES = ("jpg", "jpeg", "png", "webp")
MEMBERS = ("image", "txt", "json", "cls")
"""A row of the index is the number of the shard, then offset and size of each of these (size -1: there is none)."""


class TarReader:
    """Samples of tar files; reading one sample touches nothing but its own bytes."""

    def __init__(self, shards: Sequence[Path], caption: str, fields: Sequence[str], skip_truncated: bool):
        self.shards, self.caption, self.fields = list(shards), caption, tuple(fields)
        self.index_file, self.index = open_index(self.shards, skip_truncated)
        self.files: dict[int, int] = {}
        if not len(self):
            raise DataError(f"{self.shards[0]}: no sample with a picture ({', '.join(IMAGES)}) in the tar files")

    def __getstate__(self):
        kept = {**self.__dict__, "files": {}}
        return {**kept, "index": None} if self.index_file else kept  # the other process maps the same file

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self.index_file:
            self.index = np.load(self.index_file, mmap_mode="r")

    def __del__(self):
        for descriptor in getattr(self, "files", {}).values():
            os.close(descriptor)

    def __len__(self) -> int:
        return len(self.index)

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        if shard not in self.files:
            descriptor = os.open(self.shards[shard], os.O_RDONLY)
            if self.files.setdefault(shard, descriptor) != descriptor:  # another thread was faster
                os.close(descriptor)
        return os.pread(self.files[shard], size, offset)  # has no file position, so threads do not meet

    def __getitem__(self, i: int) -> Record:
        shard, *where = (int(x) for x in self.index[i])
        members = {
            name: self._read(shard, where[2 * m], where[2 * m + 1])
            for m, name in enumerate(MEMBERS)
            if where[2 * m + 1] >= 0
        }
        name = self._read(shard, where[0] - tarfile.BLOCKSIZE, 100).rstrip(b"\0").decode("utf-8", "replace")
        extra = json.loads(members["json"]) if "json" in members else {}
        if self.caption == "txt":
            captions = [members["txt"].decode("utf-8", "replace").strip()] if "txt" in members else []
        else:
            found = extra.get(self.caption)
            captions = [] if found is None else found if isinstance(found, list) else [found]
        record: Record = {
            "image": members["image"],
            "captions": captions,
            "key": f"{self.shards[shard].name}:{name.rpartition('.')[0]}",
            **{field: extra[field] for field in self.fields if field in extra},
        }
        if "cls" in members:
            record["label"] = int(members["cls"])
        return record


def open_index(shards: Sequence[Path], skip_truncated: bool) -> tuple[Path | None, np.ndarray]:
    """The index int64 (samples, 9) of the shards, and the file it lies in (`None`: only in memory)."""
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in shards]
    digest = hashlib.sha256(json.dumps([stats, skip_truncated]).encode()).hexdigest()[:16]
    file = shards[0].parent / f".members-{digest}.npy"
    if file.exists():
        return file, np.load(file, mmap_mode="r")
    parts = []
    for number, path in enumerate(shards):
        parts.append(scan(path, number, skip_truncated))
        if number % 100 == 99:
            log.info("scanned %d of %d tar files", number + 1, len(shards))
    index = np.concatenate(parts)
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".npy", delete=False) as temporary:
            np.save(temporary, index)
        os.replace(temporary.name, file)
    except OSError as error:
        log.warning("%s: the tar index stays in memory (%s)", file.parent, error)
        return None, index
    return file, np.load(file, mmap_mode="r")


def scan(path: Path, number: int, skip_truncated: bool) -> np.ndarray:
    """The index rows of one tar file, its pictures in the order in which they lie.

    Errors: `DataError` for a file that is no tar, or that is cut short unless `skip_truncated`.
    """
    samples: dict[str, list[int]] = {}
    cut = None
    try:
        with tarfile.open(path, "r:") as tar:
            size = path.stat().st_size
            for member in tar:
                if member.isfile():
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError("the last member is cut short")
                    folder, _, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")  # webdataset's rule: a key ends at the first dot
                    kind = "image" if extension.lower() in IMAGES else extension
                    if kind in MEMBERS:
                        row = samples.setdefault(f"{folder}/{stem}", [number] + [0, -1] * len(MEMBERS))
                        at = 1 + 2 * MEMBERS.index(kind)
                        row[at : at + 2] = member.offset_data, member.size
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue] it would keep every header
            if tar.offset + tarfile.BLOCKSIZE > size:
                raise tarfile.ReadError("the end mark is missing")
    except tarfile.ReadError as error:
        cut = error
    if cut and not skip_truncated:
        raise DataError(
            f"{path}: the tar file is cut short or damaged after {len(samples)} samples ({cut}); "
            "fetch it again, or set TarShards.truncated to 'skip'"
        ) from cut
    if cut:
        # The last sample may lack members that came behind the cut.
        samples = dict(list(samples.items())[:-1])
        log.warning("%s: cut short (%s); going on with its first %d samples", path, cut, len(samples))
    rows = [row for row in samples.values() if row[2] >= 0]
    if len(rows) < len(samples):
        log.warning("%s: %d samples have no picture and are left out", path, len(samples) - len(rows))
    return np.array(rows, np.int64).reshape(-1, 1 + 2 * len(MEMBERS))
