"""Folders as Hugging Face lays them out: `config.json` beside weights in one file or several."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from t2i_jax.interop.torchfile import read_torch

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
)
"""Where weights may lie, best first, for `transformers` and diffusers."""


def config(folder: str | Path) -> dict[str, Any]:
    """What `config.json` says. Errors: FileNotFoundError without it, ValueError where it cannot be read."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no config.json in it; it is to be a folder as Hugging Face lays it out")
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error


class Weights(Mapping[str, np.ndarray]):
    """The tensors of such a folder by name; of .safetensors files only what is asked for is read.

    Errors: FileNotFoundError for a folder without weights, or with some of its files missing; ValueError for a damaged
    one.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        first = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
        if first is None:
            raise FileNotFoundError(f"{folder}: no weights in it; one of {', '.join(WEIGHTS)} is wanted")
        files = [first]
        if first.suffix == ".json":
            files = [folder / name for name in sorted(set(json.loads(first.read_text())["weight_map"].values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"{folder}: {first.name} names {', '.join(missing)}, which is not there")
        self.parts = {name: part for part in map(_part, files) for name in part}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.parts[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


class _Lazy(Mapping[str, np.ndarray]):
    def __init__(self, file: Path):
        try:
            self.file = safe_open(file, "numpy")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: cannot be read as safetensors: {error}") from error
        self.names = dict.fromkeys(self.file.keys())

    def __getitem__(self, name: str) -> np.ndarray:
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _part(file: Path) -> Mapping[str, np.ndarray]:
    return _Lazy(file) if file.suffix == ".safetensors" else read_torch(file, unknown="stand-in")
