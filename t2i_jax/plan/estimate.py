"""What a step needs on a mesh by arithmetic alone, without compiling: for GPUs, and to rank the candidates of a sweep.

Counted exactly: products of the traced step (`flops.count`, recomputation included) and the bytes of the state on a
chip (from the shardings that training uses). Estimated: activations, from what the traced loops keep for the backward
pass; collectives, from how FSDP, data and tensor parallelism move parameters, gradients and activations; traffic.
"""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.core import ShapedArray
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType

from t2i_jax.core import flops, jaxprs
from t2i_jax.core.config import ConfigError
from t2i_jax.core.fields import values
from t2i_jax.core.sharding import MESH_AXES, MeshConfig, shardings
from t2i_jax.nn import kernels
from t2i_jax.plan.chips import BACKWARD, REACHED, WIRE, Topology
from t2i_jax.plan.ready import Batch, abstract_setup, depths, size_of, tokens_of
from t2i_jax.plan.report import Plan
from t2i_jax.training.experiment import Experiment
from t2i_jax.training.state import TrainState

BETWEEN = "all-reduce between slices"
HIDDEN = "the network is assumed to overlap the products completely: MFU is an upper bound"
UNSCANNED = "its layers are not scanned: what they keep for the backward pass is not in the peak, which is larger"


@dataclasses.dataclass(frozen=True)
class Traced:
    """A step traced once on one device; every mesh is arithmetic on it."""

    target: TrainState
    flops: float
    """of a step, recomputation included"""
    model_flops: float
    kept: float
    """bytes that forward loops keep for the backward pass, whole batch"""
    largest: float
    """bytes of the largest product outside of loops' stacks, whole batch"""
    moved: float
    """bytes that products read and write, loops as often as they run, whole batch"""

    def times(self, factor: float) -> Traced:
        """The step for a batch `factor` times as large."""
        scaled = (factor * x for x in (self.flops, self.model_flops, self.kept, self.largest, self.moved))
        return Traced(self.target, *scaled)


def with_kernel(experiment: Experiment) -> Experiment:
    """The experiment with attention by a kernel where TPUs and GPUs would take one.

    Splash attention represents all of them: the products are the same, and none stores the attention weights.
    """
    model = experiment.model
    chosen = model.capabilities.attention and model.compute.attention == "auto"
    if chosen and tokens_of(model) >= kernels.LONG:
        model = model.with_compute(dataclasses.replace(model.compute, attention="splash"))
    return dataclasses.replace(experiment, model=model)


def trace(experiment: Experiment, batch: Batch) -> Traced:
    """Trace the train step of an experiment."""
    experiment = with_kernel(experiment)
    made = abstract_setup(experiment, batch, MeshConfig(1).build(jax.devices()[:1]))
    with jax.set_mesh(made.mesh):
        arguments = (made.trainer.target, made.trainer.frozen, made.batch)
        jaxpr = jax.make_jaxpr(made.trainer.step)(*arguments).jaxpr
        work, model = flops.count(made.trainer.step, *arguments), made.trainer.flops(made.batch)  # pyright: ignore
    kept, largest = _kept(jaxpr)
    return Traced(made.trainer.target, work, model, kept, largest, _moved(jaxpr))


def _size(aval: object) -> float:
    # Tokens have no shape.
    return float(math.prod(aval.shape) * aval.dtype.itemsize) if isinstance(aval, ShapedArray) else 0.0


def _kept(jaxpr: core.Jaxpr) -> tuple[float, float]:
    """(bytes that forward scans stack up, the largest product)."""
    kept = largest = 0.0
    for e in jaxpr.eqns:
        inner: list[tuple[float, float]] = []
        match jaxprs.read(e):
            case jaxprs.Product():
                largest = max(largest, *(_size(v.aval) for v in e.outvars))
            case jaxprs.Scan(body, _, reverse, stacked):
                kept += 0.0 if reverse else sum(map(_size, stacked))
                inner = [_kept(body)]
            case jaxprs.While(condition, body):
                inner = [_kept(condition), _kept(body)]
            case jaxprs.Cond(branches):
                inner = [max(map(_kept, branches))]
            case jaxprs.Call(body, _, kernel) if not kernel:  # values inside a kernel never leave the chip
                inner = [_kept(body)]
        kept += sum(k for k, _ in inner)
        largest = max(largest, *(n for _, n in inner), 0.0)
    return kept, largest


def _moved(jaxpr: core.Jaxpr) -> float:
    """Bytes of the operands and results of products; operations between them are assumed to be fused."""

    def moved(e: core.JaxprEqn) -> float:
        match jaxprs.read(e):
            case jaxprs.Product() | jaxprs.Call(kernel=True):
                return sum(_size(v.aval) for v in (*e.invars, *e.outvars))
            case jaxprs.Scan(body, length):
                return length * _moved(body)
            case jaxprs.While(condition, body):
                return _moved(condition) + _moved(body)
            case jaxprs.Cond(branches):
                return max(map(_moved, branches))
            case jaxprs.Call(body, times):
                return times * _moved(body)
        return 0.0

    return sum(map(moved, jaxpr.eqns))


