"""The same models in eager PyTorch on a CPU, as published programs write them: to be compared with, and for no more.

Each takes the weights of ours and gives the same numbers (tests). Errors: `ConfigError` without PyTorch, `ValueError`
for a configuration of another kind.
"""

from typing import Any

from t2i_jax.config import ConfigError


def pytorch() -> Any:
    """The package."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("--eager compares with PyTorch, which is not installed: pip install torch") from error
    return torch
