"""How fast an experiment trains on this machine: a few steps on its own data, timed."""

from __future__ import annotations

import contextlib
import tempfile
import time
from typing import NamedTuple

import jax

from t2i_jax.training.experiment import Experiment
from t2i_jax.training.trainer import Trainer


class StepRate(NamedTuple):
    """Times of a run in seconds."""

    first: float
    """until the first step is done: weights, compilation, the first batch"""
    step: float

    def steps(self, seconds: float) -> int:
        """Steps in so many seconds, at least one."""
        return max(1, int((seconds - self.first) / self.step))


def measure(experiment: Experiment, least: int = 3, most: float = 10.0) -> StepRate:
    """The rate of an experiment: of `least` steps, or more in up to `most` seconds. Nothing of it is kept.

    Errors: those of a trainer and of its data.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(experiment, folder)
    with jax.set_mesh(trainer.mesh), contextlib.closing(trainer.batches(0)) as stream:
        state, done, first = trainer.start(trainer.begin()), 0, 0.0
        start = began
        for batch in stream:
            state, metrics = trainer.step(state, trainer.frozen, batch)
            jax.block_until_ready(metrics)
            now = time.perf_counter()
            if done == 0:
                first, start = now - began, now
            done += 1
            if done > 50 or (done > least and now - start > most):
                break
        seconds = (time.perf_counter() - start) / max(done - 1, 1)
    return StepRate(first, max(seconds, 1e-4))
