"""Losses of generators and discriminators, and penalties on the gradient of a discriminator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from t2i_jax.core.arrays import Float, typed
from t2i_jax.core.fields import Checked, NotNegative, Size
from t2i_jax.nn.layers import at_least_fp32
from t2i_jax.nn.resize import area

Adversary = Literal["hinge", "vanilla"]
"""Losses of generator and discriminator: hinges, or the cross-entropy of real and fake."""


@dataclasses.dataclass(frozen=True)
class Paired(Checked):
    """weight mean |a(G(z, s)) - a(x)|, x the real image of the sentence s and a the means over squares.

    Isola et al. 2017 (arXiv:1611.07004, eq. 3), whose images are compared whole. At a coarse size the term says what is
    where and of which colour, and leaves edges and detail to the discriminator; images of one sentence differ less.
    """

    weight: NotNegative = 10.0
    side: Size = 16
    """of the means that are compared; sizes below it are compared whole"""

    def distances(self, images: Array, real: Array) -> Array:
        """Mean absolute difference of each image (b, i, j, 3) from its real one (b, i', j', 3), fp32 (b,)."""
        size = min(self.side, images.shape[1]), min(self.side, images.shape[2])
        coarse, target = (area(x.astype(jnp.float32), size) for x in (images, real))
        return jnp.mean(jnp.abs(coarse - target), (1, 2, 3))


def discriminator_loss(logits: Array, real: bool, adversary: Adversary) -> Array:
    """Loss of the discriminator at each logit, whose image (and condition) is real, or is not: of the shape of the
    logits, fp32.

    hinge: max(0, 1 - D) for real and max(0, 1 + D) for fake (Lim & Ye 2017); vanilla: the cross-entropy (Goodfellow et
    al. 2014).
    """
    signed = at_least_fp32(logits) if real else -at_least_fp32(logits)
    return jax.nn.relu(1 - signed) if adversary == "hinge" else jax.nn.softplus(-signed)


def mean_discriminator_loss(real: Array, fake: Array, adversary: Adversary) -> Array:
    """Half the sum of the mean losses at logits of real and of fake images, a scalar."""
    at_real, at_fake = discriminator_loss(real, True, adversary), discriminator_loss(fake, False, adversary)
    return (at_real.mean() + at_fake.mean()) / 2


def generator_loss(logits: Array, adversary: Adversary) -> Array:
    """Loss of the generator at the logit of each of its images: of the shape of the logits, fp32.

    hinge: -D; vanilla: the cross-entropy of taking it for real, which does not saturate.
    """
    return -at_least_fp32(logits) if adversary == "hinge" else jax.nn.softplus(-at_least_fp32(logits))


def input_gradients(judge: Callable[..., Array], *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    """Logits (b,) of a discriminator and their gradients by its inputs, each with the batch first.

    judge: (*inputs) -> logits (b,), each of which depends on its own example alone.
    """
    logits, back = jax.vjp(judge, *inputs)
    return logits, back(jnp.ones_like(logits))


@typed
def gradient_penalty(gradients: tuple[Float[Array, "b ..."], ...], power: float = 2.0) -> Float[Array, " b"]:
    """|g|^power of the gradient of each example, over all inputs together; computed in fp32.

    Half of it with power 2 at real images is R1 (Mescheder et al. 2018, arXiv:1801.04406, eq. 9); twice it with power 6
    at matching pairs of image and sentence is the matching-aware penalty (Tao et al. 2022, arXiv:2008.05865, eq. 2).
    """
    squares = [jnp.sum(g.astype(jnp.float32) ** 2, tuple(range(1, g.ndim))) for g in gradients]
    return sum(squares, jnp.zeros(())) ** (power / 2)


@typed
def gaussian_kl(mean: Float[Array, "b k"], log_variance: Float[Array, "b k"]) -> Float[Array, " b"]:
    """Mean over components of KL(N(mean, variance) | N(0, 1)), of each example: conditioning augmentation (Zhang et al.
    2017, arXiv:1612.03242, eq. 2)."""
    return -jnp.mean(1 + log_variance - mean**2 - jnp.exp(log_variance), -1) / 2
