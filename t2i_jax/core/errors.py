"""Errors that a user can fix: the command line prints the message as one line and exits with status 2."""

from __future__ import annotations

import difflib
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


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.3) -> str:
    """The end of an error about an unknown word, `; did you mean 'x'?`, or nothing if no known word is similar.

    cutoff: least similarity, from 0 to 1 (`difflib.get_close_matches`).
    """
    near = difflib.get_close_matches(word, list(known), 1, cutoff)
    return f"; did you mean '{near[0]}'?" if near else ""
