"""What is set once per process: compiler flags by platform, the compile cache, the other processes of a run."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import jax

from t2i_jax.parallel import start_cluster

# Collectives that run while something else is computed. Each flag is known to the compiler of its platform alone.
FLAGS: dict[str, tuple[str, dict[str, str]]] = {
    "gpu": (
        "XLA_FLAGS",
        {
            # Start collectives as early and await them as late as the program allows.
            "xla_gpu_enable_latency_hiding_scheduler": "true",
            # Layers are a scan: let an iteration gather the weights of the next one, and scatter the last one's
            # gradients, while it computes. Without these a loop is a wall that nothing is hidden behind.
            "xla_gpu_enable_pipelined_all_gather": "true",
            "xla_gpu_enable_pipelined_reduce_scatter": "true",
            "xla_gpu_enable_pipelined_all_reduce": "true",
            # Two iterations in one, so that what one gathers needs no copy to be there for the next.
            "xla_gpu_enable_while_loop_double_buffering": "true",
            # Small gradients travel together: by the default of 30 MB a large model sends hundreds of messages.
            "xla_gpu_all_reduce_combine_threshold_bytes": "134217728",
            "xla_gpu_reduce_scatter_combine_threshold_bytes": "134217728",
        },
    ),
    "tpu": (
        "LIBTPU_INIT_ARGS",
        {
            # The latency hiding scheduler is on by default; these let it move more.
            # Gathers of FSDP run within products that do not need them yet, over several where one is too short.
            "xla_enable_async_all_gather": "true",
            "xla_tpu_enable_async_collective_fusion": "true",
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
            "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
            # The core that computes drives the links too.
            "xla_tpu_overlap_compute_collective_tc": "true",
            # Gradients are summed over `data` while the backward pass goes on, whatever their sizes.
            "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
            "xla_tpu_data_parallel_opt_different_sized_ops": "true",
        },
    ),
}
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm60_plugin", "jax_rocm7_plugin")


def environment(platforms: str, has_gpu: bool, current: dict[str, str]) -> dict[str, str]:
    """The environment variables that carry the flags, with what `current` says already left as it is.

    platforms: what JAX_PLATFORMS says. libtpu alone reads its variable, so that is set everywhere: a plan compiles
    for TPUs in a process that has none.
    """
    kinds = ["tpu"]
    if has_gpu if not platforms else any(p in platforms.split(",") for p in ("gpu", "cuda", "rocm")):
        kinds.append("gpu")
    wanted = {}
    for variable, flags in (FLAGS[kind] for kind in kinds):
        old = current.get(variable, "")
        new = [f"--{name}={value}" for name, value in flags.items() if f"{name}=" not in old]
        wanted[variable] = " ".join([*old.split(), *new])
    return wanted


def prepare() -> None:
    """Make this process ready: call it before the first array. What the environment sets already is left as it is."""
    has_gpu = any(importlib.util.find_spec(name) for name in PLUGINS)
    os.environ |= environment(os.environ.get("JAX_PLATFORMS", ""), has_gpu, dict(os.environ))
    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "t2i_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    start_cluster()
