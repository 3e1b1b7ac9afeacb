"""The reverse of a discrete chain, from its end to the clean codes, as one loop that compiles once.

Steps, jumps and rules are traced numbers; the caller provides the randomness.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from t2i_jax.core.arrays import Float, Int, typed
from t2i_jax.noise.categorical import draw
from t2i_jax.noise.discrete import Chain, gumbel
from t2i_jax.sampling.options import DiscreteSampler


@typed
def reverse(
    chain: Chain,
    guess: Callable[[Array, Array, Array], Array],
    x: Int[Array, "b l"],
    noise: Callable[[Array], tuple[Array, Array]],
    options: DiscreteSampler,
    stay: Callable[[Array], Array] = lambda x: x,
    report: Callable[..., None] = lambda *_: None,
    draw_code: Callable[[Array, Array], Array] = draw,
) -> Int[Array, "b l"]:
    """Sample clean codes from x at the end of the chain.

    guess: (x_t, t, share of the steps done) -> log p(x_0 | x_t) (b, l, K + 1), guided and truncated.
    noise: step index -> numbers (b, l, 2) from `categorical.uniform` for the codes, and uniform ones (b, l) for the
        choice of positions.
    stay: restores the known codes after each step.
    report: traced after each step with its number from 1, the total, x and log p(x_0).
    draw_code: samples int (b, l) from log-probabilities (b, l, K + 1) and the first numbers of `noise`.
    """
    options, b = options.arrays(), x.shape[0]
    count, times_at = timesteps(chain.steps, options)
    row = lambda number: jnp.broadcast_to(number, (b,))

    def step(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        i, x = carry
        t, late, s = times_at(i)
        log_x0 = guess(x, row(jnp.maximum(t, 0)), i / count)
        codes, places = noise(i)

        def by_posterior() -> Array:
            back = draw_code(chain.posterior(log_x0, x, row(late), row(s)), codes)
            return jnp.where(s < late, back, x)  # with more evaluations than times, some do not move

        by_number = lambda: unmask_step(chain, log_x0, x, (i + 1) / count, codes, places, options)
        new = stay(jax.lax.cond((options.rule > 0) & (i + 1 < count), by_number, by_posterior))
        report(i + 1, count, new, log_x0)
        return i + 1, new

    _, x = jax.lax.while_loop(lambda carry: carry[0] < count, step, (jnp.int32(0), stay(x)))
    return jnp.minimum(x, chain.codes - 1)


@typed
def unmask_step(
    chain: Chain,
    log_x0: Float[Array, "b l v"],
    x: Int[Array, "b l"],
    u: Array,
    codes: Float[Array, "b l r"],
    places: Float[Array, "b l"],
    options: DiscreteSampler,
) -> Int[Array, "b l"]:
    """x after drawing, from p(x_0), the masked positions that are due after a share u of the steps.

    The authors tabulate their number for four T and 1024 tokens; this formula reproduces it for their schedule.
    """
    shares = jnp.exp(chain.tables().log_gamma_bar)
    place = chain.steps * (1 - u) - 1
    low = jnp.floor(place).astype(jnp.int32)  # -1 is the clean entry at the end
    share = shares[low] + (place - low) * (shares[low + 1] - shares[low])
    masked = x == chain.codes
    number = masked.sum(-1) - jnp.round(share * x.shape[1]).astype(jnp.int32)

    score = jnp.exp(log_x0.max(-1))
    score = jnp.where(options.rule == 2, score / score.max(-1, keepdims=True), 1.0)
    sharpness = jnp.where(options.rule == 2, options.purity * score, 0.0)
    drawn = draw((1 + sharpness)[..., None] * log_x0, codes)
    # The first positions by log score + Gumbel noise are a sample without replacement.
    order = jnp.where(masked, jnp.log(score) + gumbel(places), -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-order, -1), -1)
    return jnp.where(masked & (rank < number[:, None]), drawn, x)


def timesteps(total: int, options: DiscreteSampler) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """The number of steps, and a function from a step to (t, late, s): the network's time, and the jump of x from
    `late` to s."""
    steps = jnp.where(options.steps > 0, options.steps, total)
    n = jnp.maximum(options.stride, 1)
    strides = -(-(total - 1) // n) + 1

    def times_at(i: Array) -> tuple[Array, Array, Array]:
        t, s = total * (steps - i) // steps - 1, total * (steps - i - 1) // steps - 1
        t = jnp.where(i + 1 == steps, jnp.maximum(t, 0), t)  # the last step always leaves nothing masked
        seen = jnp.maximum(total - 1 - i * n, 0)
        late = jnp.where(seen > n - 1, seen - n + 1, seen)
        strided = options.stride > 0
        return jnp.where(strided, seen, t), jnp.where(strided, late, t), jnp.where(strided, late - 1, s)

    return jnp.where(options.stride > 0, strides, steps), times_at
