"""Host memory: allocations that cannot fit are refused in advance."""

from __future__ import annotations

import ctypes
import os
from platform import libc_ver

from t2i_jax.core.errors import ConfigError


def memory() -> int:
    """Bytes of memory of this machine; 0 if unknown."""
    known = "SC_PHYS_PAGES" in os.sysconf_names
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else 0


def check_memory(what: str, size: float) -> None:
    """Check that `size` bytes fit the memory of this machine.

    Errors: `ConfigError` where they are more than all of it; the message begins with `what`.
    """
    there = memory()
    if there and size > there:
        raise ConfigError(f"{what}: {size / 1e9:.3g} GB, and this machine has {there / 1e9:.3g} GB of memory")


def return_freed() -> None:
    """Return freed memory that the C library retains to the system, where possible (glibc)."""
    if libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
