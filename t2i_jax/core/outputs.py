"""Output files of commands: written atomically, and never over files from other sources."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from t2i_jax.core.errors import ConfigError

MAKER = "t2i_jax"
STAMP = f"<!-- made by {MAKER} -->"
"""Last line of every Markdown file that a command writes."""
KEYS = ({"title", "facts", "numbers"}, {"title", "flops", "runs"}, {"what", "machine", "results"})
"""Keys of the JSON files that earlier versions of commands wrote without naming the library."""


def in_store(path: Path) -> bool:
    """Whether a path is the URL of an object store, whose second slash `Path` takes away."""
    return re.match(r"\w{2,}:/", str(path)) is not None


def local(path: Path) -> Path:
    """`path`, if it is local. Errors: `ConfigError` for a URL of an object store, or an invalid path."""
    if "\0" in str(path):
        raise ConfigError(f"--out {str(path)!r}: no path has a NUL in it")
    if in_store(path):
        raise ConfigError(f"--out {path}: is written to this machine alone; of a run, --run may name an object store")
    return path


def check_free(*paths: str | os.PathLike) -> None:
    """Check that the paths can be written.

    Errors: `ConfigError` that names the first path that exists and was not made by this library, or is not in a folder.
    """
    for path in map(Path, paths):
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder; name a file")
        if os.path.lexists(path) and not is_ours(path):
            raise ConfigError(f"{path}: was not made by this command and will not be written over; choose another name")
    for parent in {Path(path).parent: path for path in paths}.values():
        check_parent(Path(parent))


def check_parent(path: Path) -> None:
    """Errors: `ConfigError` if the folder of `path` cannot be created because a file is in its place."""
    above = next((p for p in path.absolute().parents if os.path.lexists(p)), path)
    if not above.is_dir():
        raise ConfigError(f"{path}: {above} is a file, so nothing can be written below it")


def check_utf8(path: Path) -> None:
    """Errors: `ConfigError` for a path that is not UTF-8, which writers of checkpoints and records do not support."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{str(path.absolute())!a}: is not UTF-8; choose another name") from error


def is_ours(path: Path) -> bool:
    """Whether a file is marked as made by this library: an image, a JSON or a Markdown file; of JSON lines by the
    first."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    if data.startswith(b"\x89PNG"):
        at = data.find(b"Software\0")
        return 0 <= at < 4096 and MAKER.encode() in data[at : at + 64] and data.endswith(b"IEND\xaeB`\x82")
    if data.lstrip().startswith((b"{", b"[")):
        try:
            found = json.loads(data.split(b"\n", 1)[0] if path.suffix == ".jsonl" else data)
        except (ValueError, RecursionError):
            return False
        found = found[0] if isinstance(found, list) and found else found
        return isinstance(found, dict) and (found.get("made_by") == MAKER or any(k <= found.keys() for k in KEYS))
    if path.suffix == ".md" and path.with_suffix(".json").exists() and is_ours(path.with_suffix(".json")):
        return True
    return STAMP.encode() in data or (data.startswith(b"# ") and b"\nMade by `t2i " in data[:1000])


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A file to write in the block, which becomes `path` at its end, and is removed if it fails; creates its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file in UTF-8, whole or not at all. Bytes of a file name that are not UTF-8 are escaped."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | os.PathLike, value: Mapping[str, object] | list[Mapping[str, object]]) -> None:
    """Write an object, or a list of them, as JSON that names this library as its maker."""
    marked = [{"made_by": MAKER, **one} for one in (value if isinstance(value, list) else [value])]
    text = json.dumps(marked if isinstance(value, list) else marked[0], indent=1, ensure_ascii=False, default=str)
    write_text(path, text + "\n")


def write_json_lines(path: str | os.PathLike, rows: Sequence[Mapping[str, object]]) -> None:
    """Write objects as JSON, one a line, each with this library's name as its maker."""
    lines = [json.dumps({**row, "made_by": MAKER}, ensure_ascii=False, default=str) for row in rows]
    write_text(path, "".join(f"{line}\n" for line in lines))


def write_markdown(path: str | os.PathLike, text: str) -> None:
    """Write Markdown that names this library as its maker."""
    write_text(path, f"{text.rstrip()}\n\n{STAMP}\n")


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder to fill in the block, which becomes `path` at its end, and is removed if it fails.

    Errors: as of `check_new`.
    """
    path = Path(path)
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name[:50]}.", dir=path.parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        yield made
        os.replace(made, path)


def check_new(folder: str | os.PathLike) -> None:
    """Errors: `ConfigError` where a released model would replace something."""
    if os.path.lexists(folder):
        raise ConfigError(f"{folder}: exists already; choose another folder for the released model")
    check_utf8(Path(folder))
    check_parent(Path(folder))
