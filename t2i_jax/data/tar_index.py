"""Indexes of tar files: where the samples of each are, found once and kept.

The index of `shards/00000.tar` is a file of its own in `shards/.t2i-index`, or in the user's cache where that folder
cannot be written. Its name is `TAR.STATE.SAMPLES`: STATE has the size and the time of the tar and a digest of what
changes the meaning of an index, and "c" after SAMPLES says that the tar is cut short or no tar. So a listing of the
folder says which tar files have to be scanned and how many samples the others hold.

The file is one line of JSON, then its columns, little-endian, from the next multiple of 8 bytes on:
{"t2i-tar-index": VERSION, "size": ..., "mtime_ns": ..., "samples": n, "columns": {NAME: [DTYPE, OFFSET] or VALUE}}.
VALUE is that of all samples. The last bytes are END, which a file that was cut short, or whose tail is zeros after a
power cut, has not. Columns that a reader does not know are kept and not read; so a version of the library that wants
another column adds it to the files that lack it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import pickle
import queue
import random
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from t2i_jax.core.errors import DataError
from t2i_jax.core.tar_scan import BLOCK, COLUMNS, TarScan, scan
from t2i_jax.core.text import mend
from t2i_jax.data.files import kinds, most_files, report, say_once
from t2i_jax.data.images import image_endings
from t2i_jax.data.records import umask

log = logging.getLogger(__name__)
VERSION = 2
"""Version of the meaning of the columns; an added column does not change it."""
FOLDER = ".t2i-index"
NEW = ".new-"
"""Prefix of the names of files that are being written."""
FORMAT = "t2i-tar-index"
END = b"\nend\n"
DTYPES = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<i8")
SMALL = 1 << 26
"""Bytes of tar files scanned in the time that another process takes to start."""


@dataclass(frozen=True)
class TarEntry:
    """The index of one tar file."""

    tar: Path
    samples: int
    whole: bool
    """the tar can be read to its end"""
    file: str
    """path of the index; empty where no folder can be written"""
    data: bytes = b""
    """then the index itself"""


class Header(TypedDict):
    """The first line of an index."""

    size: int
    mtime_ns: int
    samples: int
    columns: dict[str, int | tuple[str, int]]
    cut: NotRequired[str]
    kind: NotRequired[str]
    keys: NotRequired[int]
    """these three of `TarScan`, where the tar cannot be read to its end"""
    ignored: NotRequired[list[str]]


class Table:
    """An index as it is read: whole numbers in named columns, memory-mapped.

    Errors: `ValueError` where `data` holds no index, or a damaged one.
    """

    def __init__(self, data: bytes | mmap.mmap):
        self.data, self.start = data, data.find(b"\n") + 1
        header: Header | None = json.loads(bytes(data[: self.start])) if self.start else None
        if not isinstance(header, dict) or header.get(FORMAT) != VERSION:
            raise ValueError("it is of another kind")
        if bytes(data[-len(END) :]) != END:
            raise ValueError("it is cut short")
        if not isinstance(columns := header.get("columns"), dict):
            raise ValueError("its first line is damaged: it has no columns")
        try:
            self.columns: dict[str, int | tuple[np.dtype, int]] = {
                name: stored if isinstance(stored, int) else (np.dtype(stored[0]), self.start + int(stored[1]))
                for name, stored in columns.items()
            }
            self.samples, size = int(header["samples"]), int(header["size"])
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"its first line is damaged: {error}") from error
        self.header = header
        for stored in self.columns.values():
            if isinstance(stored, tuple) and stored[1] + self.samples * stored[0].itemsize > len(data):
                raise ValueError("it is cut short")
        ends = (0, self.samples - 1) if self.samples and "image" in self.columns else ()
        if not all(0 < self.value("image", row) * BLOCK <= size for row in ends):  # zeros, after a power cut
            raise ValueError("its columns are damaged")

    def value(self, name: str, row: int) -> int:
        """One number of a column."""
        stored = self.columns[name]
        if isinstance(stored, int):
            return stored
        kind, at = stored
        at += row * kind.itemsize
        return int.from_bytes(self.data[at : at + kind.itemsize], "little", signed=kind.kind == "i")

    def column(self, name: str) -> np.ndarray:
        """A column (samples,)."""
        stored = self.columns[name]
        if isinstance(stored, int):
            return np.full(self.samples, stored)
        return np.frombuffer(self.data, stored[0], self.samples, stored[1])


Seen = Callable[[Path, TarEntry | Exception], None]


def raise_error(_tar: Path, found: TarEntry | Exception) -> None:
    """Raise the error of a tar file that could not be scanned."""
    if isinstance(found, Exception):
        raise found


def index_tars(shards: Sequence[Path], workers: int = 0, seen: Seen = raise_error) -> dict[Path, TarEntry]:
    """The indexes of tar files; those that are missing are made, and kept one by one.

    Processes that index the same files at the same time, on one host or several, take them in different orders and
    leave out those that another one has finished.

    Args:
        workers: processes that scan; 0 is one for each core, at most 16, or none where the files are small.
        seen: called with each tar file and its entry, or with the error of its scan; an exception from it ends the
            work.

    Errors: what `seen` raises.
    """
    folders = {folder: _Folder(folder) for folder in dict.fromkeys(map(os.path.dirname, shards))}
    found: dict[Path, TarEntry] = {}
    missing: dict[Path, os.stat_result] = {}

    def take(tar: Path, entry: TarEntry | Exception) -> None:
        if isinstance(entry, TarEntry):
            found[tar] = entry
        seen(tar, entry)

    for tar in dict.fromkeys(shards):
        try:
            state = os.stat(tar)
        except OSError as error:
            take(tar, error)
            continue
        if entry := folders[os.path.dirname(tar)].find(tar, state):
            take(tar, entry)
        else:
            missing[tar] = state
    for tar, result in _scans(missing, folders, workers) if missing else ():
        if isinstance(result, TarScan):
            for what, names in result.notes:
                log.warning("%s: %s%s", tar, what, f": {mend(kinds(names))}" if names else "")
            result = folders[os.path.dirname(tar)].keep(tar, missing[tar], result)
        take(tar, result)
        report(f"the index of {tar}")
    for folder in folders.values():
        folder.tidy()
    return found


class _Folder:
    """A folder of tar files, and the places where their indexes may be."""

    def __init__(self, path: str):
        self.path = Path(path)
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        digest = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]
        self.places = [self.path / FOLDER, Path(cache, "t2i_jax", "tars", digest)]
        settings = json.dumps([VERSION, sorted(image_endings())])
        self.settings = hashlib.sha256(settings.encode()).hexdigest()[:6]
        self.mask = umask()
        self.lock = threading.Lock()
        self.changed = False
        self.look()

    def look(self) -> None:
        """List the indexes."""
        began = time.monotonic()
        self.kept: dict[str, dict[str, tuple[str, str]]] = {}
        for place in reversed(self.places):
            with contextlib.suppress(OSError):
                for name in os.listdir(place):
                    tar, *rest = name.rsplit(".", 2)
                    if len(rest) == 2 and not name.startswith(NEW):
                        self.kept.setdefault(tar, {})[rest[0]] = os.path.join(place, name), rest[1]
        self.listed, self.cost = time.monotonic(), time.monotonic() - began

    def find(self, tar: Path, state: os.stat_result, again: bool = False) -> TarEntry | None:
        """The index of a tar file, if there is one. again: list the folder once more, unless that was just done."""
        with self.lock:
            if again and time.monotonic() - self.listed > max(2.0, 20 * self.cost):
                self.look()
            file, count = self.kept.get(_name(tar), {}).get(_state(state) + self.settings, ("", ""))
        samples = count.removesuffix("c")
        return TarEntry(tar, int(samples), samples == count, file) if file and samples.isdecimal() else None

    def keep(
        self, tar: Path, state: os.stat_result, found: TarScan, more: Mapping[str, np.ndarray] | None = None
    ) -> TarEntry:
        """Write the index of a tar file, with columns `more`, whole or not at all."""
        samples, whole = len(found.columns["image"]), not found.cut
        about: dict[str, object] = {
            "size": state.st_size,
            "mtime_ns": state.st_mtime_ns,
            **({"cut": found.cut, "kind": found.kind, "keys": found.keys} if found.cut else {}),
            **({"ignored": [mend(name) for name in found.ignored]} if found.ignored else {}),
        }
        data = encode_table(about, {**(more or {}), **found.columns})
        name = f"{_name(tar)}.{_state(state)}{self.settings}.{samples}{'' if whole else 'c'}"
        fault: OSError | None = None
        for place in self.places:
            try:
                with contextlib.suppress(FileExistsError):
                    place.mkdir(parents=True)
                    if place.parent == self.path:  # users who may add a tar may add its index
                        place.chmod(stat.S_IMODE(self.path.stat().st_mode))
                write_whole(place / name, data, (0o666 & ~self.mask) | (state.st_mode & 0o444))  # for all readers
            except OSError as error:
                fault = fault or error
                continue
            self.changed = True
            with self.lock:
                others = self.kept.pop(_name(tar), {})
            for other, (file, _) in others.items():
                if not other.startswith(_state(state)):  # of an earlier state of the tar
                    with contextlib.suppress(OSError):
                        os.unlink(file)
            return TarEntry(tar, samples, whole, str(place / name))
        say_once(f"{self.path}: the tar index stays in memory ({fault})")
        return TarEntry(tar, samples, whole, "", data)

    def tidy(self) -> None:
        """Remove the index that earlier versions of the library kept, and files whose writer was killed."""
        with contextlib.suppress(OSError):
            if self.changed:
                for file in (*self.path.glob(".members-*.npy"), *(f for p in self.places for f in p.glob(f"{NEW}*"))):
                    if time.time() - file.stat().st_mtime > 3600 or file.suffix == ".npy":
                        file.unlink()


def write_whole(path: Path, data: bytes, mode: int) -> None:
    """Write a file that appears whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=NEW, delete=False) as temporary:
        try:
            temporary.write(data)
            temporary.flush()
            os.fchmod(temporary.fileno(), mode)
            os.replace(temporary.name, path)
        except BaseException:
            os.unlink(temporary.name)
            raise


