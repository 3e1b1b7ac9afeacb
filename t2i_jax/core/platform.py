"""What is set once per process: compiler flags by platform, the compile cache, the other processes of a run."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from platform import libc_ver

import jax
from jax.experimental.compilation_cache import compilation_cache

from t2i_jax.core.sharding import start_cluster

# Collectives that run while something else is computed.
XLA_FLAGS = {
    # Start collectives as early and await them as late as the program allows. On TPUs that is the default, and further
    # flags are for one kind of chip each: what serves v5e is refused, with warnings of wrong results, on v5p.
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": "true"},
}
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm60_plugin", "jax_rocm7_plugin")


def flags(platforms: str, has_gpu: bool, current: str) -> str:
    """XLA_FLAGS with what `current` says already left as it is. platforms: what JAX_PLATFORMS says."""
    gpu = has_gpu if not platforms else any(p in platforms.split(",") for p in ("gpu", "cuda", "rocm"))
    wanted = XLA_FLAGS["gpu"] if gpu else {}
    new = [f"--{name}={value}" for name, value in wanted.items() if f"{name}=" not in current]
    return " ".join([*current.split(), *new])


# Of `mallopt` in glibc's malloc.h, and what they are set to.
KEPT = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 2**28)}


def keep_memory() -> bool:
    """Keep freed memory for later allocations; returns whether the C library supports it.

    By default it returns large blocks to the system, which then clears every page of new ones: on a CPU each step
    begins with hundreds of MB of those. Settings of malloc in the environment take precedence.
    """
    if libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(number, value) for number, value in KEPT.values()])


# Else libtpu asks a cloud's metadata server who it is, waits, and complains where there is none.
ALONE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}


def tpu_compiler_alone() -> None:
    """Configure libtpu to compile for absent chips. What the environment says already stays."""
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)


def has_tpu() -> bool:
    """Whether this machine has TPU chips and what drives them."""
    chips = any(Path("/dev").glob("accel*")) or Path("/dev/vfio").exists()
    return chips and importlib.util.find_spec("libtpu") is not None


def raise_file_limit() -> None:
    """Allow this process and its children as many open files as the system lets them have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # a limit above that of the kernel
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


CACHE = "jax_compilation_cache_dir"
XLA_CACHES = "jax_persistent_cache_enable_xla_caches"


def user_cache(name: str) -> Path:
    """A folder of this library in the cache of the user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "t2i_jax", name)


def local_cache() -> str:
    """Where compiled programs are kept on this machine."""
    return str(user_cache("xla"))


@contextlib.contextmanager
def shared_cache(folder: str) -> Iterator[None]:
    """Within the block compiled programs are kept in a folder that all processes of a run see, of an object store too.

    JAX writes them from the first process, and all processes read them. Nothing changes where the environment or the
    program has set another folder.
    """
    before: dict[str, str | None] = dict(zip((CACHE, XLA_CACHES), _cache(), strict=True))
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or before[CACHE] not in (None, "", local_cache()):
        yield
        return
    # XLA writes its own caches without JAX, and not to object stores.
    settings = {CACHE: folder, XLA_CACHES: "" if "://" in folder else before[XLA_CACHES]}
    try:
        _set_cache(settings)
        yield
    finally:
        _set_cache(before)


def _cache() -> tuple[str | None, str]:
    """The settings CACHE and XLA_CACHES."""
    return jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_enable_xla_caches  # pyright: ignore


def _set_cache(settings: Mapping[str, str | None]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it holds the folder with which it was first used


def prepare(join: bool = True) -> None:
    """Make this process ready: call it before the first array. What the environment sets already is left as it is.

    join: with the other processes of the run, if there are any. Errors: `NoCluster` where they are not to be found.
    """
    raise_file_limit()
    has_gpu = any(importlib.util.find_spec(name) for name in PLUGINS)
    if found := flags(os.environ.get("JAX_PLATFORMS", ""), has_gpu, os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = found
    if not _cache()[0]:
        jax.config.update(CACHE, local_cache())
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms == "cpu" or not (platforms or has_gpu or has_tpu()):
        keep_memory()
    if join:
        start_cluster()
    if not has_tpu():
        tpu_compiler_alone()
