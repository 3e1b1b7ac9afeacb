"""Diffusion as loss and sampler of single codes (Li et al. 2024, arXiv:2406.11838, section 3)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import Array

from t2i_jax.core.arrays import Float, Int, typed
from t2i_jax.core.fields import FREE, Layers, Size
from t2i_jax.heads.denoiser import Denoiser
from t2i_jax.heads.draws import PositionKeys
from t2i_jax.heads.head import VectorHead
from t2i_jax.noise.gaussian import ddpm_step, p_mean_variance, q_sample, vb_terms
from t2i_jax.noise.schedule import Schedule, spread_of_each
from t2i_jax.sampling.guidance import guide
from t2i_jax.sampling.options import ARSampler


class LossTerms(NamedTuple):
    """The loss of noised codes and its parts, one row each."""

    x_t: Float[Array, "n k"]
    out: Float[Array, "n 2*k"]
    """the predicted noise, and the position of the variance between its bounds"""
    mse: Float[Array, " n"]
    vb: Float[Array, " n"]
    """mse of the noise; vb, the variational bound in bits per dimension, for the variance alone"""


@dataclasses.dataclass(frozen=True)
class DiffusionHead(VectorHead):
    """p(x | z) by denoising in `steps` steps: a small MLP predicts noise and variance."""

    width: Size = 1024
    depth: Layers = 3
    steps: Size = 1000
    """number of steps of the training process"""
    schedule: str = "cosine"
    respacing: Annotated[str, FREE] = "100"
    """sampling steps, in the format of `noise.schedule.respacing`"""
    repeat: Size = 4
    """training times per z, as a head costs less than its network"""

    def __post_init__(self):
        super().__post_init__()
        self.process().respaced(self.respacing)

    def init(self, key: Array, width: int) -> Denoiser:
        return Denoiser(self.dim, 2 * self.dim, self.width, self.depth, width, key)

    def process(self) -> Schedule:
        return Schedule.named(self.schedule, self.steps)

    @typed
    def loss(
        self, module: Denoiser, z: Float[Array, "b t d"], x: Float[Array, "b t k"], key: Array, train: bool = True
    ) -> Float[Array, "b t"]:
        """Squared error of the predicted noise plus the variance's part of the bound, mean over `repeat` times.

        train: False uses a fixed grid of times.
        """
        b, t, _ = x.shape
        first, second = jax.random.split(key)
        rows = lambda y: repeat(y, "b t k -> (r b t) k", r=self.repeat)
        times = jnp.floor(spread_of_each(first, self.repeat, b * t, train) * self.steps).astype(jnp.int32).reshape(-1)
        noise = jax.random.normal(second, (len(times), self.dim))
        terms = self.terms(module, rows(z), rows(x), times, noise)
        return rearrange(terms.mse + terms.vb, "(r b t) -> r b t", r=self.repeat, b=b).mean(0)

    @typed
    def terms(
        self,
        module: Denoiser,
        z: Float[Array, "n d"],
        x: Float[Array, "n k"],
        t: Int[Array, " n"],
        noise: Float[Array, "n k"],
    ) -> LossTerms:
        """The loss of codes x noised to times t (Nichol & Dhariwal 2021, eq. 16 with lambda 1).

        The bound trains the variance only: no gradient flows through its mean.
        """
        process, x = self.process(), x.astype(jnp.float32)
        x_t = q_sample(process, x, t, noise)
        out = module(x_t, t, module.embed(z))
        eps, v = jnp.split(out, 2, -1)
        p = p_mean_variance(process, jax.lax.stop_gradient(eps), x_t, t, v=v)
        return LossTerms(x_t, out, jnp.mean((noise - eps) ** 2, -1), vb_terms(process, x, x_t, t, p))

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
        """Codes fp32 by ancestral sampling; the temperature scales the noise of each step, but not the initial noise.

        Guidance acts on the predicted noise; the variance is that of the conditional branch.
        """
        process = self.process().respaced(self.respacing)
        times = jnp.asarray(process.timestep_map)
        b, m, _ = z.shape
        flat = lambda y: rearrange(y, "b m k -> (b m) k")
        row = lambda y: repeat(jnp.broadcast_to(y, (b,)), "b -> (b m)", m=m)
        embedded = module.embed(flat(z) if null is None else jnp.concatenate([flat(z), flat(null)]))

        def step(x: Array, t: Array) -> tuple[Array, None]:
            both = x if null is None else jnp.concatenate([x, x])
            out = module(both, jnp.full(len(both), times[t]), embedded)
            eps, v = jnp.split(out[: len(x)], 2, -1)
            if null is not None:
                eps = guide(eps, out[len(x) :, : self.dim], row(guidance))
            at = jnp.full(len(x), t)
            p = p_mean_variance(process, eps, x, at, v=v)
            noise = flat(draws.normal(len(process) - t, self.dim))
            return ddpm_step(p, at, noise, row(options.temperature)), None

        x, _ = jax.lax.scan(step, flat(draws.normal(0, self.dim)), jnp.arange(len(process) - 1, -1, -1))
        return rearrange(x, "(b m) k -> b m k", b=b), None