def _name(tar: Path) -> str:
    """The start of an index's name: the tar file's name, or a digest of a long one."""
    name = os.path.basename(tar)
    encoded = os.fsencode(name)
    return name if len(encoded) <= 180 else hashlib.sha256(encoded).hexdigest()[:32]


def _state(state: os.stat_result) -> str:
    return f"{state.st_size:x}-{state.st_mtime_ns:x}-"


# ------------------------------------------------------------------------------------------------------------ scanning


def _scans(
    missing: Mapping[Path, os.stat_result], folders: Mapping[str, _Folder], workers: int
) -> Iterator[tuple[Path, TarEntry | TarScan | Exception]]:
    """Each tar file with its scan, or with the index that another process made meanwhile."""
    large = sum(state.st_size for state in missing.values()) > SMALL
    order = random.SystemRandom().sample(list(missing), len(missing)) if large or workers > 1 else list(missing)
    workers, endings = min(workers or (_cores() if large else 1), len(missing)), image_endings()
    made = lambda tar: folders[os.path.dirname(tar)].find(tar, missing[tar], again=True)
    if workers == 1:
        for tar in order:
            try:
                yield (
                    tar,
                    made(tar) or scan(tar, endings, lambda members, tar=tar: report(f"{members} members of {tar}")),
                )
            except OSError as error:
                yield tar, error
        return
    processes, idle = [_Process() for _ in range(workers)], queue.SimpleQueue[_Process]()
    for process in processes:
        idle.put(process)

    def one(tar: Path) -> tuple[Path, TarEntry | TarScan | Exception]:
        process = idle.get()
        try:
            return tar, made(tar) or process.scan(tar, endings)
        finally:
            idle.put(process)

    pool = ThreadPoolExecutor(workers, "tar index")
    try:
        for done in as_completed([pool.submit(one, tar) for tar in order]):
            yield done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.end()


