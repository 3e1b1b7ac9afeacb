"""What every command needs: a console, its arguments, and one clear line for what a user can mend."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from t2i_jax import config
from t2i_jax.config import ConfigError

console = Console(stderr=True)


class Lines(logging.Handler):
    """Prints log records as lines of the console, above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def fail(message: str, status: int = 2) -> None:
    console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)


def local(path: Path) -> Path:
    """`path`, where it is one of this machine. Errors: `ConfigError` for one of an object store, or no path."""
    if "\0" in str(path):
        raise ConfigError(f"--out {str(path)!r}: no path has a NUL in it")
    if re.match(r"\w{2,}:/", str(path)):
        raise ConfigError(f"--out {path}: is written to this machine alone; of a run, --run may name an object store")
    return path


def parse(kind: type, arguments: Sequence[str], prog: str) -> Any:
    return config.parse(kind, arguments, prog)


def parse_some(kind: type, arguments: Sequence[str], prog: str) -> tuple[Any, list[str]]:
    """The command's own arguments, and the rest: overrides of fields that only a config or a model knows."""
    return config.parse(kind, arguments, prog, return_unknown_args=True)
