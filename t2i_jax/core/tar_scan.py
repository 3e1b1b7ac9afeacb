"""Where the samples of a webdataset tar file lie. Processes that scan import this module alone: no JAX, no codecs."""

from __future__ import annotations

import os
import pickle
import sys
import tarfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from t2i_jax.core.sniff import sniff_file

MEMBERS = ("image", "txt", "json", "cls")
BLOCK = tarfile.BLOCKSIZE
"""Bytes; all members begin at a multiple of it."""
COLUMNS = ("image", "image_head", "image_size", *(f"{m}{end}" for m in MEMBERS[1:] for end in ("", "_size")))
"""`image`: the block at which the bytes of the image begin; `image_head`: blocks of header before it; `txt`, `json`,
`cls`: blocks from the image's bytes to the member's; `*_size`: bytes, -1 where there is no such member."""


@dataclass
class Scan:
    """What a scan of one tar file found; its samples in the order of their first members."""

    columns: dict[str, np.ndarray]
    """int64 (samples,) for each of `COLUMNS`"""
    keys: int = 0
    """keys that were seen, with or without an image"""
    cut: str = ""
    """why the file cannot be read to its end"""
    kind: str = ""
    """what the file is, where it is no tar"""
    notes: list[tuple[str, list[str]]] = field(default_factory=list)
    """what is unusual, and the names of those members"""
    ignored: list[str] = field(default_factory=list)
    """names of members that are not read, where there is no sample"""


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
    """Members of one tar grouped to samples by webdataset's rule: a key ends at the first dot of the name.

    Where that leaves an unknown ending, as of `v1.5_0.jpg`, the key ends at the last dot, unless its key by the rule
    has an image of its own (`0.seg.png` belongs to `0.jpg`). A name that comes again begins another sample of the key,
    which has what follows it.
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

    def found(self, cut: str, kind: str) -> Scan:
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
            samples = samples[:-1]  # it may lack members that came after the cut
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
        return Scan(columns, keys, cut, kind, [note for note in notes if note[1]], ignored)


def scan(path: Path, endings: Collection[str], progress: Callable[[int], None] = lambda members: None) -> Scan:
    """Find the samples of one tar file by its headers.

    endings: those of images (".jpg", ...), in small letters. progress: called about once a second with the number of
    members so far. Errors: `OSError`; what is cut short, or no tar, is said in the result.
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
    """The files in a tar. Errors: `tarfile.ReadError` where it is cut short or damaged."""
    count, last, links = 0, time.monotonic(), []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.islnk() or member.issym():
                links.append(member.name)
            if member.isfile():
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("the last member is cut short")
                yield _Member(member.name, member.offset // BLOCK, member.offset_data // BLOCK, member.size)
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue] it would keep every header
            count += 1
            if (now := time.monotonic()) - last > 1:
                last = now
                progress(count)
        end = tar.offset
    if links:
        notes.append(("members that are links are not read", links))
    if end + BLOCK > size:
        raise tarfile.ReadError("the end mark is missing")
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(BLOCK).strip(b"\0"):  # which tarfile takes for the end
            raise tarfile.ReadError(f"the header at byte {end} is damaged")
        if file.read(1 << 16).strip(b"\0"):
            notes.append((f"what comes after the end mark at byte {end} is not read; unpack joined tar files", []))


def serve() -> None:
    """Scan the tar files that the parent process names on stdin, one at a time, until it closes the pipe.

    Tasks and results are pickles: (path, endings); the number of members so far, any times; a `Scan` or an exception.
    """
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else is written between the results

    def send(result: Any) -> None:
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
