"""Errors that a user can mend: the command line prints their message as one line and exits with status 2."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file and the field."""


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the record or the field."""
