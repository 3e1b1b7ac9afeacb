"""The same models as published programs write them, from `benchmarks/` of the repository: no part of the package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from t2i_jax.core.errors import ConfigError

ROOT = Path(__file__).parents[2]


def baseline(name: str) -> ModuleType:
    """The module `benchmarks/pytorch/NAME.py`. Errors: `ConfigError` outside of a clone of the repository."""
    if not (ROOT / "benchmarks" / "pytorch" / f"{name}.py").exists():
        raise ConfigError("--eager: the PyTorch programs are in benchmarks/ of the repository, not in the package")
    if str(ROOT) not in sys.path:  # as where the command begins in another folder
        sys.path.append(str(ROOT))
    return importlib.import_module(f"benchmarks.pytorch.{name}")
