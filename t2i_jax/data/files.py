"""Files of data sets: finding them, walking folders, and few of them open at a time."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar, cast

from t2i_jax.core.errors import DataError
from t2i_jax.core.text import mend

log = logging.getLogger(__name__)
NOT_DATA = frozenset(("__MACOSX", "@eaDir"))
"""Folders that programs leave among data; those whose names begin with a dot are skipped too."""

K = TypeVar("K")
T = TypeVar("T")


class Recent(Generic[K, T]):
    """A cache of the last `most` results of `make(key)`; thread-safe, empty after pickling.

    An evicted result lives until the last thread drops it, so `make` returns objects that close themselves.
    """

    def __init__(self, make: Callable[[K], T], most: int):
        self.make, self.most = make, most
        self.kept: OrderedDict[K, _Slot[T]] = OrderedDict()
        self.lock = threading.Lock()

    def __reduce__(self):
        return Recent, (self.make, self.most)

    def __getitem__(self, key: K) -> T:
        with self.lock:
            slot = self.kept.setdefault(key, _Slot())
            self.kept.move_to_end(key)
            while len(self.kept) > self.most:
                self.kept.popitem(last=False)
        with slot.lock:  # others wait for this one alone
            if not slot.value:
                slot.value = (self.make(key),)
            return slot.value[0]


class _Slot(Generic[T]):
    def __init__(self):
        self.lock = threading.Lock()
        self.value: tuple[T, ...] = ()


class Files(Generic[K, T]):
    """Open files of one reader by path; all readers of a process together keep few of them open."""

    def __init__(self, make: Callable[[K], T]):
        self.make, self.reader = make, object()  # another reader may mean another file of that name

    def __reduce__(self):
        return Files, (self.make,)

    def __getitem__(self, path: K) -> T:
        return cast(T, _open()[self.reader, self.make, path])


def most_files(most: int, share: int = 4) -> int:
    """How many files may be open for one purpose: `most`, or 1/`share` of what the system allows this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if soft < 0 else max(1, min(most, soft // share))


@lru_cache(1)
def _open() -> Recent[tuple[object, Callable[..., object], object], object]:
    """The open files of this process. It is made when the first is opened, as `platform.prepare` raises the limit."""
    return Recent(lambda key: key[1](key[2]), most_files(64))


_REPORTS: list[Callable[[str], None]] = []


@contextlib.contextmanager
def reporting(call: Callable[[str], None]) -> Iterator[None]:
    """Within the block, long work on files calls `call` with the last thing done, from any thread."""
    _REPORTS.append(call)
    try:
        yield
    finally:
        _REPORTS.remove(call)


def report(what: str) -> None:
    """Report the last thing done to every callback of `reporting`."""
    for call in _REPORTS:
        call(what)


class Descriptor:
    """A file open for reading, closed when nothing uses it."""

    def __init__(self, path: str | os.PathLike):
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        """Has no file position, so threads do not interfere. Errors: `DataError` where the file ends before."""
        data = os.pread(self.number, size, offset)
        if len(data) < size:
            raise DataError(f"the file ends {size - len(data)} bytes too early: has it changed?")
        return data

    def __del__(self):
        if self.number >= 0:
            os.close(self.number)


@lru_cache(1024)
def say_once(message: str) -> None:
    """Log a warning once a process."""
    log.warning("%s", message)


def mounted(path: str) -> None:
    """Errors: `DataError` for the address of an object store, saying how its records can be read."""
    if "://" in path:
        raise DataError(
            f"{path}: records are read in any order from files; mount the bucket (gcsfuse for gs://, mount-s3 for "
            "s3://) and name the folder where it is mounted"
        )


def files_of(path: str, suffix: str) -> list[Path]:
    """The files that `path` means: a file, a folder of `*suffix`, or a glob. Errors: `DataError` if there are none."""
    mounted(path)
    if os.path.isdir(path):
        names = sorted(n for n in os.listdir(path) if n.lower().endswith(suffix) and not n.startswith("."))
        if not names:
            raise DataError(f"{path}: the folder holds no *{suffix} file; {contents(path)}")
        return [Path(path, name) for name in names]
    found = [path] if os.path.exists(path) else sorted(glob(path))
    if not found:
        raise DataError(f"{path}: there is no such file or folder")
    return [Path(name) for name in found]


def contents(folder: str) -> str:
    """A sentence on the contents of a folder: kinds of files with their counts and some names, and folders."""
    with os.scandir(folder) as entries:
        found = sorted((e.name, e.is_dir()) for e in islice(entries, 100_000) if not e.name.startswith("."))
    parts = kinds([name for name, is_folder in found if not is_folder])
    if folders := [name for name, is_folder in found if is_folder]:
        parts += f"{', and ' if parts else ''}folders: {some(folders)}"
    return f"it holds {parts}" if parts else "it is empty"


def kinds(names: Iterable[str]) -> str:
    """Files by their endings, the most first: "22 .caption (a.caption, b.caption, ...), 1 .mp4 (c.mp4)"."""
    by_ending: dict[str, list[str]] = {}
    for name in names:
        by_ending.setdefault(ending(name), []).append(name)
    most = sorted(by_ending.items(), key=lambda item: -len(item[1]))
    words = [f"{len(n)} {end or 'without an ending'} ({some(n)})" for end, n in most[:6]]
    return ", ".join(words + ([f"and {len(most) - 6} more kinds"] if len(most) > 6 else []))


def ending(name: str) -> str:
    """The ending of a file name in small letters, compressed ones whole: ".jpg", ".tar.gz"."""
    stem, end = os.path.splitext(name.lower())
    return (os.path.splitext(stem)[1] if end in (".gz", ".bz2", ".xz", ".zst") else "") + end


def some(names: Sequence[str]) -> str:
    """The first three of several names."""
    return mend(", ".join(names[:3]) + (", ..." if len(names) > 3 else ""))


def walk(root: str) -> Iterator[str]:
    """The files below a folder, by paths relative to it, in any order.

    Links to folders are followed, each real folder is visited once, and none that holds `root`. Names that begin with a
    dot and folders that programs leave (`NOT_DATA`) are passed over; a folder that cannot be read is logged.
    """
    top = os.path.realpath(root)
    seen, folders, links = set(), [""], deque[str]()
    while folders or links:
        at = folders.pop() if folders else links.popleft()  # a folder is known by its own name rather than by a link
        real = os.path.realpath(os.path.join(root, at))
        if real in seen or (at and (top + os.sep).startswith(real.rstrip(os.sep) + os.sep)):
            continue
        seen.add(real)
        try:
            with os.scandir(os.path.join(root, at)) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            say_once(f"{mend(str(error))}: its files are left out")
            continue
        for entry in found:
            path = os.path.join(at, entry.name)
            if entry.name.startswith(".") or entry.name in NOT_DATA:
                continue
            if not entry.is_dir():
                yield path
            elif entry.is_symlink():
                links.append(path)
            else:
                folders.append(path)