class _Process:
    """A process that scans; not by `multiprocessing`, which would import the caller's program again."""

    def __init__(self):
        self.program: subprocess.Popen[bytes] | None = None

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        return subprocess.Popen(
            [sys.executable, "-c", "from t2i_jax.core.tar_scan import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"},
            process_group=0,  # Ctrl-C is for the parent
        )

    def scan(self, tar: Path, endings: Collection[str]) -> TarScan | Exception:
        """The result of scanning a tar file, or its error."""
        program = self.program = self.program or self._start()
        tasks, results = program.stdin, program.stdout
        assert tasks and results
        try:
            pickle.dump((tar, endings), tasks)
            tasks.flush()
            while isinstance(result := pickle.load(results), int):
                report(f"{result} members of {tar}")
            return result
        except (OSError, EOFError, pickle.UnpicklingError):
            self.end()
            return DataError(f"{tar}: the process that scanned it ended with status {program.returncode}")

    def end(self) -> None:
        program, self.program = self.program, None
        if program:
            program.kill()
            with contextlib.suppress(OSError), program:  # closes the pipes and waits
                pass


def _cores() -> int:
    return min(most_files(16, 8), len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)


# ------------------------------------------------------------------------------------------------------------- format


def encode_table(about: Mapping[str, object], columns: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of an index. about: further entries of its first line. columns: integers (samples,)."""
    samples = len(next(iter(columns.values())))
    stored: dict[str, object] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, x in columns.items():
        low, high = (int(x.min()), int(x.max())) if samples else (0, 0)
        if low == high:
            stored[name] = low
        else:
            kind = next(d for d in DTYPES if np.iinfo(d).min <= low and high <= np.iinfo(d).max)
            arrays[name] = np.asarray(x, kind)
    blobs, end = [], 0
    for name, x in sorted(arrays.items(), key=lambda item: -item[1].itemsize):  # so each is aligned
        stored[name] = [x.dtype.str, end]
        blobs.append(x.tobytes())
        end += x.nbytes
    header = {FORMAT: VERSION, **about, "samples": samples, "columns": stored}
    line = json.dumps(header, separators=(",", ":")).encode()
    return b"".join([line, b" " * (-(len(line) + 1) % 8), b"\n", *blobs, END])


def open_table(entry: TarEntry) -> Table:
    """The index of a tar file, memory-mapped; a damaged one is made again, one that lacks a column gets it.

    Errors: `DataError` where the tar file has changed since its entry was made; `OSError`.
    """
    if not entry.file:
        return Table(entry.data)
    more: dict[str, np.ndarray] = {}
    try:
        with open(entry.file, "rb") as file:
            table = Table(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if table.samples != entry.samples:
            fault = "it is of another tar file"
        elif missing := [name for name in COLUMNS if name not in table.columns]:
            fault, more = f"it has no column {', '.join(missing)}", {c: table.column(c) for c in table.columns}
        else:
            return table
    except (OSError, ValueError) as error:
        fault = str(error)
    log.warning("%s: the tar index cannot be used and is made again (%s)", entry.file, fault)
    folder, state = _Folder(os.path.dirname(entry.tar)), os.stat(entry.tar)
    found = scan(entry.tar, image_endings(), lambda members: report(f"{members} members of {entry.tar}"))
    if f".{_state(state)}" not in os.path.basename(entry.file) or len(found.columns["image"]) != entry.samples:
        raise DataError(f"{entry.tar}: the tar file has changed since it was opened")
    made = folder.keep(entry.tar, state, found, more)
    return Table(Path(made.file).read_bytes() if made.file else made.data)
