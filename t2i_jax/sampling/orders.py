"""Orders in which the positions of an image are sampled.

An order is a permutation (L,) read from its end: the first `remaining` positions are still hidden, the others are
known, and a step reveals the positions between two values of `remaining` (Li et al. 2024, MAR). So one number per image
is the state of a sampler; positions known from the start are at the end.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Annotated, ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from t2i_jax.core.arrays import Bool, Float, Int, typed
from t2i_jax.core.fields import Checked, Finite, Positive, Range
from t2i_jax.noise.schedule import spread
from t2i_jax.sampling.options import MaskedSampler


def remaining(total: int, options: MaskedSampler) -> np.ndarray:
    """Tokens hidden after each step of a schedule, down to 0: int (n,)."""
    schedule = options.arrays()
    after = jax.jit(lambda i, now: schedule.remaining(i, jnp.asarray(total), now))
    now, found = jnp.asarray(total), []
    while now > 0:
        now = after(jnp.asarray(int(options.start) + len(found)), now)
        found.append(int(now))
    return np.asarray(found)


# -- orders


class TokenOrder(Protocol):
    """A frozen config of an order, or of a distribution of orders."""

    one_at_a_time: ClassVar[bool]
    """tokens are sampled one at a time, not in sets"""
    by_confidence: ClassVar[bool]
    """a set takes the tokens with the highest confidence; needs a head with probabilities"""
    fixed: ClassVar[bool]
    """the same for all images, regardless of known tokens: they cannot be read first"""

    def draw(self, key: Array, length: int) -> Array:
        """Sample a permutation int (L,), read from its end."""
        ...


@dataclasses.dataclass(frozen=True)
class Raster:
    """Raster order, token by token: rows from the top, each from the left."""

    one_at_a_time: ClassVar[bool] = True
    by_confidence: ClassVar[bool] = False
    fixed: ClassVar[bool] = True

    def draw(self, key: Array, length: int) -> Array:
        """Sample a permutation int (L,), read from its end."""
        return jnp.arange(length - 1, -1, -1)


@dataclasses.dataclass(frozen=True)
class Permutation:
    """A random permutation for each image, token by token."""

    one_at_a_time: ClassVar[bool] = True
    by_confidence: ClassVar[bool] = False
    fixed: ClassVar[bool] = False

    @typed
    def draw(self, key: Array, length: int) -> Int[Array, " {length}"]:
        return jnp.argsort(jax.random.uniform(key, (length,)))


@dataclasses.dataclass(frozen=True)
class Sets(Permutation):
    """A random permutation for each image, in growing sets (Li et al. 2024)."""

    one_at_a_time: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class Confidence(Sets):
    """Growing sets; each takes the tokens of highest confidence among all hidden ones (Chang et al. 2022).

    Needs a head that gives the probability of its samples.
    """

    by_confidence: ClassVar[bool] = True


Order = Raster | Permutation | Sets | Confidence


@typed
def with_known_last(orders: Int[Array, "b t"], known: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """Orders with the positions that `known` marks moved to the end, the others as they were."""
    moved = jnp.argsort(jnp.take_along_axis(known, orders, 1), axis=1, stable=True)
    return jnp.take_along_axis(orders, moved, 1)


@typed
def hidden_by(orders: Int[Array, "b t"], remaining: Int[Array, " b"]) -> Bool[Array, "b t"]:
    """Mask of the first `remaining` positions of each order."""
    return jnp.argsort(orders, axis=1) < remaining[:, None]


@typed
def by_confidence(
    orders: Int[Array, "b t"], remaining: Int[Array, " b"], score: Float[Array, "b t"]
) -> Int[Array, "b t"]:
    """Orders whose first `remaining` positions are sorted by their score, the most confident last.

    score: indexed by position.
    """
    place = jnp.arange(orders.shape[1])
    value = jnp.where(place < remaining[:, None], jnp.take_along_axis(score, orders, 1), jnp.inf)
    return jnp.take_along_axis(orders, jnp.argsort(value, axis=1, stable=True), 1)


# -- how many tokens are hidden in training


@dataclasses.dataclass(frozen=True)
class MaskRate(Checked):
    """The share of tokens that is hidden in training."""

    kind: Literal["normal", "cosine", "uniform"] = "normal"
    """normal: one truncated normal number per batch (MAR); cosine: cos(pi u / 2) for each image (MaskGIT); uniform: any
    number of tokens, for each image, as any order needs"""
    mean: Finite = 1.0
    std: Positive = 0.25
    low: Annotated[float, Range(low=0, below=1)] = 0.7
    """smallest share of `normal`; the largest is 1"""
    least: Annotated[float, Range(low=0, below=1)] = 0.0
    """smaller shares of `cosine` are raised to this one (0.5 in MaskGIT)"""

    def visible(self, length: int) -> int:
        """Maximum number of visible tokens."""
        low = {"normal": self.low, "cosine": self.least, "uniform": 0.0}[self.kind]
        return length - max(int(np.ceil(low * length)), 1)

    @typed
    def draw(self, key: Array, b: int, length: int, train: bool = True) -> Int[Array, " {b}"]:
        """Number of tokens to hide, 1 to L; outside of training, spread evenly over the distribution of
        rates."""
        u = spread(key, b, train)
        if self.kind == "normal":
            u = jax.random.uniform(key) if train else u
            low, high = (jax.scipy.special.ndtr((end - self.mean) / self.std) for end in (self.low, 1.0))
            rate = self.mean + self.std * jax.scipy.special.ndtri(low + u * (high - low))
            count = jnp.broadcast_to(jnp.ceil(rate * length), (b,))
        elif self.kind == "cosine":
            count = jnp.ceil(jnp.cos(jnp.pi / 2 * u) * length)
        else:
            count = 1 + jnp.floor(u * length)
        return jnp.clip(count, length - self.visible(length), length).astype(jnp.int32)


@typed
def orders_of(order: TokenOrder, keys: Array, length: int) -> Int[Array, "b {length}"]:
    """An order for each key."""
    return jax.vmap(partial(order.draw, length=length))(keys)
