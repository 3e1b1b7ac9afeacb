"""The memory of this machine: what cannot fit is refused before it is asked for."""

from __future__ import annotations

import contextlib
import ctypes
import os

from t2i_jax.core.errors import ConfigError


def memory() -> int:
    """Bytes of memory of this machine; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def check_memory(what: str, size: float) -> None:
    """Errors: `ConfigError` where `size` bytes are more than all memory of this machine; the message begins with
    `what`."""
    there = memory()
    if there and size > there:
        raise ConfigError(f"{what}: {size / 1e9:.3g} GB, and this machine has {there / 1e9:.3g} GB of memory")


def return_freed() -> None:
    """Gives back to the system what the C library keeps of freed memory, where it can (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
