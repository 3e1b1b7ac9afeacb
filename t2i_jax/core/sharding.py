"""Sharding: the mesh, the rules from axis names to mesh axes, and the start of a cluster.

A model names the axes of its parameters (`nnx.Param(value, axes=("embed", "mlp"))`); the table RULES maps those names
to mesh axes; `shardings` turns a whole tree of such parameters, or of anything shaped like them (moments, EMA), into
shardings. `shard(x, *axes)` pins an activation by the same names and is a no-op without a mesh.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Annotated, Protocol, TypeVar

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from t2i_jax.core.errors import ConfigError
from t2i_jax.core.errors import NoCluster as NoCluster
from t2i_jax.core.fields import LARGEST, Checked, Range

T = TypeVar("T")
"""a pytree of arrays, or of something in the place of each"""


class Device(Protocol):
    """What this library reads of a device of JAX."""

    @property
    def platform(self) -> str: ...

    @property
    def device_kind(self) -> str: ...

    @property
    def process_index(self) -> int: ...


MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": None,  # sequence sharding: set to "tensor"
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": "tensor",
    "conv": "fsdp",
    "rows": MESH_AXES,  # of a table that is searched, not trained
}


@dataclasses.dataclass(frozen=True)
class MeshConfig(Checked):
    """Sizes of the mesh axes; one of them may be -1 and takes the devices that are left.

    >>> MeshConfig(fsdp=4)
    MeshConfig(data=-1, fsdp=4, tensor=1)
    """

    data: Annotated[int, Range(-1, LARGEST)] = -1
    """parts of the batch, each with its own copy of the parameters; the only axis that crosses slices"""
    fsdp: Annotated[int, Range(-1, LARGEST)] = 1
    """parts of the batch that share the parameters, each of which is gathered where it is used"""
    tensor: Annotated[int, Range(-1, LARGEST)] = 1
    """parts of every matrix that is computed with where it is"""

    def __str__(self) -> str:
        return f"data={self.data},fsdp={self.fsdp},tensor={self.tensor}"

    def build(self, devices: Sequence[Device] | None = None) -> Mesh:
        """The mesh over all devices of all processes (or over `devices`)."""
        whole = devices is None
        devices = list(jax.devices()) if devices is None else devices
        sizes = [self.data, self.fsdp, self.tensor]
        if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
            raise ConfigError(f"mesh {self}: sizes are positive, and at most one of them is -1")
        if -1 in sizes:
            rest = math.prod(s for s in sizes if s != -1)
            if len(devices) % rest:
                raise ConfigError(f"mesh {self}: {len(devices)} devices cannot be divided by {rest}")
            sizes[sizes.index(-1)] = len(devices) // rest
        if math.prod(sizes) > len(devices):
            raise ConfigError(f"mesh {self}: needs {math.prod(sizes)} devices, there are {len(devices)}")
        chosen = devices[: math.prod(sizes)]
        idle = {d.process_index for d in devices} - {d.process_index for d in chosen}
        if whole and idle:
            raise ConfigError(
                f"mesh {self}: {len(chosen)} of {len(devices)} devices leave {len(idle)} processes without one; "
                "make it larger, with -1 for what is left"
            )
        # Auto axes: XLA propagates. Explicit ones (the default of make_mesh) refuse indexing, patchify and top_k.
        return Mesh(self._placed(sizes, chosen), MESH_AXES, (AxisType.Auto,) * 3)

    def _placed(self, sizes: list[int], devices: Sequence[Device]) -> np.ndarray:
        """The devices in the shape of the mesh: its axes follow those of the chips' torus where they fit, and split
        them where not (which jax.make_mesh refuses on most TPUs); only `data` spans slices, which a slower network
        joins."""
        slices = len({getattr(d, "slice_index", 0) for d in devices})  # only TPUs have it: reflection
        if slices == 1 or devices[0].platform != "tpu":
            return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        if sizes[0] % slices:
            raise ConfigError(f"mesh {self}: data={sizes[0]} cannot be divided among {slices} slices")
        inner, outer = [sizes[0] // slices, *sizes[1:]], [slices, 1, 1]
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def own_mesh(config: MeshConfig) -> Mesh:
    """The mesh of a process for work that processes divide among themselves: that of the config, or with several
    processes the devices of this one."""
    several = jax.process_count() > 1
    return MeshConfig(1, -1).build(jax.local_devices()) if several else config.build()


def read_mesh(text: str, default: MeshConfig) -> MeshConfig:
    """The mesh of `data=4,fsdp=2`; axes that are not named are 1. Errors: `ConfigError` for anything else."""
    if not text:
        return default
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in sizes or not number.removeprefix("-").isdigit():
            raise ConfigError(f"--mesh {text}: '{part}' is not one of {', '.join(MESH_AXES)} with a size, as fsdp=4")
        sizes[name] = int(number)
    return MeshConfig(**sizes)


def shard(x: Array, *axes: str | None) -> Array:
    """Pin the layout of an activation by axis names, one per dimension; does nothing where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    # A mesh axis splits one dimension: axes of the batch are not available for the width.
    used: set[str] = set()
    entries = []
    for name in axes:
        names = RULES.get(name)
        names = (names,) if isinstance(names, str) else names or ()
        entries.append(tuple(n for n in names if n not in used) or None)
        used.update(names)
    return jax.lax.with_sharding_constraint(x, fit(P(*entries), x.shape, dict(mesh.shape)))


