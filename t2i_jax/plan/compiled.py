"""What a step needs according to the TPU compiler, for a topology without its hardware."""

from __future__ import annotations

import dataclasses
import tempfile
import time
import warnings
from pathlib import Path

import jax

from t2i_jax.core.config import ConfigError
from t2i_jax.core.fields import values
from t2i_jax.core.jaxprs import UnknownForm
from t2i_jax.core.sharding import MESH_AXES
from t2i_jax.core.types import Trainable
from t2i_jax.plan import hlo
from t2i_jax.plan.chips import BACKWARD, REACHED, WIRE, Topology
from t2i_jax.plan.estimate import bytes_on_chip, estimate, trace
from t2i_jax.plan.ready import Batch, abstract_setup, depths, devices_of, shallow_copy_of_model
from t2i_jax.plan.report import Plan
from t2i_jax.training.experiment import Experiment


class DoesNotFit(ConfigError):
    """The compiler found no way to run the step in the memory of a chip."""


def compile_plan(experiment: Experiment, batch: Batch, topology: Topology, sample: bool = False) -> Plan:
    """Compile the train step (or the sampler) for a topology, and read what it needs.

    Errors: ImportError without libtpu; `DoesNotFit`, with the compiler's words; `ConfigError` for a mesh that the
    topology cannot hold.
    """
    chip, devices = topology.chip, devices_of(topology)
    kind = devices[0].device_kind
    mesh = experiment.mesh.build(devices)
    if mesh.size != len(devices):
        raise ConfigError(f"the mesh {dict(mesh.shape)} has {mesh.size} chips, {topology} has {len(devices)}")
    began = time.perf_counter()
    made = abstract_setup(experiment, batch, mesh)
    lowered = made.lower_sample() if sample else made.lower()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # The compilation cache cannot return programs for absent chips.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
        try:
            compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except Exception as error:  # the runtime's own error class differs between versions of jax
            if "memory" in str(error).lower() or "RESOURCE_EXHAUSTED" in str(error):
                raise DoesNotFit(f"{topology}: {' '.join(str(error).split())[:300]}") from error
            raise
        took = time.perf_counter() - began
        costs, spared, unread = read(compiled, Path(folder))

    sizes = {a: mesh.shape[a] for a in MESH_AXES}
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes
    live = arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    temporaries, peak = float(memory.temp_size_in_bytes), float(live + memory.generated_code_size_in_bytes)
    if costs is None:
        if sample:
            raise ConfigError(f"the program of the sampler cannot be read: {unread}")
        counted = estimate(experiment, trace(experiment, batch), topology, sizes)
        note = f"only memory is the compiler's, the rest is counted: its program cannot be read: {unread}"
        notes, measured = (*counted.notes, note), {"temporaries": temporaries, "peak": peak, "compile_seconds": took}
        return dataclasses.replace(counted, method=f"compiled for {kind}", notes=notes, **measured)
    places = [tuple(d.coords) for d in mesh.devices.flat]
    network, exposed, between, kinds = 0.0, 0.0, 0.0, {}
    for c in costs.collectives:
        old = kinds.get(c.name, {"count": 0, "bytes": 0.0})
        kinds[c.name] = {"count": old["count"] + c.times, "bytes": old["bytes"] + c.times * c.size}
        if c.between:
            between += c.times * topology.between_slices(c.kind, c.size)
            continue
        coordinates = [places[i] for i in c.ids]
        seconds = c.times * WIRE[c.kind](c.size, max(c.group, 1)) / topology.wire(coordinates, c.group)
        network += seconds
        exposed += 0.0 if c.asynchronous else seconds
    # Each instruction takes as long as the slower of its products and its traffic. Asynchronous copies and collectives
    # overlap all of them, as far as memory and network allow; others add their time.
    flops, bandwidth = chip.flops * REACHED["flops"], chip.bandwidth * REACHED["memory"]
    work = max(sum(max(f / flops, b / bandwidth) for f, b in costs.operations), costs.bytes / bandwidth)
    overlapped = max((network - exposed) / REACHED["network"], between / REACHED["network"] / BACKWARD)
    model = 0.0 if sample else made.trainer.flops(made.batch) / mesh.size  # pyright: ignore[reportArgumentType]
    target = made.sampled() if sample else made.trainer.target
    loops, kernels = costs.unknown_loops, ", ".join(costs.unknown_kernels)
    once = (compiled.cost_analysis() or {}).get("flops", 0.0)
    notes = [
        *([f"{loops} loops whose length depends on data are counted once"] if loops else []),
        *([f"products inside these kernels are not counted: {kernels}"] if kernels else []),
        f"on-chip memory spares at least {spared / 2**30:.3g} GiB of HBM traffic; with more rows on a chip it may not",
        f"the compiler's own count, which takes each loop's body once: {once:.4g} FLOPs; the products of its program "
        f"counted so: {costs.flops_once:.4g}; as often as loops run: {costs.flops:.4g}",
    ]
    return Plan(
        topology=str(topology),
        mesh=sizes,
        batch=experiment.data.batch_size,
        remat=experiment.model.compute.remat,
        what="sampler" if sample else "train step",
        method=f"compiled for {kind}",
        capacity=chip.memory,
        parameters=bytes_on_chip(target.params, sizes),
        optimizer=0.0 if sample else bytes_on_chip(target.optimizer, sizes),
        state=bytes_on_chip(target.params if sample else target, sizes),
        cache=made.cache() if sample else 0.0,
        flops=costs.flops,
        model_flops=model or costs.flops,
        bytes=costs.bytes,
        collectives=kinds,
        compute_seconds=costs.flops / chip.flops,
        memory_seconds=costs.bytes / chip.bandwidth,
        network_seconds=network,
        between_seconds=between,
        step_seconds=work + exposed / REACHED["network"] + max(0.0, overlapped - work),
        mfu=0.0,
        chips=mesh.size // chip.devices,
        peak_flops=chip.flops,
        notes=(*topology.notes, *notes),
        temporaries=temporaries,
        peak=peak,
        compile_seconds=took,
    ).finished()


