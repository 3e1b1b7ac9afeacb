"""Which process of a TPU slice has which device of a mesh, by the topologies of libtpu, as data for tests.

    pip install 't2i_jax[plan]'
    PYTHONPATH=. python tests/tpu_layouts.py

writes tests/assets/tpu_layouts.json: slice and mesh -> the process of each device in the order of the mesh, as runs of
`process*devices`. `v5e:4x4` is a slice, `2 v5e:4x4` are two of them.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "assets" / "tpu_layouts.json"
FLAT = ("2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SLICES = (
    *(f"{chip}:{shape}" for chip in ("v5e", "v6e") for shape in FLAT),
    *(f"v5p:{shape}" for shape in ("2x2x1", "2x2x2", "2x2x4", "4x4x4", "4x4x8", "8x8x8")),
    *("2 v5e:4x4", "2 v5p:2x2x2", "2 v6e:8x8", "4 v5p:2x2x4"),
)


def meshes(size: int) -> list[tuple[int, int, int]]:
    """Meshes (data, fsdp, tensor) of so many devices: data alone, with fsdp of several sizes, with tensor 2."""
    fsdp = [n for n in (4, 16, 64) if n < size]
    found = [(size, 1, 1), *((size // n, n, 1) for n in fsdp), (size // 2, 1, 2), (size // 8, 4, 2)]
    return [mesh for mesh in dict.fromkeys(found) if min(mesh) > 0]


def layouts() -> dict[str, list[int]]:
    """Slice and mesh -> process of each device, in the order of the mesh."""
    packed = json.loads(FILE.read_text())
    runs = lambda text: [(int(p), int(n or 1)) for p, _, n in (run.partition("*") for run in text.split())]
    return {name: [p for p, n in runs(text) for _ in range(n)] for name, text in packed.items()}


def devices_of(slices: str) -> list[Any]:
    """Descriptions of the devices of one slice or several. Errors: ImportError without libtpu."""
    from jax.experimental import topologies

    from t2i_jax.core.platform import tpu_compiler_alone

    tpu_compiler_alone()
    several, _, topology = slices.rpartition(" ")
    more = {"num_slices": int(several)} if several else {}
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices)


def asked(slices: Sequence[str] = SLICES) -> Iterator[tuple[str, list[int]]]:
    """The layouts that libtpu and the project's own mesh builder give now."""
    from t2i_jax.core.sharding import MeshConfig

    for name in slices:
        devices = devices_of(name)
        count = int(name.rpartition(" ")[0] or 1)
        for mesh in meshes(len(devices)):
            if mesh[0] % count == 0:
                built = MeshConfig(*mesh).build(devices)
                yield f"{name} {','.join(map(str, mesh))}", [d.process_index for d in built.devices.flat]


if __name__ == "__main__":
    runs = lambda layout: [(p, len(list(group))) for p, group in itertools.groupby(layout)]
    packed = {name: " ".join(f"{p}*{n}" if n > 1 else f"{p}" for p, n in runs(layout)) for name, layout in asked()}
    FILE.write_text(json.dumps(packed, indent=0) + "\n")
    print(f"{FILE}: {len(packed)} layouts, {FILE.stat().st_size} bytes")
