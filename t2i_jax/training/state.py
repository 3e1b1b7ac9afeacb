"""The state of a run between two steps, as one pytree of named arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from t2i_jax.core.params import Named, named
from t2i_jax.nn.layers import ModelState
from t2i_jax.training.objectives import Objectives, by_optimizer, under
from t2i_jax.training.spikes import RunningNorms, start_norms


def params_of(model: nnx.Module) -> Named:
    """The trainable parameters."""
    return {k: v for k, v in named(model).items() if isinstance(v, nnx.Param)}


def carried_of(model: nnx.Module) -> Named:
    """The non-trainable state, which losses return updated."""
    return {k: v for k, v in named(model).items() if isinstance(v, ModelState)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters, their average, the optimizer states, and the number of the next step.

    The randomness of step n is `fold_in(key(seed), n)` and the data position is a count on the host, so neither is part
    of the state.
    """

    step: Array
    params: Named
    carried: Named
    ema: Named | None
    optimizer: dict[str, optax.OptState]  # one state per optimizer, by its name
    gradient_norms: RunningNorms | None = None  # if spikes are skipped

    def flat(self) -> dict[str, Array]:
        """All arrays by plain name: the content of a checkpoint."""
        leaves = jax.tree_util.tree_flatten_with_path(self)[0]
        clean = lambda path: jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        return {clean(path): leaf for path, leaf in leaves}

    def unflat(self, arrays: dict[str, Array]) -> TrainState:
        """A state of this structure that holds `arrays`."""
        return jax.tree.unflatten(jax.tree.structure(self), [arrays[name] for name in self.flat()])


def create(
    init: Callable[[Array], nnx.Module],
    objectives: Objectives,
    optimizers: Mapping[str, optax.GradientTransformation],
    key: Array,
    *,
    ema: tuple[str, ...] | None = None,
    spikes: bool = False,
) -> TrainState:
    """A fresh state; meant to be jitted with `out_shardings`.

    optimizers: by the names that objectives give them. ema: paths of the averaged parameters, () for all, None for
    none. spikes: keep the running mean of gradient norms.
    """
    model = init(key)
    params = params_of(model)
    moved = {name: under(several[0].params, params) for name, several in by_optimizer(objectives).items()}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        carried=carried_of(model),
        ema=None if ema is None else jax.tree.map(jnp.copy, under(ema, params)),
        optimizer={name: optimizers[name].init(mine) for name, mine in moved.items()},
        gradient_norms=start_norms(objectives) if spikes else None,
    )
