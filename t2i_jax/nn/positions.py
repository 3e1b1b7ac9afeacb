"""How a network gets the position of a token in the grid of an image."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np

from t2i_jax.core.arrays import Float, typed
from t2i_jax.core.fields import Checked, Count, Positive
from t2i_jax.nn.attention import Rotary, rotary_2d, with_prefix


@dataclasses.dataclass(frozen=True)
class RotaryPositions(Checked):
    """Queries and keys are rotated by row and column (Su et al. 2021).

    >>> cos, sin = RotaryPositions().table((2, 3), head_dim=8, prefix=1)
    >>> cos.shape
    (7, 4)
    """

    base: Positive = 10000.0
    prefix: Literal["identity", "zero"] = "identity"
    """tokens without a position in the grid are not rotated, or multiplied by zero (as released LlamaGen weights
    need)"""

    def table(self, grid: tuple[int, int], head_dim: int, prefix: int = 0) -> Rotary:
        """cos and sin (prefix + i * j, head_dim / 2): `prefix` tokens without a position, then the grid in raster
        order."""
        angles = rotary_2d(grid, head_dim, self.base)
        return with_prefix(jnp.cos(angles), jnp.sin(angles), prefix, zero=self.prefix == "zero")


@dataclasses.dataclass(frozen=True)
class LearnedPositions(Checked):
    """A learned vector is added at each position of the sequence."""

    count: Count = 0
    """rows of the table; 0: the length of the sequence"""


@dataclasses.dataclass(frozen=True)
class AxialPositions(Checked):
    """A learned vector of the row and one of the column are added."""

    grid: tuple[int, int] | None = None
    """rows and columns of the tables; None: those of the codes. A larger one is read in raster order, as if the image's
    tokens were its first: released VQ-Diffusion models of 16 x 16 tokens were trained so with 32 x 32"""


@dataclasses.dataclass(frozen=True)
class SinCosPositions(Checked):
    """Fixed sines and cosines of row and column are added (Dosovitskiy et al. 2021, as in DiT)."""

    stretch: Positive = 1.0
    """divides rows and columns, for images larger than those of the original training"""
    base: tuple[int, int] | None = None
    """rows and columns of another grid, to whose range those of this one are scaled; None: they are as they are"""

    def table(self, grid: tuple[int, int], d: int) -> Float[np.ndarray, "t {d}"]:
        """The vectors of a grid: (i * j, d)."""
        base = self.base or grid
        rows, columns = (self.stretch * side / own for side, own in zip(grid, base, strict=True))
        return sincos_2d(grid, d, (rows, columns))


@typed
def sincos_2d(grid: tuple[int, int], d: int, stretch: float | tuple[float, float] = 1.0) -> Float[np.ndarray, "t {d}"]:
    """Fixed position embeddings: sines and cosines of the column, then those of the row, as DiT was first released.

    stretch: divides rows and columns, or each by its own. Errors: ValueError if 4 does not divide d.
    """
    if d % 4:
        raise ValueError(f"width {d} cannot hold sine and cosine of row and column: it must be a multiple of 4")
    row, column = np.indices(grid).reshape(2, -1, 1) / np.reshape(np.broadcast_to(stretch, 2), (2, 1, 1))
    frequencies = 10000.0 ** -(np.arange(d // 4) / (d // 4))
    waves = [f(place * frequencies) for place in (column, row) for f in (np.sin, np.cos)]
    return np.concatenate(waves, -1).astype(np.float32)
