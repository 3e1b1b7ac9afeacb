"""Progress of a sampling loop, reported from inside the compiled program.

    with listening(listener) as progress:
        samples = family.sample(model, condition, keys, progress=progress)

The program holds one callback for all calls, and gets the number of the call as an array: it is compiled once, and
threads that sample at the same time with the same program each hear of their own samples.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from t2i_jax.core.types import Progress as Progress

Listener = Callable[[int, int, np.ndarray], None]
"""Called on the host as (done, total, sample): steps done by this sampler, all steps, and the samples so far (b, *grid,
...), as in `SampleSpec`. A step is a token for samplers that go token by token. Calls may come out of order."""

_LISTENERS: dict[int, Listener] = {}
"""Listeners by the number of their call; only `listening` changes it."""
_CALLS = itertools.count()


@contextlib.contextmanager
def listening(listener: Listener | None) -> Iterator[Progress | None]:
    """A `Progress` that calls `listener`, None without one; at the end of the block all its calls have been made.

    The listener is called in another thread.
    """
    if listener is None:
        yield None
        return
    call = next(_CALLS)
    _LISTENERS[call] = listener
    try:
        yield Progress(np.int32(call))
        jax.effects_barrier()
    finally:
        del _LISTENERS[call]


def report(progress: Progress | None, done: Array, total: Array | int, sample: Array) -> None:
    """Report to `progress`, if given, after every sixteenth of the steps (every step if there are fewer), and after the
    last."""
    if progress is None:
        return
    due = done * 16 // total > (done - 1) * 16 // total
    call = progress.call
    jax.lax.cond(due, lambda: jax.debug.callback(_dispatch, call, done, jnp.int32(total), sample), lambda: None)


def _dispatch(call: Array, done: Array, total: Array, sample: Array) -> None:
    listener = _LISTENERS.get(int(call))
    if listener is not None:  # its block may have ended with an error
        listener(int(done), int(total), np.asarray(sample))


def known_so_far(codes: Array, known: Array) -> Array:
    """Codes (b, L, *code) as a listener gets them: -1 in the place of discrete ones that are not drawn yet.

    known: bool, (L,) or (b, L).
    """
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        return codes
    return jnp.where(known.reshape(known.shape + (1,) * (codes.ndim - 2)), codes, -1)
