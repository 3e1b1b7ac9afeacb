"""Discrete diffusion: a Markov chain that replaces codes by random ones, by MASK, or by either, and its reverse.

There are K codes and MASK, whose id is K. One step keeps a code with probability a + b, changes it to each other code
with probability b, and masks it with probability c = 1 - a - K b; MASK stays MASK (Gu et al. 2022, arXiv:2111.14822,
eq. 7). All steps commute with permutations of the codes, so q(x_t | x_0), and q(x_t | x_s) for any s < t, have the same
form with cumulative a, b, c (eq. 8), and no K x K matrix is needed. Austin et al. 2021 (D3PM) is the general theory:
c = 0 is its uniform chain, b = 0 its absorbing one, whose limit of many steps is the continuous-time bound at the end
of this file.

Distributions are log-probabilities (b, l, v), v = K + 1, in fp32. Schedules are computed in float64 on the host.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from t2i_jax.core.arrays import Float, Int, typed
from t2i_jax.core.fields import Checked, Range, Size
from t2i_jax.noise.categorical import draw as draw
from t2i_jax.noise.categorical import uniform

LOG_ZERO = math.log(1e-30)
"""Finite stand-in for log 0 in sums and differences."""
LOWEST = -70.0
"""Lower bound of log-probabilities, so that nearly impossible events have a finite loss."""


class ChainSchedule(NamedTuple):
    """Probabilities of a chain in float64: of one step (T,), and cumulative up to t (T + 1,), with t = -1, the clean
    tokens, last."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    alpha_bar: np.ndarray
    beta_bar: np.ndarray
    gamma_bar: np.ndarray

    @classmethod
    def of(cls, alpha_bar: np.ndarray, gamma_bar: np.ndarray, codes: int) -> ChainSchedule:
        """The schedule whose tokens after step t are kept with probability alpha_bar[t] (not counting replacements by
        the same code) and masked with probability gamma_bar[t]: any two sequences (T,), one falling and one rising.

        Errors: ValueError where they are not monotonic, or add up to more than 1.
        """
        alpha_bar, gamma_bar = np.concatenate([[1.0], alpha_bar]), np.concatenate([[0.0], gamma_bar])
        if (alpha_bar <= 0).any() or (np.diff(alpha_bar) > 0).any():
            raise ValueError("alpha_bar: probabilities above 0 that never rise")
        if (gamma_bar >= 1).any() or (np.diff(gamma_bar) < 0).any():
            raise ValueError("gamma_bar: probabilities below 1 that never fall")
        a, c = alpha_bar[1:] / alpha_bar[:-1], 1 - (1 - gamma_bar[1:]) / (1 - gamma_bar[:-1])
        roll = lambda x: np.roll(x, -1)  # the clean entry is the last
        # Rounding errors of an exact zero would become a probability of replacement.
        exact = lambda x: np.where(np.abs(x) < 1e-14, 0.0, x)
        step, beta_bar = exact(1 - a - c) / codes, exact(1 - alpha_bar - gamma_bar) / codes
        if (step < 0).any() or (beta_bar < 0).any():
            raise ValueError(
                "alpha_bar and gamma_bar add up to more than 1, or a step would have to undo a replacement"
            )
        return cls(a, step, c, roll(alpha_bar), roll(beta_bar), roll(gamma_bar))


class Tables(NamedTuple):
    """Cumulative log-probabilities (T + 1,) fp32, the last entry t = -1, in the form that jumps between any two times
    need."""

    log_alpha_bar: Array
    log_beta_bar: Array
    log_gamma_bar: Array
    unmasked: Array
    """log(1 - gamma_bar)"""
    rise: Array
    """beta_bar / alpha_bar divided by its last value: not a log; never falls"""
    height: Array
    """log of that last value, a scalar"""


class Rates(NamedTuple):
    """Logs of a, b, c and 1 - c for each row of a batch: (b, 1, 1)."""

    a: Array
    b: Array
    c: Array
    rest: Array


