"""Reports of NaN and infinity: the step, the layer, the line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import checkify
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t2i_jax.core.console import console
from t2i_jax.core.errors import NotFinite as NotFinite
from t2i_jax.core.params import Named, rebuild
from t2i_jax.training.objectives import losses
from t2i_jax.training.optimizer import rank
from t2i_jax.training.state import TrainState
from t2i_jax.training.step import Metrics, base_of, loss_inputs, step_keys

if TYPE_CHECKING:
    from t2i_jax.training.trainer import Trainer

NAMED = 8
"""Arrays that a message names."""


class Guard:
    """Looks at each step's metrics, in order, for steps that changed nothing: they are counted and logged, and too many
    end the run. skipped: such steps before."""

    def __init__(self, trainer: Trainer, skipped: int = 0):
        self.trainer, self.skipped, self.row = trainer, skipped, 0

    def look(self, step: int, metrics: Metrics, state: TrainState, position: int) -> bool:
        """Whether a step changed nothing: a call of all processes.

        state: the newest one. position: where the step's batch begins in the data. Errors: `NotFinite` where it is one
        more in a row than `train.tolerate`, where the state itself is not finite, and so all later steps, and where
        the run ends without a finite one.
        """
        train, finite, spike = self.trainer.experiment.train, bool(metrics["finite"]), bool(metrics["spike"])
        self.row = 0 if finite else self.row + 1
        broken = [] if finite else not_finite(self.trainer, state)
        if broken or self.row > train.tolerate or self.row == step == train.steps:
            norms = jax.device_get(metrics["norms"])
            raise NotFinite(nan_report(self.trainer, state, step, position, norms, self.row, broken))
        if finite and not spike:
            return False
        self.skipped += 1
        norms = ", ".join(f"{k} {float(v):.4g}" for k, v in metrics.items() if k.endswith("gradient_norm"))
        why = (
            f"{norms}, over {train.spike:g} times the running mean" if spike else "the loss or a gradient is not finite"
        )
        in_row = "" if spike else f", {self.row} in a row of at most {train.tolerate}"
        if jax.process_index() == 0:
            message = f"step {step}: {why}; it changes nothing ({self.skipped} such steps in all{in_row})"
            console.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)
        return True


def nan_report(
    trainer: Trainer,
    state: TrainState,
    step: int,
    position: int,
    norms: Mapping[str, np.ndarray],
    row: int,
    broken: list[str],
) -> str:
    """One line about a step that was not finite: a call of all processes, each gets the same.

    state: what the step left unchanged. position: where its batch begins in the data. norms: squared norm of the
    gradient by parameter, as the step's metrics have it. row: steps in a row that were not finite. broken: arrays of
    the state that are not.
    """
    before = f", nor are those of the {row - 1} steps before it" if row > 1 else ""
    messages = [f"step {step}: the loss or a gradient is not finite{before}; none of that changed the run"]
    bad = names_of({name: ~np.isfinite(v) for name, v in norms.items()})
    if broken:
        messages.append("arrays of the run that are not finite: " + shortened(broken))
    if bad:
        everywhere = len(bad) == sum(max(v.size, 1) for v in norms.values())
        messages.append("gradients that are not finite: " + ("all of them" if everywhere else shortened(bad)))
    if not broken:
        messages.append("first operation that made one: " + first_operation(trainer, state, step, position))
    messages.append("usual cures: a lower optimizer.learning_rate, a longer warmup, optimizer.clip, qk_norm, z_loss")
    if not broken:
        messages.append("train.tolerate is how many such steps in a row are passed over")
    return "; ".join(messages)


def not_finite(trainer: Trainer, state: TrainState) -> list[str]:
    """The arrays of a state that are not finite, parameters first and by layer: a call of all processes.

    Each device looks at its own part; only a bit for each array and layer reaches a host.
    """
    rest = {k: v for k, v in state.flat().items() if not k.startswith("params/")}

    def flags(params: Named, rest: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        stacked = lambda v: jnp.any(~jnp.isfinite(v[...]), axis=tuple(range(v.ndim - rank(v), v.ndim)))
        return {k: stacked(v) for k, v in params.items()}, {k: jnp.any(~jnp.isfinite(x)) for k, x in rest.items()}

    found = jax.device_get(jax.jit(flags, out_shardings=NamedSharding(trainer.mesh, P()))(state.params, rest))
    return [name for part in found for name in names_of(part)]


def names_of(flags: Mapping[str, np.ndarray]) -> list[str]:
    """The names whose flag is set, with the layer where a name has one flag for each layer of a stack."""
    each = ((k, v, i) for k, v in flags.items() for i in np.flatnonzero(v))
    return [f"{k}[layer {i}]" if np.ndim(v) else k for k, v, i in each]


def shortened(names: list[str]) -> str:
    """The first `NAMED` names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def first_operation(trainer: Trainer, state: TrainState, step: int, position: int) -> str:
    """Repeat the forward pass of a step with every operation checked; the first that made a NaN, and its line."""
    batch = next(trainer.batches(position))
    key, draw = step_keys(trainer.experiment.train.seed, step - 1)

    def forward(state, frozen, batch):
        model = rebuild(trainer.abstract, {**base_of(frozen), **state.params, **state.carried})
        batch = trainer.prepare(frozen, batch, draw) | loss_inputs(frozen)
        found = losses(trainer.objectives, trainer.forward, model, batch, key, state.step, True)
        return [output.loss for output in found.values()]

    try:
        checked = checkify.checkify(forward, errors=checkify.nan_checks)
        # Replicated: parts on other processes could not be read.
        error, _ = jax.jit(checked, out_shardings=NamedSharding(trainer.mesh, P()))(state, trainer.frozen, batch)
        return " ".join((error.get() or "none in the forward pass: it overflowed, or arose in the gradient").split())
    except Exception as failure:  # a failed diagnosis must not hide the error
        return f"not found ({type(failure).__name__})"