def resolved(mesh: MeshConfig, topology: Topology) -> dict[str, int]:
    """Sizes of the mesh axes over a whole topology. Errors: `ConfigError` where they do not fit it."""
    sizes = {a: values(mesh)[a] for a in MESH_AXES}
    free = [a for a, n in sizes.items() if n == -1]
    rest = math.prod(n for n in sizes.values() if n != -1)
    if len(free) == 1 and rest > 0 and topology.size % rest == 0:
        sizes[free[0]] = topology.size // rest
    devices = "chips" if topology.chip.devices == 1 else "devices"
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != topology.size:
        raise ConfigError(f"the mesh {mesh} does not fill the {topology.size} {devices} of {topology}")
    if sizes["data"] % topology.slices:
        raise ConfigError(f"mesh {mesh}: data={sizes['data']} cannot be divided among {topology.slices} slices")
    return sizes


def bytes_on_chip(tree: object, sizes: dict[str, int]) -> float:
    """Bytes of a tree on one chip of a mesh, under the rules of `core.sharding`."""
    mesh = AbstractMesh(tuple(sizes[a] for a in MESH_AXES), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    layout = shardings(tree, mesh)
    one = lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
    return float(sum(one(x, s) for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(layout), strict=True)))


def estimate(experiment: Experiment, traced: Traced, topology: Topology, sizes: dict[str, int]) -> Plan:
    """The plan of a step by arithmetic."""
    chip, n, model, target = topology.chip, topology.size, experiment.model, traced.target
    d, f, t = (sizes[a] for a in MESH_AXES)
    params, state = bytes_on_chip(target.params, sizes), bytes_on_chip(target, sizes)
    rows = d * f
    itemsize = 2 if model.compute.dtype == "bfloat16" else 4
    accumulate = experiment.train.accumulate
    # What loops keep is split with the batch, not over `tensor`: the residual stream is whole on every chip of it.
    activations = (traced.kept + 3 * traced.largest / t) / rows / accumulate
    gradients = params
    whole = params * f * itemsize / 4  # parameters that one chip computes with
    layers = max(sum(depths(model).values()), 1)  # of all stacks together
    copies = 2 * whole / layers  # of the layer that is gathered, and the next
    # The residual stream, where the model says its width and length.
    stream = experiment.data.batch_size * size_of(model, "width") * tokens_of(model) * itemsize / rows
    inner = sizes | {"data": d // topology.slices}  # within a slice
    moved = [
        ("all-gather", "fsdp", f, 2 * accumulate * whole),
        ("reduce-scatter", "fsdp", f, accumulate * params * f),
        ("all-reduce", "data", inner["data"], params),
        ("all-reduce", "tensor", t, 4 * layers * stream),
    ]
    network, exposed, kinds = 0.0, 0.0, {}
    for kind, axis, group, size in moved:
        if group > 1 and size:
            seconds = WIRE[kind](size, group) / wire(topology, inner, axis)
            network += seconds
            exposed += seconds if axis == "tensor" else 0.0  # in the middle of a layer, which waits for it
            old = kinds.get(kind, {"count": 0, "bytes": 0.0})
            kinds[kind] = {"count": old["count"] + 1, "bytes": old["bytes"] + size}
    between = 0.0
    if topology.slices > 1:  # each chip sums with those of its place what its slice has scattered over `data`
        size = params * itemsize / 4 / inner["data"]
        between, kinds[BETWEEN] = topology.between_slices("all-reduce", size), {"count": 1, "bytes": size}
    # Products with their operands and results, recomputed ones too; parameters on every chip; the state twice.
    traffic = traced.moved / n + 3 * whole * accumulate + 2 * state
    compute, memory = traced.flops / n / chip.flops, traffic / chip.bandwidth
    # Products overlap their own traffic, but operations between them are bound by traffic: so both are added.
    apart = compute / REACHED["flops"] + memory / REACHED["memory"]
    return Plan(
        topology=str(topology),
        mesh=sizes,
        batch=experiment.data.batch_size,
        remat=model.compute.remat,
        what="train step",
        method="estimated by arithmetic, nothing was compiled",
        capacity=chip.memory,
        parameters=params,
        optimizer=bytes_on_chip(target.optimizer, sizes),
        state=state,
        temporaries=activations + gradients + copies,
        peak=state + activations + gradients + copies,
        flops=traced.flops / n,
        model_flops=traced.model_flops / n,
        bytes=traffic,
        collectives=kinds,
        compute_seconds=compute,
        memory_seconds=memory,
        network_seconds=network,
        between_seconds=between,
        step_seconds=max(apart, (network - exposed) / REACHED["network"], between / REACHED["network"] / BACKWARD)
        + exposed / REACHED["network"],
        mfu=0.0,
        chips=n // chip.devices,
        peak_flops=chip.flops,
        notes=(UNSCANNED,) * (not depths(model)) + (HIDDEN,) * (not topology.compiled) + topology.notes,
    ).finished()


def wire(topology: Topology, sizes: dict[str, int], axis: str) -> float:
    """Bytes/s out of a chip in collectives along a mesh axis; `tensor` is the innermost, so it stays inside a node."""
    chip = topology.chip
    if topology.compiled:  # an axis of the mesh is laid along at least one dimension of the torus
        closed = any(chip.ring <= length <= sizes[axis] for length in topology.shape)
        return chip.link * (2 if closed else 1)
    inner = math.prod(sizes[a] for a in MESH_AXES[MESH_AXES.index(axis) :])
    # A ring over several nodes leaves a node through the network cards of all of its chips at once.
    return chip.link if inner <= chip.node else chip.network * min(chip.node, sizes[axis])
