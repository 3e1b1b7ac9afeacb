"""Twenty steps of every family and codec: the losses that a change of the code's form has to leave as they are.

`cd tests; python curves.py` writes `assets/curves.json` anew. That is for a change of the mathematics, and its commit
says which.
"""

import json
from pathlib import Path

import jax
import numpy as np
from families import CODECS, FAMILIES, batch_for

from t2i_jax.core.params import abstract
from t2i_jax.training.objectives import forward_of
from t2i_jax.training.optimizer import Optimizer
from t2i_jax.training.state import create
from t2i_jax.training.step import make_step

FILE = Path(__file__).parent / "assets" / "curves.json"
STEPS = 20
OPTIMIZER = Optimizer(learning_rate=1e-3, warmup=5, schedule="constant")


def curve(config):
    """The losses of a configuration at each step, by name: of four batches in turn, with gradients clipped and EMA."""
    objectives = config.objectives()
    optimizers = {name: OPTIMIZER.build(STEPS) for name in objectives}
    state = jax.jit(lambda key: create(config.init, objectives, optimizers, key, ema=()))(jax.random.key(0))
    step = make_step(abstract(config), objectives, optimizers, forward=forward_of(config), ema=0.9)
    step = jax.jit(step, donate_argnums=0)
    losses = {}
    for n in range(STEPS):
        state, metrics = step(state, {}, batch_for(config, seed=n % 4))
        for name in metrics:
            if name.split("/")[-1] == "loss":
                losses.setdefault(name, []).append(float(np.float32(metrics[name])))
    return losses


if __name__ == "__main__":
    import conftest as conftest  # the compiler's flags

    curves = {name: curve(config) for name, config in (CODECS | FAMILIES).items()}
    lines = [f'  "{n}/{k}": {json.dumps([round(x, 7) for x in v])}' for n, c in curves.items() for k, v in c.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
