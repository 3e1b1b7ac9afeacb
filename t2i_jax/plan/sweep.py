"""Meshes, remat policies and batch sizes, ranked: all by arithmetic, the best by the compiler."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import jax

from t2i_jax.core.config import ConfigError
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.core.types import Trainable
from t2i_jax.plan.chips import Topology
from t2i_jax.plan.compiled import DoesNotFit, compile_plan, plan_by_shallow_copies
from t2i_jax.plan.estimate import estimate, trace
from t2i_jax.plan.ready import Batch, size_of
from t2i_jax.plan.report import Plan
from t2i_jax.training.experiment import Experiment

TENSOR = (1, 2, 4, 8)
OnResult = Callable[[str], None]


def meshes(chips: int, model: Trainable, slices: int = 1) -> Iterator[MeshConfig]:
    """Candidate meshes: tensor up to 8 where the heads can be divided, fsdp in powers of two, data the rest, which
    alone is split over slices."""
    heads = size_of(model, "heads")
    for tensor in TENSOR:
        if chips % tensor or (tensor > 1 and (not heads or heads % tensor)):
            continue
        fsdp = 1
        while fsdp <= chips // tensor // slices:
            if (chips // tensor) % (fsdp * slices) == 0:
                yield MeshConfig(chips // tensor // fsdp, fsdp, tensor)
            fsdp *= 2


def policies(model: Trainable) -> tuple[str, ...]:
    """The remat policies that a model has to choose from."""
    return ("none", *model.capabilities.remat)


def resized(batch: Batch, size: int) -> Batch:
    """The shapes of a batch of another size."""
    return {k: jax.ShapeDtypeStruct((size, *v.shape[1:]), v.dtype) for k, v in batch.items()}


def changed(experiment: Experiment, remat: str, size: int, mesh: MeshConfig | None = None) -> Experiment:
    """The experiment with another remat policy, batch size and mesh."""
    model = experiment.model.with_compute(dataclasses.replace(experiment.model.compute, remat=remat))
    data = dataclasses.replace(experiment.data, batch_size=size)
    return dataclasses.replace(experiment, model=model, data=data, mesh=mesh or experiment.mesh)


def sweep(
    experiment: Experiment,
    batch: Batch,
    topology: Topology,
    sizes: Sequence[int] = (),
    compiles: int = 3,
    on_progress: OnResult = lambda _: None,
    shallow: bool = False,
) -> list[Plan]:
    """Plans that fit, by images per second, compiled ones first. `compiles`: how many are compiled.

    sizes: batch sizes; the experiment's own, twice and four times it unless given. shallow: compile shallow
    copies of the model.
    Errors: `ConfigError` if none fits.
    """
    own = experiment.data.batch_size
    seen: list[tuple[Plan, Experiment, Batch]] = []
    for remat in policies(experiment.model):
        on_progress(f"counting the train step, remat '{remat}'")
        first = trace(changed(experiment, remat, own), batch)  # all that is counted grows with the batch
        for size in sizes or (own, 2 * own, 4 * own):
            here, now = changed(experiment, remat, size), resized(batch, size)
            traced = first.times(size / own)
            for mesh in meshes(topology.size, experiment.model, topology.slices):
                if size % (mesh.data * mesh.fsdp * experiment.train.accumulate):
                    continue
                axes = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
                plan = estimate(here, traced, topology, axes)
                seen.append((plan, changed(experiment, remat, size, mesh), now))
    seen.sort(key=lambda x: (not x[0].fits, -x[0].batch * x[0].steps_per_second, x[0].network_seconds))
    best: list[Plan] = []
    make = plan_by_shallow_copies if shallow else compile_plan
    if topology.compiled:
        # Arithmetic is rough: plans a little above the memory are tried too.
        near = turns([x for x in seen if x[0].peak < 1.3 * x[0].capacity])
        for plan, here, now in near[: 3 * compiles]:
            if len(best) == compiles:
                break
            on_progress(f"compiling {plan.mesh}, remat '{plan.remat}', batch {plan.batch}")
            try:
                made = make(here, now, topology)
            except DoesNotFit:
                on_progress("it does not fit")
                continue
            if made.fits:
                best.append(made)
        best.sort(key=lambda p: -p.batch * p.steps_per_second)
    done = {(tuple(p.mesh.items()), p.batch, p.remat) for p in best}
    rest = [p for p, *_ in seen if p.fits and (tuple(p.mesh.items()), p.batch, p.remat) not in done]
    if not best and not rest:
        least = min((p for p, *_ in seen), key=lambda p: p.peak / p.capacity, default=None)
        hint = f"; the nearest needs {least.peak / least.capacity:.0%} of the memory: {least.mesh}" if least else ""
        raise ConfigError(f"--sweep: nothing fits {topology}{hint}")
    return best + rest


def turns(ranked: list[tuple[Plan, Experiment, Batch]]) -> list[tuple[Plan, Experiment, Batch]]:
    """The best of each batch size and policy first, then the second best of each: where arithmetic errs, as on what a
    larger batch does to memory, it errs for all meshes alike."""
    before: Counter[tuple[int, str]] = Counter()
    rank = []
    for plan, *_ in ranked:
        rank.append(before[plan.batch, plan.remat])
        before[plan.batch, plan.remat] += 1
    return [ranked[i] for i in sorted(range(len(ranked)), key=rank.__getitem__)]
