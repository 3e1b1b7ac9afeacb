"""The command `t2i` on devices of the CPU that lie in the mesh as those of a TPU slice do.

    PYTHONPATH=. python tests/slice_command.py "v5e:4x4 4,4,1" train CONFIG --run RUN

The layout is one of `tpu_layouts.layouts()`, or "" for that of the CPU. `train` leaves the gradients of a first step in
gradients.npz of a new run.
"""

import collections
import sys
from pathlib import Path

import jax
import numpy as np
from tpu_layouts import layouts

from t2i_jax.cli import main
from t2i_jax.core.params import rebuild
from t2i_jax.core.sharding import MeshConfig, to_host
from t2i_jax.training.loop import Trainer
from t2i_jax.training.step import loss_inputs, step_keys

start, plain = Trainer.start, MeshConfig._placed


def laid(processes):
    """Lays meshes of all devices so that the process of each is the given one."""

    def place(self, sizes, devices):
        if len(devices) != len(processes):  # a mesh of one process
            return plain(self, sizes, devices)
        own = collections.defaultdict(list)
        for device in devices:
            own[device.process_index].append(device)
        return np.array([own[process].pop(0) for process in processes]).reshape(sizes)

    return place


def started(self):
    """The state before the first step, whose gradients are written."""
    state, batch = start(self), next(self.batches(0))
    (objective,) = self.objectives.values()

    @jax.jit
    def gradients(state, frozen, batch):
        key, draw = step_keys(self.experiment.train.seed, state.step)
        ready = self.prepare(frozen, batch, draw) | loss_inputs(frozen)
        model = lambda params: rebuild(self.abstract, {**params, **state.carried})
        return jax.grad(lambda params: objective.loss(model(params), ready, key, state.step, True).loss)(state.params)

    found = {name: to_host(v[...]) for name, v in gradients(state, self.frozen, batch).items()}
    if jax.process_index() == 0:
        np.savez(Path(self.folder) / "gradients.npz", **found)
    return state


if __name__ == "__main__":
    Trainer.start = started
    if sys.argv[1]:
        MeshConfig._placed = laid(layouts()[sys.argv[1]])
    main(sys.argv[2:])
