"""A watchdog in each process: one that hangs or dies must not block the others."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax

from t2i_jax.core.errors import PeerLost as PeerLost

STATUS = 75
"""Exit status of a run that lost another process: launchers restart it."""


@contextlib.contextmanager
def watchdog(limit: float, end: Callable[[int], None] = os._exit) -> Iterator[Callable[[str], None]]:
    """Yields a function to call with the last thing done; without a call for `limit` seconds the process ends.

    A thread watches, as the main thread may be blocked in a collective. It prints the last thing done and the stacks of
    all threads, and calls `end(STATUS)`. A `limit` of 0 disables it.
    """
    done, last, over = "the start", time.monotonic(), threading.Event()

    def heartbeat(what: str) -> None:
        nonlocal done, last
        done, last = what, time.monotonic()

    def watch() -> None:
        while not over.wait(min(1.0, limit / 4)):
            if time.monotonic() - last > limit:
                who = f"process {jax.process_index()} of {jax.process_count()}"
                print(
                    f"{who}: nothing was finished for {limit:.0f} s since {done}: it hangs, or waits for one that "
                    "does. It stops here; the same command goes on from the last checkpoint. Its threads are at:",
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
        yield heartbeat
    finally:
        over.set()


@contextlib.contextmanager
def raise_peer_lost(stack: contextlib.ExitStack | None = None) -> Iterator[None]:
    """Errors of the runtime among several processes become `PeerLost`, and `stack` is not closed: closing waits for the
    others, and they may be gone."""
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
