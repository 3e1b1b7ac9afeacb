"""The train step: in each stage, the gradients of its objectives at the same model, then their updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import chex
import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.config import ConfigError
from t2i_jax.core.frozen import Frozen
from t2i_jax.core.keys import apart, seed_key
from t2i_jax.core.params import Named, rebuild
from t2i_jax.core.types import LossOutput, Objective
from t2i_jax.nn.lora import with_masks
from t2i_jax.training.objectives import (
    Forward,
    Objectives,
    optimizer_name,
    prefix,
    read_params,
    stages,
    under,
)
from t2i_jax.training.spikes import find_spike
from t2i_jax.training.state import TrainState, carried_of

Metrics = dict[str, Array]
Prepare = Callable[[Frozen, dict[str, Array], Array], dict[str, Array]]


def make_step(
    abstract: nnx.Module,
    objectives: Objectives,
    optimizers: Mapping[str, optax.GradientTransformation],
    prepare: Prepare = lambda frozen, batch, key: batch,
    forward: Forward | None = None,
    *,
    seed: int = 0,
    accumulate: int = 1,
    ema: float = 0.0,
    spike: float = 0.0,
    fixed: tuple[str, ...] = (),
) -> Callable[[TrainState, Frozen, dict[str, Array]], tuple[TrainState, Metrics]]:
    """A pure function (state, frozen, batch) -> (state, metrics), to be jitted with the state donated.

    abstract: the model with abstract leaves, for its structure.
    optimizers: by the names that objectives give them.
    prepare: (frozen models, batch, key) -> batch, computed first and without gradient: codes, text features.
    forward: the forward pass that objectives share (`core.types.SharesForward`), computed once per stage.
    accumulate: number of parts that the batch is split into and processed in sequence, before one update.
    ema: decay of the parameter average; `a <- ema a + (1 - ema) p`, with the usual ramp `(1 + n) / (10 + n)`.
    spike: a gradient norm above this multiple of its running mean is a spike; 0: no detection.
    fixed: dotted names, or prefixes of names, of arrays of the model's state that losses may not replace.

    A step whose loss or gradients are not finite changes only the step count; a spike changes that and the running
    mean. Metrics report both (`finite`, `spike`) and hold the squared gradient norm per parameter and layer in `norms`.
    Metrics of an objective that is not due are 0. Errors, at trace time: `ConfigError` if two objectives write the same
    array of the model's state.
    """
    order = stages(objectives)

    def due(objective: Objective, step: Array) -> Array | bool:
        return (step + 1) % objective.every == 0 if objective.every > 1 else True

    def gradients(stage: Sequence[str], params: Named, carried: Named, step: Array, frozen, batch, key):
        """Per objective of a stage: gradients by name, metrics; and the model state after this batch."""
        batch, base = batch | loss_inputs(frozen), base_of(frozen)
        model = lambda mine: with_masks(rebuild(abstract, {**base, **params, **mine, **carried}), apart(key))
        grads, metrics, after = {}, {}, dict(carried)
        held = under(fixed, carried) if fixed else {}
        free = {k: v for k, v in carried.items() if k not in held}
        shared: Named = {}
        outputs, back = None, None
        if forward is not None:
            run = lambda mine: forward(model(mine), batch, key, step, True)
            trained = {k: v for name in stage for k, v in under(objectives[name].params, params).items()}
            shared = read_params(run, trained)
            outputs, back = jax.vjp(run, shared)

        for name in stage:
            objective = objectives[name]
            mine = under(objective.params, params)

            def loss(
                mine: Named, outputs: object, objective=objective, name=name
            ) -> tuple[Array, tuple[Metrics, Named]]:
                seen = batch if forward is None else batch | {"outputs": outputs}
                output = objective.loss(model(mine), seen, key, step, True)
                chex.assert_rank(output.loss, 0, custom_message=f"the loss of the objective '{name}'")
                return output.loss, ({"loss": output.loss, **output.metrics}, written(output, free))

            def gradient(mine=mine, loss=loss) -> tuple[Named, Metrics, Named]:
                if back is None or not mine.keys() & shared.keys():
                    value, pullback, (found, fresh) = jax.vjp(lambda p: loss(p, outputs), mine, has_aux=True)
                    return pullback(jnp.ones_like(value))[0], found, fresh
                value, pullback, (found, fresh) = jax.vjp(loss, mine, outputs, has_aux=True)
                own, through = pullback(jnp.ones_like(value))
                (through,) = back(through)
                own |= {k: optax.tree.add(own[k], through[k]) for k in mine.keys() & through.keys()}
                return own, found, fresh

            if objective.every > 1:
                shapes = jax.eval_shape(gradient)

                def nothing(shapes=shapes) -> tuple[Named, Metrics, Named]:
                    none, found = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[:2])
                    return none, found, {k: carried[k] for k in shapes[2]}

                grads[name], found, fresh = jax.lax.cond(due(objective, step), gradient, nothing)
            else:
                grads[name], found, fresh = gradient()
            metrics |= {f"{prefix(objectives, name)}{k}": v for k, v in found.items()}
            after |= fresh
            for k in fresh:
                if writers.setdefault(k, name) != name:
                    raise ConfigError(f"objectives '{writers[k]}' and '{name}' both write '{k}': only one of them may")
        return grads, metrics, jax.lax.stop_gradient(after)

    writers: dict[str, str] = {}

    def accumulated(stage: Sequence[str], params: Named, carried: Named, step: Array, frozen, batch, key):
        if accumulate == 1:
            return gradients(stage, params, carried, step, frozen, batch, key)
        # Strided parts: each holds examples of every device, so splitting moves no data between them.
        parts = jax.tree.map(lambda x: rearrange(x, "(b a) ... -> a b ...", a=accumulate), batch)

        def part(carry, xs):
            carried, total = carry
            grads, metrics, carried = gradients(stage, params, carried, step, frozen, *xs)
            return (carried, optax.tree.add(total, grads)), metrics

        zeros = {name: optax.tree.zeros_like(under(objectives[name].params, params)) for name in stage}
        (carried, grads), metrics = jax.lax.scan(part, (carried, zeros), (parts, jax.random.split(key, accumulate)))
        grads = jax.tree.map(lambda x: x / accumulate, grads)
        return grads, jax.tree.map(lambda m: m.mean(0), metrics), carried

    def step(state: TrainState, frozen: Frozen, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
        key, draw = step_keys(seed, state.step)
        batch = prepare(frozen, batch, draw)

        params, carried, optimizer = dict(state.params), state.carried, dict(state.optimizer)
        metrics: Metrics = {}
        norms, running, spikes, finite = {}, {}, jnp.zeros((), bool), jnp.ones((), bool)
        for stage in order:
            grads, found, carried = accumulated(stage, params, carried, state.step, frozen, batch, key)
            metrics |= found
            for name in stage:
                objective, whose, at = objectives[name], optimizer_name(objectives, name), prefix(objectives, name)
                squares = {k: squared_norm(g) for k, g in grads[name].items()}
                before = under(objective.params, params), optimizer[whose]
                updated, memory = optimizers[whose].update(grads[name], before[1], before[0])
                moved = optax.apply_updates(before[0], updated), memory
                learns = due(objective, state.step)
                if objective.start:
                    learns = learns & (state.step >= objective.start)
                if learns is not True:
                    moved = optax.tree.where(learns, moved, before)
                params |= cast(Named, moved[0])
                optimizer[whose] = moved[1]
                metrics[f"{at}gradient_norm"] = norm = jnp.sqrt(sum(jnp.sum(s) for s in squares.values()))
                finite &= jnp.isfinite(metrics[f"{at}loss"]) & jnp.isfinite(norm)
                if state.gradient_norms is not None:
                    spiked, running[name] = find_spike(state.gradient_norms[name], norm, spike, learns)
                    spikes |= spiked
                norms |= {k: s + norms[k] if k in norms else s for k, s in squares.items()}

        average = state.ema
        if average is not None:
            decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))
            # In this form an average that is equal to its parameter stays so, to the last bit.
            move = lambda a, p: a + (1 - decay) * (p - a)
            average = jax.tree.map(move, average, {k: params[k] for k in average})
        moved = TrainState(state.step, params, carried, average, optimizer, state.gradient_norms)
        kept = dataclasses.replace(optax.tree.where(finite & ~spikes, moved, state), step=state.step + 1)
        if state.gradient_norms is not None:
            kept = dataclasses.replace(kept, gradient_norms=optax.tree.where(finite, running, state.gradient_norms))
        return kept, metrics | {"finite": finite, "spike": finite & spikes, "norms": norms}

    return step


def written(output: LossOutput, carried: Named) -> Named:
    """The arrays of the model's state that a loss has replaced, given the old ones in `carried`."""
    if output.state is None:
        return {}
    after = carried_of(output.state)
    return {k: v.replace(after[k].get_value()) for k, v in carried.items() if after[k].get_value() is not v.get_value()}


def step_keys(seed: int, step: Array | int) -> tuple[Array, Array]:
    """The key of a step's losses, and that of `prepare`."""
    key = jax.random.fold_in(seed_key(seed), step)
    return key, apart(key)


def base_of(frozen: Frozen) -> Named:
    """The parameters that adapters leave as they are."""
    return cast(Named, frozen.get("base", {}) if frozen else {})


def loss_inputs(frozen: Frozen) -> dict[str, object]:
    """Frozen networks used only by the loss (a perceptual network), as batch entries."""
    return {"frozen": frozen["loss"]} if frozen and frozen.get("loss") is not None else {}


def squared_norm(gradient: nnx.Variable) -> Array:
    """Sum of squares of one parameter's gradient, separate for the layers of a stack."""
    rank = len(gradient.get_metadata().get("axes", gradient.shape))
    x = gradient[...].astype(jnp.float32)
    return jnp.sum(x * x, axis=tuple(range(x.ndim - rank, x.ndim)))
