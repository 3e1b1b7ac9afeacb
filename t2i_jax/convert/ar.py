"""Formats of next-token models."""

from typing import Any

from t2i_jax.convert import Format
from t2i_jax.interop import llamagen
from t2i_jax.interop.names import Tensors
from t2i_jax.models.ar import AR


def _llamagen(tensors: Tensors, *, grid: tuple[int, int] = (16, 16), head_dim: int = 0, **fields: Any) -> AR:
    """grid: (16, 16) for 256 pixels, (24, 24) for 384, (32, 32) for 512; the file does not know it."""
    return AR(**(llamagen.describe(tensors, grid, head_dim) | fields))


FORMATS = {"llamagen": Format(_llamagen, llamagen.table, llamagen.UNUSED)}
