"""Embeddings as codes: their leading principal components, each in equal buckets (Ramesh et al. 2022, DALL-E 2, 2.2).

With the covariance C = V diag(l_1 >= l_2 >= ...) V^T and the mean m of embeddings, code i of z is the bucket of
y_i = v_i (z - m) / sqrt(l_i). For Gaussian embeddings the mean squared error of a round trip is
sum_(i > d) l_i + D^2 / 12 sum_(i <= d) l_i, with d components kept and buckets of width D.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Float, Int, typed
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import Checked, Positive, Size
from t2i_jax.nn.layers import ModelState, replace


@dataclasses.dataclass(frozen=True)
class PrincipalCodes(Checked):
    """How many components are kept, and how finely. The defaults are those of DALL-E 2, whose embeddings have 1024
    numbers."""

    kept: Size = 319
    """components, in order of their eigenvalues"""
    buckets: Size = 1024
    """codes of each component"""
    extent: Positive = 4.0
    """buckets cover this many standard deviations on both sides of the mean; the outermost also have what is beyond"""

    @property
    def width(self) -> float:
        """Width of a bucket, in standard deviations."""
        return 2 * self.extent / self.buckets

    def init(self, dim: int) -> PrincipalAxes:
        """Axes of embeddings of `dim` numbers, before they are fitted. Errors: `ConfigError` for too few numbers."""
        return PrincipalAxes(self, dim)


class PrincipalAxes(nnx.Module):
    """Mean (k,), principal axes (k, d) and standard deviations (d,) of embeddings, all fp32 and not trained."""

    def __init__(self, config: PrincipalCodes, dim: int):
        if config.kept > dim:
            raise ConfigError(f"kept {config.kept}: embeddings have {dim} numbers")
        self.config = config
        self.mean = ModelState(jnp.zeros(dim), axes=(None,))
        self.axes = ModelState(jnp.eye(dim, config.kept), axes=(None, None))
        self.std = ModelState(jnp.ones(config.kept), axes=(None,))

    @typed
    def encode(self, z: Float[Array, "b k"]) -> Int[Array, "b d"]:
        """Codes int32 of embeddings, below `buckets`, the component of the largest eigenvalue first."""
        y = jnp.matmul(z.astype(jnp.float32) - self.mean[...], self.axes[...], precision="highest") / self.std[...]
        bucket = jnp.floor((y + self.config.extent) / self.config.width)
        return jnp.clip(bucket, 0, self.config.buckets - 1).astype(jnp.int32)

    @typed
    def decode(self, codes: Int[Array, "b d"]) -> Float[Array, "b k"]:
        """Embeddings fp32, at the centres of the buckets and the mean of all other components."""
        y = ((codes + 0.5) * self.config.width - self.config.extent) * self.std[...]
        return jnp.matmul(y, self.axes[...].T, precision="highest") + self.mean[...]

    def fitted(self, moments: Moments) -> PrincipalAxes:
        """The axes of embeddings with these moments. Errors: `ConfigError` if they vary in fewer directions."""
        values, vectors = np.linalg.eigh(moments.covariance)
        values, vectors = values[::-1][: self.config.kept], vectors[:, ::-1][:, : self.config.kept]
        if values[-1] <= 1e-10 * values[0]:
            count = int(np.sum(values > 1e-10 * values[0]))
            raise ConfigError(f"kept {self.config.kept}: the embeddings vary in {count} directions only")
        vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(len(values))])  # one of both signs
        arrays = {"mean": moments.mean, "axes": vectors, "std": np.sqrt(values)}
        return replace(self, **{name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()})


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean (k,) and covariance (k, k) of vectors, float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, parts: Iterable[np.ndarray]) -> Moments:
        """Those of all rows of float arrays (n, k), of which one at a time is in memory."""
        count, total, squares = 0, np.zeros(()), np.zeros(())
        for part in parts:
            rows = part.astype(np.float64)
            count, total, squares = count + len(rows), total + rows.sum(0), squares + rows.T @ rows
        mean = total / count
        return cls(mean, squares / count - np.outer(mean, mean))
