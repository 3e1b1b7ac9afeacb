"""What is set once per process: compiler flags by platform, the compile cache, the other processes of a run."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from t2i_jax.parallel import start_cluster

# Overlap of collectives with compute; each flag is known to the compiler of that platform alone.
XLA_FLAGS = {
    "gpu": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "tpu": "",  # the TPU compiler hides latency by default
    "cpu": "",
}


def prepare() -> None:
    """Make this process ready: call it before the first array. What the environment sets already is left as it is."""
    platform = os.environ.get("JAX_PLATFORMS", "")
    flags = XLA_FLAGS.get({"cuda": "gpu", "rocm": "gpu"}.get(platform, platform), "")
    if flags and flags.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "t2i_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    start_cluster()
