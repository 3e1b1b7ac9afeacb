"""A process that hangs or dies must not hold the others: each one sees to it that its own steps go on."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax

STATUS = 75
"""Exit status of a run that stopped for want of another process: what launchers start again."""


class PeerLost(RuntimeError):
    """What several processes do together failed, as it does when one of them is gone."""


@contextlib.contextmanager
def watchdog(limit: float, end: Callable[[int], None] = os._exit) -> Iterator[Callable[[str], None]]:
    """Gives a function to call with what was done last; where no call comes for `limit` seconds, the process ends.

    A thread waits for that, for the main thread stands in a collective which never ends. It says what was done last and
    where all threads stand, and calls `end(STATUS)`. Nothing is watched where `limit` is 0.
    """
    done, last, over = "the start", time.monotonic(), threading.Event()

    def beat(what: str) -> None:
        nonlocal done, last
        done, last = what, time.monotonic()

    def watch() -> None:
        while not over.wait(min(1.0, limit / 4)):
            if time.monotonic() - last > limit:
                who = f"process {jax.process_index()} of {jax.process_count()}"
                print(
                    f"{who}: nothing was finished for {limit:.0f} s since {done}: it hangs, or waits for one that "
                    "does. It stops here; the same command goes on from the last checkpoint. Its threads stand at:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=sys.__stderr__ or 2)
                end(STATUS)
                return

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    if limit > 0:
        thread.start()
    try:
        yield beat
    finally:
        over.set()


@contextlib.contextmanager
def raise_peer_lost(stack: contextlib.ExitStack | None = None) -> Iterator[None]:
    """Errors of the runtime among several processes become `PeerLost`, and what `stack` would close is left as it is:
    closing waits for the others, and they may be gone."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        if stack:
            stack.pop_all()
        who, reason = f"process {jax.process_index()} of {jax.process_count()}", " ".join(str(error).split())[:300]
        raise PeerLost(
            f"{who}: what it does with others failed, as it does when one of them is gone; the same command goes on "
            f"where it was saved last. {reason}"
        ) from error
