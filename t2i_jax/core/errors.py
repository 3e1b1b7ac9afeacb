"""Errors that a user can fix: the command line prints the message as one line and exits with status 2."""

from __future__ import annotations


class ConfigError(ValueError):
    """An invalid configuration; the message names the file and the field."""


class DataError(ValueError):
    """Invalid data; the message names the file, the record or the field."""
