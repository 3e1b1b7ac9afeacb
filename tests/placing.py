"""How much the memory of a process grows while a host array is placed on the devices of several processes.

    PYTHONPATH=. python tests/placing.py 2 4 8

prints a line for each number of processes, each with one device of the CPU.
"""

import resource
import sys

from processes import outputs, started

SIZE = 64
"""MiB of the array."""


def grown(processes: int, way: str) -> float:
    """MiB by which the peak memory of a process grows at most; way: `device_put` (of JAX) or `placed`."""
    said = outputs(started([__file__, way], processes))
    return max(float(output.split("grew by")[1].split()[0]) for output in said)


def measure(way: str) -> None:
    """Place an array as one of the processes."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from t2i_jax.core.sharding import MeshConfig, put_on_mesh, start_cluster

    start_cluster()
    sharding = NamedSharding(MeshConfig(1, -1).build(), PartitionSpec("fsdp"))
    put = {"device_put": jax.device_put, "placed": put_on_mesh}[way]
    jax.block_until_ready(put(np.zeros(8 * jax.device_count(), np.float32), sharding))
    x = np.arange(SIZE * 2**18, dtype=np.float32).reshape(-1, 1024)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before = peak()
    y = jax.block_until_ready(put(x, sharding))
    growth = peak() - before
    for own in y.addressable_shards:
        np.testing.assert_array_equal(own.data, x[own.index])
    print(f"grew by {growth:.0f} MiB", flush=True)


if __name__ == "__main__":
    if sys.argv[1] in ("device_put", "placed"):
        measure(sys.argv[1])
    else:
        for n in map(int, sys.argv[1:]):
            found = ", ".join(f"{way} + {grown(n, way):.0f} MiB" for way in ("device_put", "placed"))
            print(f"{n} processes, {SIZE / n:.0f} MiB for each: {found}", flush=True)
