"""Files that commands write: whole or not at all, and never over what something else made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from t2i_jax.core.errors import ConfigError

MAKER = "t2i_jax"
STAMP = f"<!-- made by {MAKER} -->"
"""Ends every Markdown file that a command writes."""
KEYS = ({"title", "facts", "numbers"}, {"title", "flops", "runs"}, {"what", "machine", "results"})
"""Of the JSON files that commands wrote before these said who made them."""


def check_free(*paths: str | os.PathLike) -> None:
    """Errors: `ConfigError` that names the first path where something is that no command of this library made."""
    for path in map(Path, paths):
        if os.path.lexists(path) and not is_ours(path):
            raise ConfigError(f"{path}: was not made by this command and will not be written over; choose another name")


def is_ours(path: Path) -> bool:
    """Whether a file says that this library made it: an image, a JSON or a Markdown file."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    if data.startswith(b"\x89PNG"):
        at = data.find(b"Software\0")
        return 0 <= at < 4096 and MAKER.encode() in data[at : at + 64] and data.endswith(b"IEND\xaeB`\x82")
    if path.suffix == ".json":
        try:
            found = json.loads(data)
        except ValueError:
            return False
        found = found[0] if isinstance(found, list) and found else found
        return isinstance(found, dict) and (found.get("made_by") == MAKER or any(k <= found.keys() for k in KEYS))
    if path.suffix == ".md":
        return STAMP.encode() in data or (path.with_suffix(".json").exists() and is_ours(path.with_suffix(".json")))
    return False


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file whole or not at all; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: str | os.PathLike, value: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Write an object, or a list of them, as JSON that says who made it."""
    said = [{"made_by": MAKER, **one} for one in (value if isinstance(value, list) else [value])]
    text = json.dumps(said if isinstance(value, list) else said[0], indent=1, ensure_ascii=False, default=str)
    write_text(path, text + "\n")


def write_markdown(path: str | os.PathLike, text: str) -> None:
    """Write Markdown that says who made it."""
    write_text(path, f"{text.rstrip()}\n\n{STAMP}\n")
