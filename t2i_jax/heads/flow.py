"""Flow matching as a head: a straight path from noise to a code, integrated in a few steps (Lipman et al. 2023)."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax import Array

from t2i_jax.core.arrays import Float, typed
from t2i_jax.core.fields import FREE, Layers, Size
from t2i_jax.heads.denoiser import Denoiser
from t2i_jax.heads.draws import PositionKeys
from t2i_jax.heads.head import VectorHead
from t2i_jax.noise.schedule import spread_of_each
from t2i_jax.sampling.guidance import guide
from t2i_jax.sampling.options import ARSampler


@dataclasses.dataclass(frozen=True)
class FlowHead(VectorHead):
    """p(x | z) by flow matching: a small MLP predicts the velocity eps - x of x_t = (1 - t) x + t eps.

    >>> str(FlowHead(dim=4).code)
    'codes of 4 numbers'
    """

    width: Size = 1024
    depth: Layers = 3
    steps: Annotated[Size, FREE] = 20
    """sampling steps, of two evaluations each; they get shorter towards the clean end"""
    repeat: Size = 4
    """training times per z"""

    def init(self, key: Array, width: int) -> Denoiser:
        return Denoiser(self.dim, self.dim, self.width, self.depth, width, key)

    @typed
    def loss(
        self, module: Denoiser, z: Float[Array, "b t d"], x: Float[Array, "b t k"], key: Array, train: bool = True
    ) -> Float[Array, "b t"]:
        """Squared error of the velocity, mean over `repeat` logit-normal times.

        The times follow Esser et al. (2024, section 3.1): the middle of the path is the hardest. train: False uses a
        fixed grid.
        """
        b = len(x)
        first, second = jax.random.split(key)
        rows = lambda y: repeat(y, "b t k -> (r b t) k", r=self.repeat)
        x = rows(x.astype(jnp.float32))
        u = spread_of_each(first, self.repeat, len(x) // self.repeat, train)
        t = jax.nn.sigmoid(jax.scipy.special.ndtri(u)).reshape(-1, 1)
        noise = jax.random.normal(second, x.shape)
        v = self.velocity(module, (1 - t) * x + t * noise, t[:, 0], module.embed(rows(z)))
        return rearrange(jnp.mean((noise - x - v) ** 2, -1), "(r b t) -> r b t", r=self.repeat, b=b).mean(0)

    @typed
    def velocity(
        self, module: Denoiser, x: Float[Array, "n k"], t: Float[Array, " n"], embedded: Float[Array, "n f"]
    ) -> Float[Array, "n k"]:
        return module(x, 1000 * t, embedded)  # the frequencies of the embedding are made for times up to 1000

    @typed
    def sample(
        self,
        module: Denoiser,
        z: Float[Array, "b m d"],
        null: Float[Array, "b m d"] | None,
        draws: PositionKeys,
        guidance: Array,
        options: ARSampler,
    ) -> tuple[Float[Array, "b m k"], None]:
        """Codes fp32 by second-order midpoint steps; the temperature scales the initial noise.

        The stops are t = (1 - n/steps)^2, since a distribution of standard deviation s is decided where t is about s.
        The velocity is never evaluated at t = 0: the best prediction there is -x whatever the noise, and a step along
        it would leave noise in the code. With the exact velocity of a Gaussian of standard deviation 0.02 or more, the
        sampled standard deviation is at most 5 % off with 8 steps, and 0.5 % with 20.
        """
        b, m, _ = z.shape
        flat = lambda y: rearrange(y, "b m k -> (b m) k")
        row = lambda y: repeat(jnp.broadcast_to(y, (b,)), "b -> (b m)", m=m)
        embedded = module.embed(flat(z) if null is None else jnp.concatenate([flat(z), flat(null)]))

        def velocity(x: Array, t: Array) -> Array:
            both = x if null is None else jnp.concatenate([x, x])
            v = self.velocity(module, both, jnp.full(len(both), t), embedded)
            return v if null is None else guide(v[: len(x)], v[len(x) :], row(guidance))

        def step(x: Array, ends: tuple[Array, Array]) -> tuple[Array, None]:
            t, s = ends
            middle = x + (s - t) / 2 * velocity(x, t)
            return x + (s - t) * velocity(middle, (s + t) / 2), None

        stops = jnp.asarray((1 - np.arange(self.steps + 1) / self.steps) ** 2, jnp.float32)
        start = flat(draws.normal(0, self.dim)) * row(options.temperature)[:, None]
        x, _ = jax.lax.scan(step, start, (stops[:-1], stops[1:]))
        return rearrange(x, "(b m) k -> b m k", b=b), None
