"""Host memory: allocations that cannot fit are refused in advance."""

from __future__ import annotations

import contextlib
import ctypes
import os

from t2i_jax.core.errors import ConfigError


def memory() -> int:
    """Bytes of memory of this machine; 0 if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def check_memory(what: str, size: float) -> None:
    """Check that `size` bytes fit the memory of this machine.

    Errors: `ConfigError` where they are more than all of it; the message begins with `what`.
    """
    there = memory()
    if there and size > there:
        raise ConfigError(f"{what}: {size / 1e9:.3g} GB, and this machine has {there / 1e9:.3g} GB of memory")


def return_freed() -> None:
    """Return freed memory that the C library retains to the system, where possible (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
