"""The objectives of a model in a run: the parameters, optimizer and steps of each, and their order within a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax
from flax import nnx
from jax import Array

from t2i_jax.core.config import ConfigError
from t2i_jax.core.jaxprs import used_inputs
from t2i_jax.core.narrow import shares_forward
from t2i_jax.core.params import Named, within
from t2i_jax.core.types import AnySize, LossOutput, Objective, Trainable

Objectives = Mapping[str, Objective]
Forward = Callable[[nnx.Module, Mapping[str, object], Array, Array, bool], object]
"""`core.types.SharesForward.forward`"""


def under(paths: tuple[str, ...], variables: Named) -> Named:
    """The variables whose dotted names begin with one of the paths; () is all of them."""
    if not paths:
        return dict(variables)
    return {k: v for k, v in variables.items() if any(within(p, k) for p in paths)}


def of_sizes(
    objectives: Objectives,
    own: Trainable,
    sizes: Mapping[tuple[int, int], AnySize],
    plain: Callable[[nnx.Module], nnx.Module],
) -> Objectives:
    """The same objectives of the model `own`, whose loss is that of the model for the grid of the batch, of `sizes`.

    It is chosen while a step is traced: a program is compiled for each grid. plain: makes a model without adapters.
    """
    if not sizes:
        return objectives

    def loss_of(name: str) -> Callable[..., LossOutput]:
        def loss(model: nnx.Module, batch: Mapping[str, Array], key: Array, step: Array, train: bool) -> LossOutput:
            samples = batch["codes"] if "codes" in batch else batch["image"]
            family = sizes[samples.shape[1], samples.shape[2]]
            there = model if family == own else family.adopt(plain(model))
            return family.objectives()[name].loss(there, batch, key, step, train)

        return loss

    return {name: dataclasses.replace(o, loss=loss_of(name)) for name, o in objectives.items()}


def check_paths(what: str, paths: tuple[str, ...], params: Named) -> None:
    """Errors: `ConfigError` for a path without parameters."""
    for path in paths:
        if not under((path,), params):
            known = ", ".join(sorted({k.split(".")[0] for k in params}))
            raise ConfigError(f"{what}: the model has no parameters under '{path}', only under {known}")


def optimizer_name(objectives: Objectives, name: str) -> str:
    """Name of the optimizer that updates an objective's parameters."""
    return objectives[name].optimizer or name


def by_optimizer(objectives: Objectives) -> dict[str, list[Objective]]:
    """The objectives of each optimizer, by its name."""
    found: dict[str, list[Objective]] = {}
    for name, objective in objectives.items():
        found.setdefault(optimizer_name(objectives, name), []).append(objective)
    return found


def check_objectives(objectives: Objectives, params: Named) -> None:
    """Errors: `ConfigError` for invalid objectives.

    Those are objectives with unknown parameters, with other parameters than their optimizer, or with an impossible
    order.
    """
    for name, objective in objectives.items():
        if objective.every < 1:
            raise ConfigError(f"objective '{name}': every {objective.every}, it is 1 or more")
        check_paths(f"objective '{name}'", objective.params, params)
    for name, several in by_optimizer(objectives).items():
        if len({tuple(under(o.params, params)) for o in several}) > 1:
            raise ConfigError(f"objectives that share the optimizer '{name}' must have the same params")
    stages(objectives)


def without(frozen: tuple[str, ...], objectives: Objectives, params: Named) -> dict[str, Objective]:
    """The objectives with the names of all their parameters but those under the paths of `frozen`.

    Errors: `ConfigError` for an objective that has no other ones.
    """
    fixed = under(frozen, params) if frozen else {}
    found = {}
    for name, objective in objectives.items():
        paths = tuple(k for k in under(objective.params, params) if k not in fixed)
        if not paths:
            raise ConfigError(f"train.frozen: it leaves the objective '{name}' no parameters to train")
        found[name] = dataclasses.replace(objective, params=paths) if frozen else objective
    return found


def stages(objectives: Objectives) -> list[list[str]]:
    """Names of objectives by stage: gradients of a stage are taken at the same model, `after` names earlier stages.

    Errors: `ConfigError` if `after` names no objective, or forms a cycle.
    """
    for name, objective in objectives.items():
        for other in objective.after:
            if other not in objectives:
                raise ConfigError(f"objective '{name}': after '{other}', which is none of {', '.join(objectives)}")
    found: list[list[str]] = []
    rest = list(objectives)
    while rest:
        ready = [name for name in rest if not set(rest) & set(objectives[name].after)]
        if not ready:
            raise ConfigError(f"objectives {', '.join(rest)}: each is `after` another of them, so none can be first")
        found.append(ready)
        rest = [name for name in rest if name not in ready]
    return found


def updates(objectives: Iterable[Objective], steps: int) -> int:
    """Number of updates by the optimizer that these objectives share after `steps` steps."""
    return sum(max(steps // o.every - o.start // o.every, 0) for o in objectives)


def prefix(objectives: Objectives, name: str) -> str:
    """Prefix of the names of an objective's metrics."""
    return f"{name}/" if len(objectives) > 1 else ""


def forward_of(config: Trainable) -> Forward | None:
    """The forward pass that the objectives of a model share, or None."""
    return shares_forward(config).forward if config.capabilities.shared_forward else None


def read_params(forward: Callable[[Named], object], params: Named) -> Named:
    """The parameters that the outputs of a function depend on."""
    used = used_inputs(jax.make_jaxpr(forward)(params).jaxpr)
    return {k: params[k] for k, use in zip(sorted(params), used, strict=True) if use}


def losses(
    objectives: Objectives,
    forward: Forward | None,
    model: nnx.Module,
    batch: Mapping[str, object],
    key: Array,
    step: Array,
    train: bool,
) -> dict[str, LossOutput]:
    """Outputs of all objectives' losses at one model."""
    if forward is not None:
        batch = {**batch, "outputs": forward(model, batch, key, step, train)}
    return {name: o.loss(model, batch, key, step, train) for name, o in objectives.items()}
