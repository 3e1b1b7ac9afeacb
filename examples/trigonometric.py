"""A noise process: alpha = cos t and sigma = sin t (Albergo & Vanden-Eijnden 2023, arXiv:2209.15571, eq. 2.9).

The variance of x_t is that of unit data at every t, and t is uniform in training.

    from examples.trigonometric import Trigonometric
    experiment = Experiment(Diffusion(DiT(...), Trigonometric(), "v"), data)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import jax.numpy as jnp
from jax import Array

from t2i_jax.core.fields import Checked, Positive, Range, Size
from t2i_jax.core.noise import NoiseProcess, SamplingGrid, Spacing
from t2i_jax.noise.processes import along
from t2i_jax.noise.schedule import expand_like


@dataclasses.dataclass(frozen=True)
class Trigonometric(Checked):
    """x_t = cos(t) x_0 + sin(t) eps for t from 0 to `end`; predict v."""

    end: Annotated[float, Range(above=0, below=math.pi / 2)] = 1.57
    """angle of the noisiest images, below pi / 2: at that angle nothing of the image is left"""
    scale: Positive = 1.0
    """1 / the standard deviation of the data"""
    max_steps: Size = 1000
    """maximum number of sampling steps"""

    @property
    def solver(self) -> str:
        return "ddim"

    @property
    def starts_from_pure_noise(self) -> bool:
        return False

    @property
    def time_levels(self) -> None:
        return None

    @property
    def variance_bound(self) -> None:
        return None

    def same_noise(self, other: NoiseProcess) -> bool:
        return isinstance(other, Trigonometric) and self.scale == other.scale

    def quantile(self, u: Array) -> Array:
        return self.end * u

    def alpha_sigma(self, t: Array, like: Array) -> tuple[Array, Array]:
        t = expand_like(t, like)
        return jnp.cos(t), jnp.sin(t)

    def network_time(self, t: Array) -> Array:
        return t * (1000 / self.end)  # the frequencies of time embeddings are made for times up to 1000

    def timesteps(self, steps: Array | int, stride: Array | bool = False, spacing: Spacing = "default") -> SamplingGrid:
        """Evenly spaced angles from `end` to 0. Errors: ValueError for another spacing."""
        if spacing not in ("default", "even"):
            raise ValueError(f"spacing {spacing!r}: a Trigonometric has default and even")
        t = self.end * jnp.maximum(1 - jnp.arange(self.max_steps + 1) / steps, 0)
        return along(self.network_time(t), jnp.cos(t), jnp.sin(t), steps)