def fit(spec: P, shape: tuple[int, ...], sizes: dict[str, int]) -> P:
    """`spec` without the entries whose mesh axes do not divide the dimension they would split."""
    size = lambda names: math.prod(sizes[n] for n in ((names,) if isinstance(names, str) else names or ()))
    return P(*(names if dim % size(names) == 0 else None for dim, names in zip(shape, spec, strict=False)))


def shardings(tree: T, mesh: Mesh | AbstractMesh) -> T:
    """A sharding per array from its axis names; stacked layers get a leading None, unnamed arrays are replicated."""

    def rule(v):
        axes = v.get_metadata().get("axes", ()) if isinstance(v, nnx.Variable) else ()

        def one(leaf):
            rank = len(leaf.shape)
            names = axes if len(axes) <= rank else ()  # a reduced copy of a parameter (a factored moment) has no names
            spec = P(*(None,) * (rank - len(names)), *(RULES.get(a) for a in names))
            return NamedSharding(mesh, fit(spec, leaf.shape, dict(mesh.shape)))

        return jax.tree.map(one, v)

    return jax.tree.map(rule, tree, is_leaf=lambda v: isinstance(v, nnx.Variable))


def on_cpu() -> jax.sharding.Sharding:
    """The memory of this machine; where JAX_PLATFORMS leaves the CPU out, the first device."""
    try:
        return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split over `data` and `fsdp` on their first dimension."""
    return NamedSharding(mesh, P(RULES["batch"]))


def rows_of(mesh: Mesh, size: int, process: int | None = None) -> list[int]:
    """The rows of a batch of `size` that the devices of a process (this one) hold, ascending, each once.

    They need not be contiguous: a host of a TPU is a square of its torus, which the mesh follows.
    Errors: ValueError for a size that the mesh does not divide.
    """
    process = jax.process_index() if process is None else process
    layout = batch_sharding(mesh).devices_indices_map((size,))
    parts = {index[0].indices(size)[:2] for device, index in layout.items() if device.process_index == process}
    return [row for part in sorted(parts) for row in range(*part)]


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh, size: int) -> dict[str, Array]:
    """A global batch of `size` rows, of which this process gives those of `rows_of`: each device gets its own."""
    rows, sharding = rows_of(mesh, size), batch_sharding(mesh)

    def one(x: np.ndarray) -> Array:
        return jax.make_array_from_callback(
            (size, *x.shape[1:]), sharding, lambda index: x[in_memory_of(rows, index, size)]
        )

    return {k: one(v) for k, v in batch.items()}


def in_memory_of(rows: list[int], index: tuple[slice, ...] | None, size: int) -> slice:
    """Where, among the rows of a process, those are that one of its devices holds; index: of the global array."""
    start, stop, _ = index[0].indices(size)
    first = bisect.bisect_left(rows, start)
    return slice(first, first + stop - start)


def put_on_mesh(tree: T, layout: T | Sharding) -> T:
    """Arrays of the host as arrays of the devices; layout: a sharding for each, or one for all.

    Each process gives its own devices their parts and has to hold the same values as the others: unlike
    `jax.device_put`, which compares them by a copy of every process's array on every device, nothing is sent.
    """
    if all(s.is_fully_addressable for s in jax.tree.leaves(layout)):
        return jax.device_put(tree, layout)

    def put(x: ArrayLike, sharding: Sharding) -> Array:
        if isinstance(x, Array) and not x.is_fully_addressable:  # on the mesh already
            return jax.device_put(x, sharding)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(layout, Sharding):
        return jax.tree.map(lambda x: put(x, layout), tree)
    return jax.tree.map(put, tree, layout)


def all_processes_agree(yes: bool) -> bool:
    """Whether `yes` is true in all processes: a call of all of them, each gets the same result."""
    return yes if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.asarray(yes))))


def to_host(x: Array) -> np.ndarray:
    """An array of the mesh on the host of every process: a call of all of them."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def start_cluster() -> None:
    """Join the other processes of this run where there is a cluster: the environment has a coordinator's address, a
    Slurm step of several tasks, the host names of a TPU slice, or T2I_CLUSTER=1.

    T2I_CLUSTER=1 is for TPU VMs, whose environment has no sign of the other hosts: JAX asks the metadata server.
    A process without a heartbeat for T2I_HEARTBEAT seconds (of the environment; 100) counts as dead, and all
    others end with a message that says so. Errors: `NoCluster`.
    """
    if jax.distributed.is_initialized():
        return
    env = os.environ
    patience = int(env.get("T2I_HEARTBEAT", "100"))
    if "JAX_COORDINATOR_ADDRESS" in env:
        count, index = env.get("JAX_NUM_PROCESSES"), env.get("JAX_PROCESS_ID")
        if count is None or index is None:
            raise NoCluster("JAX_COORDINATOR_ADDRESS is set: JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set too")
        jax.distributed.initialize(
            env["JAX_COORDINATOR_ADDRESS"], int(count), int(index), heartbeat_timeout_seconds=patience
        )
        return
    # SLURM_NTASKS is that of the whole job, also in the shell of an allocation, where one process runs alone.
    asked, tasks = env.get("T2I_CLUSTER") == "1", int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if asked or tasks > 1 or "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=patience)
        except ValueError as error:  # JAX knows none of the clusters that it looks for
            why = "T2I_CLUSTER=1 asks for a cluster" if asked else "the environment is that of a cluster"
            hint = "unset it to run alone, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            raise NoCluster(f"{why}, and JAX finds none ({error}); {hint}") from error
