"""Run folders in object stores: `gs://bucket/run` and `s3://bucket/run`.

Checkpoints are written there directly. Other files of a run (config, metrics, events, images) are appended to,
which object stores do not allow: they are written to a folder of this machine, and a thread copies changed ones.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import jax
from etils import epath

from t2i_jax.core.config import ConfigError
from t2i_jax.core.console import console

STORES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
"""Scheme -> the package through which fsspec reads it, and the extra that brings it."""
CACHE_FOLDER = "xla"
"""Folder of the compiled programs of a run in a store."""
PRODUCTS = ("checkpoints", CACHE_FOLDER, "samples", "profile", "events.out.*", "metrics.jsonl", "history.jsonl")
PRODUCTS += ("report.*", "*.png")
"""Files of a run that are no part of its model."""


def resolve_path(path: str | Path) -> Path:
    """A local path as it is, or one of an object store as an `epath.Path`, which has the same methods.

    Errors: `ConfigError` for another scheme, or where the package for it is missing, naming its extra.
    """
    found = re.match(r"^(\w+):/+(.*)", str(path))  # pathlib makes one slash of two
    if not found:
        return Path(re.sub("^//+", "/", str(path)))  # two slashes, which POSIX keeps, are no path to TensorStore
    scheme, rest = found.groups()
    if scheme not in STORES:
        known = " or ".join(s + "://" for s in STORES)
        hub = "; a hub is read, and written by t2i push" if scheme == "hf" else ""
        raise ConfigError(f"{path}: paths are local, or begin with {known}{hub}")
    package, extra = STORES[scheme]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{scheme}://{rest}: needs the package {package}: pip install 't2i_jax[{extra}]'")
    return cast(Path, epath.Path(f"{scheme}://{rest}"))  # it has the methods of a Path


def download(where: Path, names: Sequence[str] = ()) -> Path:
    """A local folder with what is in `where`: itself where it is local, else a copy of the files and folders of these
    names, or without names of all that belong to a model: its weights, vocabularies, codec and text encoders."""
    if isinstance(where, Path):
        return where
    folder = Path(tempfile.mkdtemp(prefix="t2i_jax_"))

    def copy(source: Path, target: Path) -> None:
        if source.is_dir():
            target.mkdir(exist_ok=True)
            for each in source.iterdir():
                copy(each, target / each.name)
        else:
            target.write_bytes(source.read_bytes())

    for each in where.iterdir() if where.exists() else ():
        product = any(fnmatch.fnmatch(each.name, pattern) for pattern in PRODUCTS)
        if each.name in names if names else not product:
            copy(each, folder / each.name)
    return folder


@contextlib.contextmanager
def staged_dir(where: Path, every: float = 30.0) -> Iterator[Path]:
    """A local folder to work in: `where` itself, or one that holds its config and metrics and is copied to it.

    The first process copies what has changed, each `every` seconds and at the end. A failed copy is logged and retried
    the next time; at the end its error is raised.
    """
    if isinstance(where, Path):
        yield where
        return
    folder, over, seen = (
        download(where, ("config.json", "history.jsonl", "data.json", "metrics.jsonl")),
        threading.Event(),
        {},
    )
    main = jax.process_index() == 0

    def copy() -> None:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            state = (file.stat().st_mtime_ns, file.stat().st_size)
            if main and seen.get(file) != state:
                target = where / file.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
                seen[file] = state

    def watch() -> None:
        while not over.wait(every):
            try:
                copy()
            except Exception as error:  # any error of a store or of the network
                message = f"{where}: a copy failed, it is tried again: {error}"
                console.print(message, style="yellow", markup=False, soft_wrap=True)

    def stop() -> None:
        over.set()
        thread.join()

    thread = threading.Thread(target=watch, name="copies", daemon=True)
    thread.start()
    try:
        yield folder
    except BaseException:  # the error of the work is raised, even if the copy fails too
        stop()
        try:
            copy()
        except Exception as error:
            message = f"{where}: the last copy failed: {error}"
            console.print(message, style="yellow", markup=False, soft_wrap=True)
        raise
    stop()
    copy()
    shutil.rmtree(folder, ignore_errors=True)
