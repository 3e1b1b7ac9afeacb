"""Errors that a user can fix: the command line prints the message as one line and exits with status 2."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class ConfigError(ValueError):
    """An invalid configuration; the message names the file and the field.

    >>> from t2i_jax import Train
    >>> Train(keep=0)
    Traceback (most recent call last):
    t2i_jax.core.errors.ConfigError: Train.keep 0: 1 to 2147483647
    """


class DataError(ValueError):
    """Invalid data; the message names the file, the record or the field."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message names the file."""


class NotWritten(CheckpointError):
    """A checkpoint that could not be written, whose writers may still be running."""


class NotFinite(ArithmeticError):
    """A loss or a gradient is NaN or infinite; the message names the step and the layer."""


class Interrupted(Exception):
    """A signal stopped the run; it is saved and can be resumed with the same command."""

    def __init__(self, message: str, number: int = signal.SIGINT):
        super().__init__(message)
        self.signal = int(number)


class PeerLost(RuntimeError):
    """A collective failed, as it does when a process is gone."""


class NoCluster(ValueError):
    """The environment asks for other processes and does not say how to find them."""


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.3) -> str:
    """The end of an error about an unknown word, `; did you mean 'x'?`, or nothing if no known word is similar.

    cutoff: least similarity, from 0 to 1 (`difflib.get_close_matches`).
    """
    near = difflib.get_close_matches(word, list(known), 1, cutoff)
    return f"; did you mean '{near[0]}'?" if near else ""
