"""Guidance: moving the predictions of a network towards a condition. All kinds compose, with each other and every
solver."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax import Array

from t2i_jax.core.arrays import Bool, Float, Int, typed
from t2i_jax.core.conditions import Batch
from t2i_jax.core.fields import values
from t2i_jax.core.types import Capabilities, Family, SamplingOptions
from t2i_jax.noise.schedule import expand_like

T = TypeVar("T")


def is_guided(can: Capabilities, guided: bool | None, negative: Batch | None = None) -> bool:
    """Whether to compute a second branch: `guided`, or for None whether there is a negative condition or the family has
    learned an unconditional branch."""
    return (negative is not None or can.unconditional) if guided is None else guided


def guided_by(family: Family, options: SamplingOptions) -> bool | None:
    """The argument `guided` of `Family.sample`: False for a guidance of 1, which needs no unconditional branch."""
    can, given = family.capabilities, values(options)
    scales = ("guidance", "neighbour_guidance") if can.neighbours else ("guidance",)
    plain = can.guidance and all(np.all(np.asarray(given[name]) == 1) for name in scales)
    return False if plain else None


@dataclasses.dataclass(frozen=True)
class Branches:
    """The conditional and the unconditional branch of classifier-free guidance, as one batch of 2b rows.

    The two rows of an image are adjacent, so that both are on the same device. Without guidance it is the conditional
    branch alone, b rows.
    """

    guided: bool
    negative: Batch | None = None
    """a condition, b rows, whose branch takes the place of the unconditional one: a negative prompt (Chang et al. 2023,
    Muse, 2.7); fields that it does not have are those of the other branch"""

    @property
    def count(self) -> int:
        return 2 if self.guided else 1

    def rows(self, inputs: T) -> T:
        """Arrays (b, ...) of a pytree with each row repeated once per branch: (b n, ...)."""
        return jax.tree.map(lambda x: repeat(x, "b ... -> (b n) ...", n=self.count), inputs)

    def conditions(self, condition: Batch, b: int) -> tuple[Batch, Array]:
        """The condition of each of the b n rows, and which of them are unconditional, bool (b n,)."""
        dropped = self.dropped(b)
        if self.negative is None or not self.guided:
            return self.rows(condition), dropped
        both = {**condition, **self.negative}
        pairs = {k: rearrange([condition[k], x], "n b ... -> (b n) ...") for k, x in both.items() if k in condition}
        return pairs, jnp.zeros_like(dropped)

    def shared(self, outputs: T) -> T:
        """Arrays (b n, ...) of a pytree with the rows of the conditional branch in place of the others."""
        return jax.tree.map(lambda x: self.rows(self.split(x)[0]), outputs)

    @typed
    def dropped(self, b: int) -> Bool[Array, " n"]:
        """Which of the b n rows are unconditional."""
        return jnp.tile(jnp.arange(self.count) == 1, b)

    def split(self, outputs: Array) -> tuple[Array, Array | None]:
        """Split outputs (b n, ...) into the conditional (b, ...) and the unconditional ones (b, ...), None without
        guidance."""
        value, *null = rearrange(outputs, "(b n) ... -> n b ...", n=self.count)
        return value, null[0] if null else None

    def __call__(self, network: Callable[..., Array], *inputs: object) -> tuple[Array, Array | None]:
        """Outputs of both branches, split, for inputs (b, ...) that both share: one call of the network."""
        return self.split(network(*self.rows(inputs)))


@typed
def guide(
    value: Float[Array, "*b c"], null: Float[Array, "*b c"] | None, scale: Array | float, channels: int = 0
) -> Float[Array, "*b c"]:
    """null + scale (value - null) on predictions; exactly `value` at scale 1 (Ho & Salimans 2022, eq. 6).

    `null` is the prediction without the condition, or by a worse model (Karras et al. 2024, autoguidance); None returns
    `value`. scale: a scalar or (b,). channels: if not 0, guide only the first `channels` channels; released samplers of
    DiT and GLIDE guide three.
    """
    if null is None:
        return value
    moved = value + (expand_like(scale, value) - 1) * (value - null)
    return moved if not channels else jnp.where(jnp.arange(value.shape[-1]) < channels, moved, value)


@typed
def rescale(guided: Float[Array, " b *x"], value: Float[Array, " b *x"], share: Array | float) -> Float[Array, " b *x"]:
    """`guided`, rescaled per image towards the standard deviation of `value` by `share` (Lin et al. 2024, eqs. 15 and
    16)."""
    axes = tuple(range(1, value.ndim))
    factor = value.std(axes, keepdims=True) / jnp.maximum(guided.std(axes, keepdims=True), 1e-8)
    share = expand_like(share, value)
    return guided * (share * factor + 1 - share)


def within(scale: Array | float, at: Array | float, start: Array | float, stop: Array | float) -> Array:
    """`scale` while `start` <= at < `stop`, else 1 (Kynkaanniemi et al. 2024); `at` is 0 in noise, 1 at the end."""
    return jnp.where((at >= jnp.asarray(start) - 1e-6) & (at < jnp.asarray(stop) - 1e-6), scale, 1.0)


@typed
def classifier_gradient(
    log_p: Callable[[Array], Array], x: Float[Array, " b *x"], scale: Array | float
) -> Float[Array, " b *x"]:
    """scale times the gradient of log p(condition | x) with respect to x, for log_p (b,) of x.

    With a classifier of noised images this is classifier guidance (Dhariwal & Nichol 2021), with the similarity of
    noised image and caption it is that of GLIDE (Nichol et al. 2022, section 2.3).
    """
    return expand_like(scale, x) * jax.grad(lambda x: log_p(x).sum())(x)


@typed
def of_class(logits: Float[Array, "b v"], label: Int[Array, " b"]) -> Float[Array, " b"]:
    """log p(label)."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), label[:, None], 1)[:, 0]