def read(compiled: jax.stages.Compiled, folder: Path) -> tuple[hlo.Costs | None, float, str]:
    """The costs of a compiled program and the traffic that on-chip memory spares it, or None and why it is not read.

    A program of a newer compiler may hold what this jaxlib cannot read; the compiler wrote it to `folder` as well.
    """
    reason = ""
    try:
        text = compiled.as_text()
    except Exception as error:  # the runtime's own error class differs between versions of jax
        reason = str(error)[:200]
        written = sorted(folder.glob("*.after_optimizations.txt"), key=lambda p: p.stat().st_size)
        text = written[-1].read_text() if written else ""
    if not text:
        return None, 0.0, reason
    try:
        return hlo.count(text), hlo.spared(text), ""
    except UnknownForm as error:
        return None, 0.0, str(error)


def depth_of(model: Trainable) -> int:
    """The depth to which shallow copies are scaled. Errors: `ConfigError` for a model without one depth."""
    deep = set(depths(model).values())
    if len(deep) != 1 or min(deep) <= 4:
        raise ConfigError(f"--shallow: needs one depth above 4; this model has {depths(model) or 'none'}")
    return deep.pop()


def plan_by_shallow_copies(experiment: Experiment, batch: Batch, topology: Topology, sample: bool = False) -> Plan:
    """The plan of a deep model from two shallow copies of it, of 2 and 4 layers, on the line through both.

    Errors: `ConfigError` for a model whose depths differ or that has none, and those of `compile_plan`.
    """
    depth = depth_of(experiment.model)
    shallow = [dataclasses.replace(experiment, model=shallow_copy_of_model(experiment.model, n)) for n in (2, 4)]
    two, four = (compile_plan(e, batch, topology, sample) for e in shallow)
    line = lambda a, b: a + (b - a) * (depth - 2) / 2
    numbers = values(two), values(four)
    fields = {
        f.name: line(*(n[f.name] for n in numbers))
        for f in dataclasses.fields(Plan)
        if f.type == "float" and f.name not in ("capacity", "peak_flops", "mfu")
    }
    kinds = {
        k: {
            n: line(two.collectives.get(k, {}).get(n, 0.0), four.collectives.get(k, {}).get(n, 0.0))
            for n in ("count", "bytes")
        }
        for k in two.collectives | four.collectives
    }
    fields["compile_seconds"] = two.compile_seconds + four.compile_seconds
    method = f"{four.method}: shallow copies of 2 and 4 layers, scaled linearly to {depth}"
    # A sampler reads all weights at each token; a train step's activations leave no room for them.
    few = "few layers' weights may stay in on-chip memory between tokens: the whole model's HBM traffic is larger then"
    notes = (*four.notes, few) if sample else four.notes
    return dataclasses.replace(four, **fields, collectives=kinds, method=method, notes=notes).finished()
