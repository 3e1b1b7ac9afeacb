"""Locate the samples of a webdataset tar file. Scanning processes import this module alone: no JAX, no codecs."""

from __future__ import annotations

import os
import pickle
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from t2i_jax.core.sniff import sniff_file

MEMBERS = ("image", "txt", "json", "cls")
BLOCK = tarfile.BLOCKSIZE
"""Block size in bytes; all members begin at a multiple of it."""
COLUMNS = ("image", "image_head", "image_size", *(f"{m}{end}" for m in MEMBERS[1:] for end in ("", "_size")))
"""`image`: the block where the bytes of the image begin; `image_head`: number of header blocks before it; `txt`,
`json`, `cls`: blocks from the image's bytes to the member's; `*_size`: bytes, -1 if there is no such member."""


@dataclass
class TarScan:
    """The result of scanning one tar file; samples in the order of their first members."""

    columns: dict[str, np.ndarray]
    """int64 (samples,) for each of `COLUMNS`"""
    keys: int = 0
    """number of keys, with or without an image"""
    cut: str = ""
    """why the file cannot be read to its end"""
    kind: str = ""
    """what the file is, if it is not a tar"""
    notes: list[tuple[str, list[str]]] = field(default_factory=list)
    """anomalies, and the names of the affected members"""
    ignored: list[str] = field(default_factory=list)
    """names of members that are ignored, if there is no sample"""


class _Member(NamedTuple):
    name: str
    head: int
    """block of its first header"""
    at: int
    """block of its bytes"""
    size: int


@dataclass
class _Sample:
    members: dict[str, _Member]

    def first(self) -> int:
        return min(member.at for member in self.members.values())

    def row(self) -> list[int]:
        """The values of `COLUMNS`."""
        image = self.members["image"]
        row = [image.at, image.at - image.head, image.size]
        for name in MEMBERS[1:]:
            member = self.members.get(name)
            row += [member.at - image.at, member.size] if member else [0, -1]
        return row


class _Samples:
    """Members of one tar grouped into samples by webdataset's rule: the key is the name up to the first dot.

    If that leaves an unknown extension, as in `v1.5_0.jpg`, the key ends at the last dot, unless the key by the rule
    has an image of its own (`0.seg.png` belongs to `0.jpg`). A repeated name starts another sample of the key, which
    gets the members that follow.
    """

    def __init__(self, endings: Collection[str]):
        self.endings = endings
        self.by_key: dict[str, list[_Sample]] = {}
        self.dotted: list[tuple[str, str, str, _Member]] = []
        self.last = ""
        self.ignored: list[str] = []
        self.again: list[str] = []
        self.second: list[str] = []

    def see(self, member: _Member) -> None:
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

    def _add(self, key: str, kind: str, member: _Member) -> None:
        samples = self.by_key.setdefault(key, [])
        together, self.last = key == self.last, key
        for sample in reversed(samples) if together else samples:
            if kind not in sample.members:
                sample.members[kind] = member
                return
        if samples and samples[-1].members[kind].name != member.name:
            self.second.append(member.name)  # 0.png after 0.jpg
            return
        if samples:
            self.again.append(member.name)
        samples.append(_Sample({kind: member}))

    def found(self, cut: str, kind: str) -> TarScan:
        """The samples that have an image."""
        keys = len(self.by_key)
        have = {key for key, samples in self.by_key.items() if any("image" in s.members for s in samples)}
        for key, longer, member_kind, member in self.dotted:
            if key in have:
                self.ignored.append(member.name)
            else:
                self._add(longer, member_kind, member)
        samples = sorted((s for several in self.by_key.values() for s in several), key=_Sample.first)
        if cut:
            samples = samples[:-1]  # it may lack members after the cut
        rows = np.array([s.row() for s in samples if "image" in s.members], np.int64).reshape(-1, len(COLUMNS))
        without = [m.name for s in samples if "image" not in s.members for m in s.members.values()]
        notes = [
            ("names that come twice begin another sample", self.again),
            ("second images, or texts, of a sample are not read", self.second),
            ("samples have no image, and are left out", without),
        ]
        seen = [m.name for s in samples for m in s.members.values()]
        ignored = [] if len(rows) else self.ignored + seen
        columns = dict(zip(COLUMNS, rows.T, strict=True))
        return TarScan(columns, keys, cut, kind, [note for note in notes if note[1]], ignored)


