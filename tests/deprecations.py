"""Deprecated calls become warnings of the module that makes them, so that `filterwarnings` can turn those of this
package into errors.

Libraries often name another place: they warn inside decorators, count frames wrongly, or write to a log.
"""

import logging
import sys
import warnings
from types import FrameType

CATEGORIES = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
HELPERS = {
    "absl",
    "contextlib",
    "functools",
    "importlib",
    "jaxlib",
    "logging",
    "typing_extensions",
    "warnings",
    __name__,
}
"""Packages whose frames come between a library and its caller."""

_warn = warnings.warn


def package(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]


def caller() -> FrameType | None:
    """The frame that called the library that warns."""
    frame: FrameType | None = sys._getframe(1)
    while frame and package(frame) in HELPERS:
        frame = frame.f_back
    library = package(frame) if frame else ""
    while frame and package(frame) in {library, *HELPERS}:
        frame = frame.f_back
    return frame


def blame(warning: Warning, frame: FrameType) -> None:
    warnings.warn_explicit(
        warning, type(warning), frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__", "")
    )


def warn(message, category=None, stacklevel=1, source=None, *, skip_file_prefixes=()) -> None:
    """`warnings.warn`, but a deprecated call is attributed to the module that makes it."""
    warning = message if isinstance(message, Warning) else (category or UserWarning)(message)
    frame = caller() if isinstance(warning, CATEGORIES) else None
    if frame:
        blame(warning, frame)
    elif skip_file_prefixes:
        _warn(message, category, stacklevel, source, skip_file_prefixes=(*skip_file_prefixes, __file__))
    else:
        _warn(message, category, stacklevel + 1, source)


class Log(logging.Handler):
    """Turns what libraries log of deprecated calls into warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage().lower() and (frame := caller()):
            blame(DeprecationWarning(record.getMessage()), frame)


def install() -> None:
    warnings.warn = warn
    logging.getLogger().addHandler(Log(logging.WARNING))
