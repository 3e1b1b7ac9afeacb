"""A process that loads, samples or releases a model and says what it took: peak and share in bytes, above the start.

Called by tests/test_loading_memory.py with a folder, what to do and the mesh; `make` writes the folders to load from.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t2i_jax.core import config
from t2i_jax.core.params import named
from t2i_jax.core.sharding import MeshConfig, start_cluster
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.pipeline import Pipeline
from t2i_jax.release import release
from t2i_jax.storage import checkpoints
from t2i_jax.storage.artifacts import load_artifact, open_artifact
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.state import TrainState


def family(mib: int, **fields: Any) -> AR:
    """A model of about so many MiB of fp32 weights in equal layers."""
    return AR(64, (2, 2), width=512, mlp=1536, heads=8, depth=max(mib // 13, 1), condition=ClassEmbedder(8), **fields)


def fill(name: str, v: jax.ShapeDtypeStruct) -> np.ndarray:
    """Numbers that tell arrays and their parts apart."""
    seed = sum(map(ord, name)) % 97
    return (0.02 * np.sin(seed + np.arange(v.size, dtype=np.float32))).reshape(v.shape)


def make(folder: Path, mib: int, **fields: Any) -> None:
    """A run whose checkpoint holds parameters, their average and the moments of an optimiser."""
    model = family(mib, **fields)
    experiment = Experiment(model, Data(ArrayRecord("/nowhere"), batch_size=8), Train(ema=0.9))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_json(experiment)))
    shapes = named(jax.eval_shape(model.init, jax.random.key(0)))
    values = {k: v.replace(jnp.asarray(fill(k, v.get_value()))) for k, v in shapes.items()}
    zeros = {k: v.replace(jnp.zeros_like(v[...])) for k, v in values.items()}
    params = {k: v for k, v in zeros.items() if isinstance(v, nnx.Param)}
    average = {k: v for k, v in values.items() if isinstance(v, nnx.Param)}
    state = TrainState(jnp.int32(3), params, {}, average, {"model": {"m": params, "v": params}})
    writer = checkpoints.Checkpoints(folder / "checkpoints")
    writer.finish(state, 24, 3)
    writer.close()


def memory(kind: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since the peak was reset."""
    return 1024 * int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def main() -> None:
    folder, action, mesh, held = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
    start_cluster()
    checkpoints.HELD = held
    mesh = MeshConfig(*mesh)
    small = folder.parent / "small"
    load_artifact(small, mesh=mesh.build())  # the started process: all is imported, all threads are there
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    share, model = 0, None
    if action == "release":
        release(folder, folder.parent / "released")
        share = 4 * max(x.size for x in jax.tree.leaves(open_artifact(folder).artifact.model))  # the largest array
    elif action == "sample":
        pipeline = Pipeline.load(folder, mesh)
        share = sum(s.data.nbytes for x in jax.tree.leaves(pipeline.parts) for s in x.addressable_shards)
    else:
        model = load_artifact(folder, mesh=mesh.build()).model
        share = sum(s.data.nbytes for x in jax.tree.leaves(model) for s in x.addressable_shards)
    print(json.dumps({"peak": memory("VmHWM") - before, "share": share}), flush=True)
    if model is not None:
        for name, v in named(model).items():
            want = fill(name, v.get_value())
            for part in v.get_value().addressable_shards:
                np.testing.assert_array_equal(part.data, want[part.index])


if __name__ == "__main__":
    main()
