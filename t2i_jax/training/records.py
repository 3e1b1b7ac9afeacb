"""Logs of a run: metrics as JSON lines and TensorBoard events, and on request to wandb."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from t2i_jax.core.config import ConfigError
from t2i_jax.core.outputs import write_text


class Line(TypedDict):
    """A line of a metrics file; its other fields are numbers by name."""

    step: int
    skipped: NotRequired[int]


class Records:
    """The metric files of a run folder. A run that goes on from step n first drops later lines."""

    def __init__(self, folder: Path, step: int, config: object = None, wandb: bool = False):
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read(self.path) if line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        from tensorboardX import SummaryWriter  # imports torch if installed, so only when a run begins

        self.skipped = int(next((line["skipped"] for line in reversed(kept) if "skipped" in line), 0))
        """steps so far that changed nothing"""
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.wandb = None
        if wandb:
            try:
                import wandb as library  # pyright: ignore[reportMissingImports]
            except ImportError as error:
                raise ConfigError("train.wandb is set, but wandb is not installed: pip install wandb") from error
            self.wandb = library.init(
                project="t2i_jax", name=folder.name, id=folder.name, dir=str(folder), config=config, resume="allow"
            )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of numbers; a value that is not finite is written as null, which JSON can hold."""
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(dict(metrics), step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Log an image, uint8 (i, j, 3)."""
        self.board.add_image(name, image, step, dataformats="HWC")
        if self.wandb:
            import wandb as library  # pyright: ignore[reportMissingImports]

            self.wandb.log({name: library.Image(image)}, step=step)

    def close(self) -> None:
        self.file.close()
        self.board.close()
        if self.wandb:
            self.wandb.finish()


def read(path: Path) -> list[Line]:
    """The lines of a metrics file; a last line that a kill cut short is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
