"""How long each stage may take, and how many steps that is."""

from __future__ import annotations

import time

from t2i_jax.fit.measure import StepRate
from t2i_jax.fit.plan import FitPlan
from t2i_jax.fit.recipes import TIMES, USUAL, Shape, choose_shape, largest_shape, pictures_of

CODEC = 0.5
"""Share of the codec in the time that is left when it begins: its images bound those of the model."""
LEAST = 0.2
"""Share of all time that the model trains for at least, where the stages before took longer than they should."""
LEAST_STEPS = 20
"""Steps that are made however little time there is."""
ENOUGH = {"ar": 2000, "masked": 5000, "diffusion": 20_000, "gan": 20_000}
"""Steps that are allowed however few pictures there are: codes are soon known by heart, noise is always new."""
CODEC_ENOUGH = 3000


class Clock:
    """The time of a fit in seconds: all of it, and what is spent, in earlier calls too."""

    def __init__(self, seconds: float, before: float = 0.0):
        self.seconds, self.before, self.began = seconds, before, time.monotonic()

    @property
    def spent(self) -> float:
        return self.before + time.monotonic() - self.began

    @property
    def left(self) -> float:
        """What is left for training: some is kept for the release and the samples."""
        kept = max(0.05 * self.seconds, min(60.0, 0.25 * self.seconds))
        return max(self.seconds - kept - self.spent, 0.0)


def _bounded(steps: int, plan: FitPlan, enough: int) -> int:
    pictures, batch = len(plan.look.usable), pictures_of(plan).batch_size
    return max(LEAST_STEPS, min(steps, max(enough, TIMES * pictures // batch)))


def codec_length(rate: StepRate, clock: Clock, plan: FitPlan) -> tuple[int, int]:
    """Steps of the codec, and its channels. rate: with 32 channels."""
    steps = rate.steps(CODEC * clock.left)
    if steps < 250:  # a quarter of the work
        return _bounded(3 * steps, plan, CODEC_ENOUGH), 16
    wide = steps > 4 * CODEC_ENOUGH and largest_shape(len(plan.look.usable)) != USUAL
    return _bounded(steps // 4 if wide else steps, plan, CODEC_ENOUGH), 64 if wide else 32


def model_length(rate: StepRate, clock: Clock, plan: FitPlan) -> tuple[int, Shape]:
    """Steps of the model, and its size. rate: of the usual size.

    The first preview is compiled besides the step, and takes about as long.
    """
    seconds = max(clock.left - rate.first, LEAST * clock.seconds + rate.first)
    steps = rate.steps(seconds)
    if plan.base is not None:
        return _bounded(steps, plan, ENOUGH[plan.family]), USUAL
    shape = choose_shape(steps, len(plan.look.usable))
    return _bounded(int(steps * USUAL.cost / shape.cost), plan, ENOUGH[plan.family]), shape
