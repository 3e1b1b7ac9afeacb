"""The one train step of the project: the gradient of every objective at the same model, then all updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.keys import apart, seed_key
from t2i_jax.core.types import LossOutput, Objective
from t2i_jax.nn.trees import Named, rebuild
from t2i_jax.training.spikes import find_spike
from t2i_jax.training.state import TrainState, carried_of

Metrics = dict[str, Array]


def params_under(objective: Objective, variables: Named) -> Named:
    """The variables under the attributes that an objective trains."""
    if not objective.params:
        return variables
    return {k: v for k, v in variables.items() if k.split(".")[0] in objective.params}


def make_step(
    abstract: Any,
    objectives: Mapping[str, Objective],
    optimizers: Mapping[str, optax.GradientTransformation],
    prepare: Callable[[Any, dict[str, Array], Array], dict[str, Array]] = lambda frozen, batch, key: batch,
    *,
    seed: int = 0,
    accumulate: int = 1,
    ema: float = 0.0,
    spike: float = 0.0,
) -> Callable[[TrainState, Any, dict[str, Array]], tuple[TrainState, Metrics]]:
    """A pure function (state, frozen, batch) -> (state, metrics), to be jitted with the state donated.

    abstract: the model with abstract leaves, which lends its structure.
    prepare: (frozen models, batch, key) -> batch, what is computed without gradient first: codes, text features.
    accumulate: the batch is cut into so many parts, seen one after the other, before one update.
    ema: decay of the parameters' average; `a <- ema a + (1 - ema) p`, with the usual ramp `(1 + n) / (10 + n)`.
    spike: a gradient norm more than so many times its running mean is a spike; 0: none is.

    A step whose loss or gradients are not finite changes nothing but the step count, nor does a spike but for that and
    the running mean; metrics say so (`finite`, `spike`) and hold the squared gradient norm per parameter and layer
    under `norms`.
    """

    def gradients(state: TrainState, carried: Named, frozen, batch, key):
        """Per objective: gradients by name, metrics; and the carried values after this batch."""
        batch = batch | loss_inputs(frozen)
        grads, metrics, after = {}, {}, dict(carried)
        for name, objective in objectives.items():

            def loss(mine: Named, objective=objective) -> tuple[Array, LossOutput]:
                model = rebuild(abstract, {**state.params, **mine, **carried})
                output = objective.loss(model, batch, key, state.step, True)
                return output.loss, output

            (_, output), grads[name] = jax.value_and_grad(loss, has_aux=True)(params_under(objective, state.params))
            prefix = f"{name}/" if len(objectives) > 1 else ""
            metrics |= {f"{prefix}loss": output.loss} | {f"{prefix}{k}": v for k, v in output.metrics.items()}
            if output.state is not None:
                fresh = carried_of(output.state)
                after |= {k: fresh[k] for k in params_under(objective, carried)}
        return grads, metrics, jax.lax.stop_gradient(after)

    def accumulated(state: TrainState, frozen, batch, key):
        if accumulate == 1:
            return gradients(state, state.carried, frozen, batch, key)
        # Strided parts: each holds examples of every device, so cutting moves nothing between them.
        parts = jax.tree.map(lambda x: rearrange(x, "(b a) ... -> a b ...", a=accumulate), batch)

        def part(carry, xs):
            carried, total = carry
            grads, metrics, carried = gradients(state, carried, frozen, *xs)
            return (carried, jax.tree.map(jnp.add, total, grads)), metrics

        zeros = {name: jax.tree.map(jnp.zeros_like, params_under(o, state.params)) for name, o in objectives.items()}
        (carried, grads), metrics = jax.lax.scan(
            part, (state.carried, zeros), (parts, jax.random.split(key, accumulate))
        )
        mean = lambda tree: jax.tree.map(lambda x: x / accumulate, tree)
        return mean(grads), jax.tree.map(lambda m: m.mean(0), metrics), carried

    def step(state: TrainState, frozen: Any, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
        key, draw = step_keys(seed, state.step)
        grads, metrics, carried = accumulated(state, frozen, prepare(frozen, batch, draw), key)

        params, optimizer, norms, running, spikes = dict(state.params), {}, {}, {}, [jnp.zeros((), bool)]
        for name, objective in objectives.items():
            squares = {k: squared_norm(g) for k, g in grads[name].items()}
            before = params_under(objective, state.params), state.optimizer[name]
            updates, after = optimizers[name].update(grads[name], before[1], before[0])
            moved = optax.apply_updates(before[0], updates), after
            if objective.start:
                started = state.step >= objective.start
                moved = jax.tree.map(lambda new, old, started=started: jnp.where(started, new, old), moved, before)
            params |= cast(Named, moved[0])
            optimizer[name] = moved[1]
            prefix = f"{name}/" if len(objectives) > 1 else ""
            metrics[f"{prefix}gradient_norm"] = norm = jnp.sqrt(sum(jnp.sum(s) for s in squares.values()))
            if state.gradient_norms is not None:
                learns = state.step >= objective.start
                found, running[name] = find_spike(state.gradient_norms[name], norm, spike, learns)
                spikes.append(found)
            norms |= squares

        losses = [v for k, v in metrics.items() if k.split("/")[-1] in ("loss", "gradient_norm")]
        finite = jnp.all(jnp.isfinite(jnp.stack([jnp.asarray(v, jnp.float32) for v in losses])))
        average = state.ema
        if average is not None:
            decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))
            average = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)
        skipped = jnp.any(jnp.stack(spikes))
        keep = lambda yes, new, old: jax.tree.map(lambda a, b: jnp.where(yes, a, b), new, old)
        moved = TrainState(state.step, params, carried, average, optimizer, state.gradient_norms)
        kept = dataclasses.replace(keep(finite & ~skipped, moved, state), step=state.step + 1)
        if state.gradient_norms is not None:
            kept = dataclasses.replace(kept, gradient_norms=keep(finite, running, state.gradient_norms))
        return kept, metrics | {"finite": finite, "spike": finite & skipped, "norms": norms}

    return step


def step_keys(seed: int, step: Array | int) -> tuple[Array, Array]:
    """The key of a step's losses, and that of what `prepare` draws."""
    key = jax.random.fold_in(seed_key(seed), step)
    return key, apart(key)


def loss_inputs(frozen: Any) -> dict[str, Any]:
    """What a loss itself reads and nothing trains (a perceptual network), as it finds it in the batch."""
    return {"frozen": frozen["loss"]} if frozen and frozen.get("loss") is not None else {}


def squared_norm(gradient: nnx.Variable) -> Array:
    """Sum of squares of one parameter's gradient, kept apart for the layers of a stack."""
    rank = len(gradient.get_metadata().get("axes", gradient.shape))
    x = gradient[...].astype(jnp.float32)
    return jnp.sum(x * x, axis=tuple(range(x.ndim - rank, x.ndim)))
