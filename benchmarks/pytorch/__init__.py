"""The same models in eager PyTorch on a CPU, as published programs write them: to be compared with, and for no more.

Each takes the weights of ours and gives the same numbers in fp32 (tests). Errors: `ConfigError` without PyTorch or
where JAX computes on something else than a CPU, `ValueError` for a configuration of another kind.
"""

from typing import Any

import jax
import numpy as np

from t2i_jax.core.config import ConfigError


def pytorch() -> Any:
    """The package."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("PyTorch is not installed: pip install torch") from error
    if jax.default_backend() != "cpu":
        raise ConfigError(f"PyTorch runs on the CPU here, and JAX on {jax.default_backend()}: set JAX_PLATFORMS=cpu")
    return torch


def tensor(x: Any) -> Any:
    """An array as a contiguous fp32 tensor that owns its memory."""
    return pytorch().from_numpy(np.array(x, np.float32, order="C"))
