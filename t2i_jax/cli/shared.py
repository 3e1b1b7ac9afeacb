"""Shared by all commands: a console, arguments, and one line for errors that the user can correct."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from typing import TypeVar

from t2i_jax.core.console import console as console
from t2i_jax.core.outputs import local as local

T = TypeVar("T")


class Lines(logging.Handler):
    """Prints log records as lines of the console, above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def fail(message: str, status: int = 2) -> None:
    # Arguments may be of any length; the error has to stay visible.
    message = re.sub(r"\S{300,}", lambda found: f"{found[0][:120]}...{found[0][-40:]}", message)
    console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)


def parse(kind: type[T], arguments: Sequence[str], prog: str) -> T:
    from t2i_jax.core import config  # imports JAX, which `t2i --help` does not need

    return config.parse(kind, arguments, prog)


def parse_some(kind: type[T], arguments: Sequence[str], prog: str) -> tuple[T, list[str]]:
    """The command's own arguments, and the rest: overrides of fields of a config or a model."""
    from t2i_jax.core import config

    return config.parse_some(kind, arguments, prog)
