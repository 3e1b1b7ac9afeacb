"""Folders of work that may be interrupted: what is in them is by one config, and a file there is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from t2i_jax.core.config import differences, read_stored, stored_form, to_json
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.migration import migrated

WORK = "work.json"


def go_on(folder: Path, work: Mapping[str, object], command: str) -> None:
    """Make the folder of unfinished work, or go on in it; what was half written is removed.

    work: all that its files depend on. command: that makes it. Errors: `ConfigError` where the folder is that of
    another config, or of no such command.
    """
    new = stored_form(dict(work))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WORK
    if not path.exists() and any(p for p in folder.iterdir() if p.name != f".{WORK}"):
        raise ConfigError(
            f"{folder} is there, and is no unfinished work of `{command}`; remove it or choose another --out"
        )
    if path.exists() and (changed := differences(to_json(read_stored(path)), migrated(new))):
        raise ConfigError(
            f"{folder} holds unfinished work of another config; remove it, or choose another --out:\n  "
            + "\n  ".join(changed)
        )
    for left in (*folder.glob(".*"), *folder.glob("*.partial")):  # half written when killed
        left.unlink()
    if not path.exists():
        (folder / f".{WORK}").write_text(json.dumps(new, indent=1))
        (folder / f".{WORK}").replace(path)