def scan(path: Path, endings: Collection[str], progress: Callable[[int], None] = lambda members: None) -> TarScan:
    """Find the samples of one tar file by its headers.

    endings: extensions of images (".jpg", ...), in lower case. progress: called about once a second with the number of
    members so far. Errors: `OSError`; the result reports a file that is truncated or not a tar.
    """
    samples, cut, kind = _Samples(endings), "", ""
    after: list[tuple[str, list[str]]] = []
    try:
        for member in _members(path, path.stat().st_size, progress, after):
            samples.see(member)
    except tarfile.ReadError as error:
        cut = str(error) or "it is damaged"
        if not samples.by_key and (found := sniff_file(path)) not in ("", "a tar file"):
            kind = found
    result = samples.found(cut, kind)
    result.notes += after
    return result


def _members(path: Path, size: int, progress: Callable[[int], None], notes: list) -> Iterator[_Member]:
    """The files in a tar. Errors: `tarfile.ReadError` if it is truncated or damaged."""
    count, last, links = 0, time.monotonic(), []
    with open(path, "rb") as file:
        end = yield from _plain_members(file, size, progress)
        file.seek(end)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.islnk() or member.issym():
                    links.append(member.name)
                if member.isfile():
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError("the last member is cut short")
                    yield _Member(member.name, member.offset // BLOCK, member.offset_data // BLOCK, member.size)
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue] else it keeps every header
                count += 1
                if (now := time.monotonic()) - last > 1:
                    last = now
                    progress(count)
            end = tar.offset
        if links:
            notes.append(("members that are links are not read", links))
        if end + BLOCK > size:
            raise tarfile.ReadError("the end mark is missing")
        file.seek(end)
        if file.read(BLOCK).strip(b"\0"):  # tarfile takes a damaged header for the end
            raise tarfile.ReadError(f"the header at byte {end} is damaged")
        if file.read(1 << 16).strip(b"\0"):
            notes.append((f"what comes after the end mark at byte {end} is not read; unpack joined tar files", []))


TIMES = frozenset((b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname"))
"""Keywords of extended headers that affect neither the name nor the size."""


def _plain_members(file: BinaryIO, size: int, progress: Callable[[int], None]) -> Generator[_Member, None, int]:
    """The files in a tar up to the first header that is not of the simplest kind; returns its offset in bytes.

    This is several times as fast as `tarfile`, which reads the rest: other kinds of headers, damaged ones and the end.
    """
    at, count, last = 0, 0, time.monotonic()
    while True:
        head = at
        block = os.pread(file.fileno(), 4 * BLOCK, head)
        start = 0
        if block[156:157] == b"x" and (length := _size(block[:BLOCK])) is not None and length <= BLOCK:
            if not _only_times(block[BLOCK : BLOCK + length]):
                return at
            start = 2 * BLOCK
        header = block[start : start + BLOCK]
        if header[156:157] not in (b"0", b"\0") or header[345:346] != b"\0" or (length := _size(header)) is None:
            return at
        name = header[: header.index(b"\0") if b"\0" in header[:100] else 100].decode("utf-8", "surrogateescape")
        data = head + start + BLOCK
        if name.endswith("/") or data + length > size:
            return at
        yield _Member(name, head // BLOCK, data // BLOCK, length)
        at = data + -(-length // BLOCK) * BLOCK
        count += 1
        if (now := time.monotonic()) - last > 1:
            last = now
            progress(count)


def _size(header: bytes) -> int | None:
    """The size of a member in bytes, if its header is valid and has plain numbers; else None."""
    numbers = header[124:136].rstrip(b" \0"), header[148:156].strip(b" \0")
    if len(header) < BLOCK or header[257:262] != b"ustar" or not all(n.isdigit() for n in numbers):
        return None
    try:
        length, total = (int(n, 8) for n in numbers)
    except ValueError:
        return None
    # Adler-32 contains the sum of the bytes, modulo 65521. The checksum field itself counts as spaces.
    seen = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * 32
    return length if (seen - total) % 65521 == 0 else None


def _only_times(data: bytes) -> bool:
    """Whether an extended header (length, space, keyword=value, newline) has only keywords of `TIMES`."""
    while data:
        length, blank, _ = data.partition(b" ")
        if not blank or not length.isdigit() or not 0 < int(length) <= len(data):
            return False
        if data[len(length) + 1 : int(length)].partition(b"=")[0] not in TIMES:
            return False
        data = data[int(length) :]
    return True


def serve() -> None:
    """Scan the tar files that the parent process names on stdin, one at a time, until it closes the pipe.

    Tasks and results are pickles: (path, endings); the number of members so far, any times; a `TarScan` or an
    exception.
    """
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep other output out of the stream of results

    def send(result: TarScan | Exception | int) -> None:
        pickle.dump(result, results)
        results.flush()

    while True:
        try:
            path, endings = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            send(scan(path, endings, send))
        except BrokenPipeError:  # the parent is gone
            return
        except Exception as error:
            send(error)
