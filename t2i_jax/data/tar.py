"""Random access into webdataset tar files: where each sample's members lie, found once and kept in a file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from t2i_jax.core.sniff import PACKED, sniff_file
from t2i_jax.core.text import decode_text, mend
from t2i_jax.data.files import Descriptor, Files, kinds
from t2i_jax.data.images import image_endings
from t2i_jax.data.records import Captions, DataError, Record, as_captions, umask

log = logging.getLogger(__name__)
MEMBERS = ("image", "txt", "json", "cls")
"""A row of the index is the number of the shard, the offset of the image's header, then offset and size of each of
these (size -1: there is none)."""
COLUMNS = 2 + 2 * len(MEMBERS)
VERSION = 2
LOOKED_AT = 100_000
"""Samples that are looked at to say how many have no captions."""


class TarReader:
    """Samples of tar files; reading one sample touches nothing but its own bytes."""

    def __init__(self, shards: Sequence[Path], caption: str, fields: Sequence[str], skip_truncated: bool):
        self.shards, self.caption, self.fields = list(shards), caption, tuple(fields)
        self.index_file, self.index = open_index(self.shards, skip_truncated)
        self.files = Files(Descriptor)

    def __getstate__(self):
        return {**self.__dict__, "index": None} if self.index_file else self.__dict__  # it maps the same file

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self.index_file:
            self.index = np.load(self.index_file, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.index)

    def key(self, i: int) -> str:
        """The tar file and the name of the image in it, without its ending."""
        shard, head, at = (int(x) for x in self.index[i, :3])
        try:
            name = _name(self.files[self.shards[shard]].read(head, at - head))
        except (tarfile.TarError, DataError, OSError):  # the file has changed: reading the record will say so
            name = f"byte {head}"
        folder, _, name = name.rpartition("/")
        return mend(f"{self.shards[shard]}:{os.path.join(folder, name.rpartition('.')[0] or name)}")

    def notes(self, captions: bool) -> list[str]:
        member = MEMBERS.index("txt" if self.caption == "txt" else "json")
        some = self.index[:LOOKED_AT, 3 + 2 * member]
        if not captions or not (missing := int((some < 0).sum())):
            return []
        wanted = "a .txt member" if self.caption == "txt" else f"'{self.caption}' of a .json member"
        other = "" if self.caption != "txt" else "; TarShards.caption names a field of the .json members instead"
        first = "first " if len(self) > len(some) else ""
        return [f"{self.shards[0].parent}: {missing} of the {first}{len(some)} samples have no {wanted}{other}"]

    def __getitem__(self, i: int) -> Record:
        shard, _, *where = (int(x) for x in self.index[i])
        file = self.files[self.shards[shard]]
        read = lambda m: file.read(where[2 * m], where[2 * m + 1]) if where[2 * m + 1] >= 0 else None
        image, text, extra, label = map(read, range(len(MEMBERS)))
        key = self.key(i)
        record: Record = {"image": image, "key": key.removeprefix(mend(f"{self.shards[shard].parent}/"))}
        if self.caption == "txt":
            record["captions"] = as_captions(text, self._instead(extra) if text is None else "")
        else:
            record["captions"] = self._field(extra)
        if self.fields:
            found = _object(extra)
            record |= {name: found[name] for name in self.fields if name in found}
        if label is not None:
            record["label"] = _label(label)
        return record

    def _instead(self, extra: bytes | None) -> str:
        with contextlib.suppress(DataError):
            if has := ", ".join(_object(extra)):
                return f"there is no .txt member; TarShards.caption can name a field of the .json member, of {has}"
        return "there is no .txt member"

    def _field(self, extra: bytes | None) -> Captions:
        """The captions in the .json member, whose faults matter where captions are needed."""
        if extra is None:
            return as_captions(None, "there is no .json member")
        try:
            found = _object(extra)
        except DataError as error:
            captions = Captions()
            captions.fault = str(error)
            return captions
        has = ", ".join(found) or "nothing"
        return as_captions(found.get(self.caption), f"the .json member has no '{self.caption}'; it has {has}")


def _name(header: bytes) -> str:
    """The name of the member with this header, or these headers where the name is a long one."""
    if len(header) == tarfile.BLOCKSIZE:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
    with tarfile.open(fileobj=io.BytesIO(header), mode="r:") as tar:
        return tar.next().name


def _object(extra: bytes | None) -> dict[str, Any]:
    """The .json member of a sample. Errors: `DataError` where it is no JSON object."""
    if extra is None:
        return {}
    try:
        found = json.loads(decode_text(extra))
    except (ValueError, RecursionError) as error:
        raise DataError(f"the .json member is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"the .json member is no JSON object, but a {type(found).__name__}")
    return found


def _label(label: bytes) -> int | str:
    """The number of a .cls member, or what else it holds, which a model of classes refuses."""
    text = label.decode("utf-8", "replace").strip()
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text


def open_index(shards: Sequence[Path], skip_truncated: bool) -> tuple[Path | None, np.ndarray]:
    """The index int64 (samples, COLUMNS) of the shards, and the file it lies in (`None`: only in memory).

    Errors: `DataError` where there is no sample.
    """
    endings = sorted(image_endings())
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in shards]
    digest = hashlib.sha256(json.dumps([VERSION, endings, stats, skip_truncated]).encode()).hexdigest()[:16]
    file = shards[0].parent / f".members-{digest}.npy"
    if (kept := _kept(file, len(shards))) is not None:
        return file, kept
    scans = []
    for number, path in enumerate(shards):
        scans.append(scan(path, number, skip_truncated))
        if number % 100 == 99:
            log.info("scanned %d of %d tar files", number + 1, len(shards))
    index = np.concatenate([rows for rows, _ in scans])
    if not len(index):
        names = [name for _, ignored in scans for name in ignored]
        has = f"they hold {kinds(names)}" if names else "they are empty"
        raise DataError(f"{shards[0]}: no sample with an image (KEY.jpg, .png, .webp, ...) in the tar files; {has}")
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".npy", delete=False) as temporary:
            np.save(temporary, index)
        os.chmod(temporary.name, 0o666 & ~umask())  # for all who read the shards
        os.replace(temporary.name, file)
    except OSError as error:
        log.warning("%s: the tar index stays in memory (%s)", file.parent, error)
        return None, index
    return file, np.load(file, mmap_mode="r")


def _kept(file: Path, shards: int) -> np.ndarray | None:
    """The index in a file, unless there is none or it is damaged."""
    if not file.exists():
        return None
    try:
        index = np.load(file, mmap_mode="r")
        if index.dtype == np.int64 and index.ndim == 2 and index.shape[1] == COLUMNS and len(index):
            ends = index[[0, -1]]
            if (ends[:, 0] >= 0).all() and (ends[:, 0] < shards).all() and (ends[:, 3] >= 0).all():
                return index
        fault = "it is of another kind"
    except (OSError, ValueError, EOFError) as error:
        fault = str(error)
    log.warning("%s: the tar index cannot be used and is made again (%s)", file, fault)
    return None


@dataclass
class _Sample:
    shard: int
    names: dict[str, str] = field(default_factory=dict)
    row: list[int] = field(default_factory=lambda: [0, *[0, -1] * len(MEMBERS)])

    def add(self, kind: str, member: tarfile.TarInfo) -> None:
        self.names[kind] = member.name
        at = 1 + 2 * MEMBERS.index(kind)
        self.row[at : at + 2] = member.offset_data, member.size
        if kind == "image":
            self.row[0] = member.offset


class _Samples:
    """Members of one tar grouped to samples by webdataset's rule: a key ends at the first dot of the name.

    Where that leaves an unknown ending, as of `v1.5_0.jpg`, the key ends at the last dot, unless its key by the rule
    has an image of its own (`0.seg.png` belongs to `0.jpg`). A name that comes again begins another sample of the key,
    which has what follows it.
    """

    def __init__(self, shard: int):
        self.shard, self.endings = shard, image_endings()
        self.by_key: dict[str, list[_Sample]] = {}
        self.dotted: list[tuple[str, str, str, tarfile.TarInfo]] = []
        self.last = ""
        self.ignored: list[str] = []
        self.again: list[str] = []
        self.second: list[str] = []

    def __len__(self) -> int:
        return len(self.by_key)

    def see(self, member: tarfile.TarInfo) -> None:
        folder, _, name = member.name.rpartition("/")
        if name.startswith("."):
            return
        stem, _, end = name.partition(".")
        if kind := self._kind(end):
            self._add(f"{folder}/{stem}", kind, member)
            return
        longer, _, end = name.rpartition(".")
        if longer and (kind := self._kind(end)):
            self.dotted.append((f"{folder}/{stem}", f"{folder}/{longer}", kind, member))
        else:
            self.ignored.append(name)

    def _kind(self, end: str) -> str:
        end = end.lower()
        return "image" if f".{end}" in self.endings else end if end in MEMBERS[1:] else ""

    def _add(self, key: str, kind: str, member: tarfile.TarInfo) -> None:
        samples = self.by_key.setdefault(key, [])
        together, self.last = key == self.last, key
        for sample in reversed(samples) if together else samples:
            if kind not in sample.names:
                sample.add(kind, member)
                return
        if samples and samples[-1].names.get(kind) != member.name:
            self.second.append(member.name)  # 0.png after 0.jpg
            return
        if samples:
            self.again.append(member.name)
        samples.append(_Sample(self.shard))
        samples[-1].add(kind, member)

    def rows(self, path: Path, cut: bool) -> np.ndarray:
        """Index rows of the samples with an image, in the order of their first members."""
        have = {key for key, samples in self.by_key.items() if any("image" in s.names for s in samples)}
        for key, longer, kind, member in self.dotted:
            if key in have:
                self.ignored.append(member.name)
            else:
                self._add(longer, kind, member)
        samples = [sample for several in self.by_key.values() for sample in several]
        samples.sort(key=lambda s: min(s.row[1 + 2 * m] for m, name in enumerate(MEMBERS) if name in s.names))
        if cut:
            samples = samples[:-1]  # it may lack members that came after the cut
        whole = [s for s in samples if "image" in s.names]
        for names, what in (
            (self.again, "names that come twice begin another sample"),
            (self.second, "second images, or texts, of a sample are not read"),
            (
                [n for s in samples if "image" not in s.names for n in s.names.values()],
                "samples have no image, and are left out",
            ),
        ):
            if names:
                log.warning("%s: %s: %s", path, what, mend(kinds(names)))
        return np.array([[s.shard, *s.row] for s in whole], np.int64).reshape(-1, COLUMNS)


def scan(path: Path, number: int, skip_truncated: bool) -> tuple[np.ndarray, list[str]]:
    """The index rows of one tar file, its images in the order in which they lie; and names of members not read, where
    there are no rows.

    Errors: `DataError` for a file that is no tar, or that is cut short unless `skip_truncated`.
    """
    samples, cut = _Samples(number), None
    size = path.stat().st_size
    try:
        for member in _members(path, size):
            samples.see(member)
    except tarfile.ReadError as error:
        cut = error
        if not len(samples) and (kind := sniff_file(path)) not in ("", "a tar file"):
            unpack = "; unpack it, as records are read in any order" if kind in PACKED else ""
            if not skip_truncated:
                raise DataError(f"{path}: no tar file: it is {kind}{unpack}") from error
            log.warning("%s: no tar file: it is %s; it is left out", path, kind)
            return samples.rows(path, False), []
    if cut and not skip_truncated:
        raise DataError(
            f"{path}: the tar file is cut short or damaged after {len(samples)} samples ({cut}); "
            "fetch it again, or set TarShards.truncated to 'skip'"
        ) from cut
    rows = samples.rows(path, bool(cut))
    if cut:
        log.warning("%s: cut short (%s); going on with its first %d samples", path, cut, len(rows))
    seen = [name for several in samples.by_key.values() for sample in several for name in sample.names.values()]
    return rows, [] if len(rows) else samples.ignored + seen


def _members(path: Path, size: int) -> Iterator[tarfile.TarInfo]:
    """The files in a tar. Errors: `tarfile.ReadError` where it is cut short or damaged."""
    links = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.islnk() or member.issym():
                links.append(member.name)
            if member.isfile():
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("the last member is cut short")
                yield member
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue] it would keep every header
        end = tar.offset
    if links:
        log.warning("%s: members that are links are not read: %s", path, mend(kinds(links)))
    if end + tarfile.BLOCKSIZE > size:
        raise tarfile.ReadError("the end mark is missing")
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # which tarfile takes for the end
            raise tarfile.ReadError(f"the header at byte {end} is damaged")
        if file.read(1 << 16).strip(b"\0"):
            log.warning("%s: what comes after the end mark at byte %d is not read; unpack joined tar files", path, end)