@dataclasses.dataclass(frozen=True)
class Chain(Checked):
    """A forward process: how codes are noised over T steps."""

    codes: Size = 1024
    """Number of codes K, without MASK."""
    steps: Size = 100
    """Number of steps T."""
    kind: Literal["mask and replace", "mask", "replace"] = "mask and replace"
    """Both; MASK alone, the absorbing chain; or random codes alone, the uniform chain."""
    shape: Literal["linear", "cosine"] = "linear"
    """How the probabilities go from their first to their last values: linearly, or as a sine, fast at first (Chang et
    al. 2022, MaskGIT: the share left to predict falls as a cosine)."""
    alpha_bar: Annotated[tuple[float, ...], Range(0, 1)] = (0.99999, 0.000009)
    """Probability of still being the clean code, after the first and the last step, or after each of the T steps.
    Ignored by kind `mask`, where it is 1 - gamma_bar."""
    gamma_bar: Annotated[tuple[float, ...], Range(0, 1)] = (0.000009, 0.99999)
    """Probability of being MASK, likewise. Ignored by kind `replace`, where it is 0."""

    def __post_init__(self):
        super().__post_init__()
        _ = self.schedule  # raises an error for impossible probabilities

    @cached_property
    def schedule(self) -> ChainSchedule:
        """The probabilities of every step."""
        alpha_bar, gamma_bar = self._course("alpha_bar", self.alpha_bar), self._course("gamma_bar", self.gamma_bar)
        if self.kind == "mask":
            alpha_bar = 1 - gamma_bar
        elif self.kind == "replace":
            gamma_bar = np.zeros_like(alpha_bar)
        return ChainSchedule.of(alpha_bar, gamma_bar, self.codes)

    def _course(self, field: str, given: tuple[float, ...]) -> np.ndarray:
        values = np.asarray(given, np.float64)
        if len(values) not in (2, self.steps):
            raise ValueError(
                f"{field}: {len(values)} values; there must be 2, the ends, or one for each of {self.steps}"
            )
        if len(values) == self.steps:
            return values
        u = np.arange(self.steps) / max(self.steps - 1, 1)
        bent = u if self.shape == "linear" else np.sin(np.pi / 2 * u)
        return bent * (values[1] - values[0]) + values[0]

    def tables(self) -> Tables:
        """The schedule as device arrays."""
        s = self.schedule
        with np.errstate(divide="ignore"):
            logs = [np.log(x) for x in (s.alpha_bar, s.beta_bar, s.gamma_bar)]
            rise = s.beta_bar / s.alpha_bar
            height = np.log(rise[-2])
        rise = rise / rise[-2] if rise[-2] else rise
        return Tables(*(jnp.asarray(x, jnp.float32) for x in (*logs, np.log1p(-s.gamma_bar), rise, height)))

    # -- the forward process; times are int (b,), -1 for the clean tokens

    @typed
    def cumulative_transition(self, t: Int[Array, " b"]) -> Rates:
        """The rates of q(x_t | x_0)."""
        x = self.tables()
        return Rates(
            *(table[t][:, None, None] for table in (x.log_alpha_bar, x.log_beta_bar, x.log_gamma_bar, x.unmasked))
        )

    @typed
    def between(self, s: Int[Array, " b"], t: Int[Array, " b"]) -> Rates:
        """The rates of q(x_t | x_s), s <= t, in a form whose terms do not cancel badly in fp32.

        In terms of the cumulative a_t, b_t, c_t: a = a_t / a_s, 1 - c = (1 - c_t) / (1 - c_s) and b = a_t (b_t / a_t -
        b_s / a_s) / (1 - c_s).
        """
        x = self.tables()
        rest = x.unmasked[t] - x.unmasked[s]
        b = x.log_alpha_bar[t] + x.height + jnp.log(jnp.maximum(x.rise[t] - x.rise[s], 0)) - x.unmasked[s]
        rates = (x.log_alpha_bar[t] - x.log_alpha_bar[s], b, jnp.log(-jnp.expm1(rest)), rest)
        return Rates(*(r[:, None, None] for r in rates))

    @typed
    def q_start(self, log_x0: Float[Array, "b l v"], t: Int[Array, " b"]) -> Float[Array, "b l v"]:
        """log q(x_t | x_0) for a distribution of x_0, or one-hot logs, without mass on MASK (eq. 8)."""
        return _moved(log_x0, self.cumulative_transition(t))

    @typed
    def q_step(
        self, log_x: Float[Array, "b l v"], t: Int[Array, " b"], published: bool = False
    ) -> Float[Array, "b l v"]:
        """log q(x_t | x_{t-1}) for a distribution of x_{t-1} (eq. 7).

        published: as in the authors' program, where a MASK turns into each code with probability b; rows of MASK then
        add up to more than 1. No result of theirs or of ours depends on those rows.
        """
        coded = jnp.zeros(()) if published else jax.nn.logsumexp(log_x[..., :-1], -1, keepdims=True)
        return _moved(log_x, self.between(t - 1, t), coded)

    @typed
    def q_sample(self, x0: Int[Array, "b l"], t: Int[Array, " b"], key: Array) -> Int[Array, "b l"]:
        """A sample x_t from q(x_t | x_0)."""
        x, where, what = self.tables(), *jax.random.split(key)
        u = uniform(where, x0.shape)
        at = lambda table: jnp.exp(table[t])[:, None]
        other = jax.random.randint(what, x0.shape, 0, self.codes)
        changed = jnp.where(u < at(x.log_gamma_bar), self.codes, other)
        # One number chooses between masked, replaced and kept, in that order.
        return jnp.where(u < at(x.log_gamma_bar) + self.codes * at(x.log_beta_bar), changed, x0)

    @typed
    def start(self, key: Array, shape: tuple[int, ...]) -> Int[Array, "..."]:
        """A sample from p(x_T), independent of x_0: MASK, random codes, or some of each."""
        x, where, what = self.tables(), *jax.random.split(key)
        masked = jnp.exp(x.log_gamma_bar[self.steps - 1]) / -jnp.expm1(x.log_alpha_bar[self.steps - 1])
        random = jax.random.randint(what, shape, 0, self.codes)
        # The chain without replacement ends in MASK only, despite rounding.
        mask = (uniform(where, shape) < masked) | (self.kind == "mask")
        return jnp.where(mask, self.codes, random)

    # -- the reverse process

    @typed
    def posterior(
        self,
        log_x0: Float[Array, "b l v"],
        x_t: Int[Array, "b l"],
        t: Int[Array, " b"],
        s: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b l v"]:
        """log p(x_s | x_t) = log sum_k q(x_s | x_t, x_0 = k) p(x_0 = k), s < t, by default t - 1.

        log_x0: p(x_0 = k | x_t), or one-hot logs for q(x_s | x_t, x_0). Bayes' rule in three steps
        (eq. 5 and 11): divide p(x_0) by q(x_t | x_0), noise the quotient up to s, multiply by q(x_t | x_s). Values are
        clipped to [LOWEST, 0].
        """
        s = t - 1 if s is None else s
        masked = (x_t == self.codes)[..., None]
        here = one_hot(x_t, self.codes + 1)
        far, near = self.cumulative_transition(t), self.between(s, t)
        given_start = jnp.where(masked, far.c, jnp.logaddexp(here[..., :-1] + far.a, far.b))
        given_s = jnp.where(masked, near.c, jnp.logaddexp(here[..., :-1] + near.a, near.b))
        given_s = jnp.concatenate([given_s, jnp.where(masked, 0.0, LOG_ZERO)], -1)
        quotient = log_x0[..., :-1] - given_start
        quotient = jnp.concatenate([quotient, jnp.full_like(quotient[..., :1], LOG_ZERO)], -1)
        total = jax.nn.logsumexp(quotient, -1, keepdims=True)
        back = self.q_start(quotient - total, s) + given_s + total
        # Without replacement, a visible code is the clean one, whatever p(x_0) is.
        return clipped(jnp.where(masked | (far.b > -jnp.inf), back, here))

    @typed
    def variational(
        self, log_x0: Float[Array, "b l v"], x0: Int[Array, "b l"], x_t: Int[Array, "b l"], t: Int[Array, " b"]
    ) -> tuple[Float[Array, "b l"], Float[Array, "b l"]]:
        """The terms of the variational bound per token, for a model's p(x_0 | x_t): L_t, and L_0 alone.

        L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and L_0 = -log p(x_0 | x_1) (eq. 6).
        """
        model = self.posterior(log_x0, x_t, t)
        true = self.posterior(one_hot(x0, self.codes + 1), x_t, t)
        decoded = -jnp.take_along_axis(model, x0[..., None], -1)[..., 0]
        divergence = jnp.sum(jnp.exp(true) * (true - model), -1)
        return jnp.where((t == 0)[:, None], decoded, divergence), decoded


def _moved(log_x: Array, rates: Rates, coded: Array | float = 0.0) -> Array:
    """One transition of a distribution whose mass on codes is exp(coded)."""
    codes = jnp.logaddexp(log_x[..., :-1] + rates.a, rates.b + coded)
    return jnp.concatenate([codes, jnp.logaddexp(log_x[..., -1:] + rates.rest, rates.c)], -1)


@typed
def one_hot(x: Int[Array, "*b"], classes: int) -> Float[Array, "*b {classes}"]:
    """Logs of one-hot distributions."""
    return jnp.where(x[..., None] == jnp.arange(classes), 0.0, LOG_ZERO)


@typed
def clipped(log_p: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Logs clipped to [LOWEST, 0]; gradients also pass at both ends, unlike those of `minimum`."""
    return jnp.where(log_p < LOWEST, LOWEST, jnp.where(log_p > 0, 0.0, log_p))


@typed
def gumbel(u: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Standard Gumbel noise from uniform numbers in [0, 1), which may be 0."""
    return -jnp.log(-jnp.log(u + 1e-30) + 1e-30)


@typed
def importance(history: Float[Array, " t"]) -> Float[Array, " t"]:
    """p(t) that samples times in proportion to their loss, from a running mean of L_t^2 (Nichol & Dhariwal 2021,
    eq. 18); t = 0, another kind of loss, gets the value of t = 1."""
    size = jnp.sqrt(history + 1e-10) + 1e-4
    size = size.at[0].set(size[1])
    return size / size.sum()


# -- the absorbing chain in continuous time
#
# For s near t the term is (m_t - m_s) / m_t times the cross-entropy of the masked tokens, with m the probability
# of being masked. Integrated over time (Sahoo et al. 2024, MDLM, eq. 10; Shi et al. 2024):
#     -log p(x) <= E_tau [ m'(tau) / m(tau) * sum over masked i of -log p(x_i | x_tau) ].
# The integral is over dm / m: the schedule determines only where it is sampled. It equals the expectation, over a
# uniform number n = 1 .. l of masked tokens, of l times the MEAN cross-entropy of the masked ones. This is what masked
# generation minimises, except for its distribution of n (cosine in Chang et al. 2022), and the likelihood of an
# autoregressive model averaged over all orders (Hoogeboom et al. 2022).


@typed
def masked_share(
    shape: Literal["linear", "cosine"], tau: Float[Array, "*b"]
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """m(tau) and m'(tau) / m(tau), the weight of the bound, for times tau in (0, 1]."""
    if shape == "linear":
        return tau, 1 / tau
    angle = math.pi / 2 * tau
    return jnp.sin(angle), math.pi / 2 / jnp.tan(angle)
