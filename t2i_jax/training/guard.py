"""When numbers cease to be finite: which step, which layer, which line."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import checkify

from t2i_jax.nn.trees import rebuild
from t2i_jax.training.state import TrainState
from t2i_jax.training.step import held, step_keys


class NotFinite(ArithmeticError):
    """A loss or a gradient is NaN or infinite; the message names the step and the layer."""


def explain(trainer: Any, state: TrainState, step: int, norms: dict[str, np.ndarray]) -> str:
    """What can be said about a step that was not finite; `state` is the one it left unchanged."""
    lines = [f"step {step}: the loss or a gradient is not finite; parameters and checkpoints stay as they were before"]
    broken = [where for name, v in state.params.items() for where in not_finite(name, jax.device_get(v[...]), v)]
    bad = [f"{name}[layer {i}]" if v.ndim else name for name, v in norms.items() for i in bad_entries(v)]
    if broken:
        lines.append("parameters that are not finite: " + ", ".join(broken[:8]))
    if bad:
        everywhere = len(bad) == sum(max(v.size, 1) for v in norms.values())
        lines.append("gradients that are not finite: " + ("all of them" if everywhere else ", ".join(bad[:8])))
    if not broken:
        lines.append("first line that made one: " + first_line(trainer, state, step))
    lines.append("usual cures: a lower optimizer.learning_rate, a longer warmup, optimizer.clip, qk_norm, z_loss")
    return "\n  ".join(lines)


def not_finite(name: str, value: np.ndarray, variable: Any) -> list[str]:
    """Where a parameter is not finite: its name, with the layer where it is a stack of layers."""
    stack = value.ndim - len(variable.get_metadata().get("axes", value.shape))
    bad = ~np.isfinite(value.astype(np.float32))
    bad = bad.any(axis=tuple(range(stack, value.ndim)))
    return [f"{name}[layer {i}]" if bad.ndim else name for i in np.flatnonzero(bad)]


def bad_entries(squares: np.ndarray) -> np.ndarray:
    return np.flatnonzero(~np.isfinite(np.atleast_1d(squares)))


def first_line(trainer: Any, state: TrainState, step: int) -> str:
    """Repeat the forward pass of a step with every operation checked; the source line of the first NaN."""
    batch_size = trainer.experiment.data.batch_size
    batch = next(trainer.batches((step - 1) * batch_size))
    key, draw = step_keys(trainer.experiment.train.seed, step - 1)

    def forward(state, frozen, batch):
        model = rebuild(trainer.abstract, {**state.params, **state.carried})
        batch = trainer.prepare(frozen, batch, draw) | held(frozen)
        return [player.loss(model, batch, key, state.step, True)[0] for player in trainer.players.values()]

    try:
        error, _ = jax.jit(checkify.checkify(forward, errors=checkify.nan_checks))(state, trainer.frozen, batch)
        return (error.get() or "none in the forward pass: it overflowed, or arose in the gradient").strip()
    except Exception as failure:  # a diagnosis must not hide what it was asked about
        return f"not found ({type(failure).__name__})"
