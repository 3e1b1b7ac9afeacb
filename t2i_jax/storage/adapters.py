"""Adapters in folders: of a run that trains them, or released without the model that they adapt."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict, cast

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from t2i_jax.core.config import ConfigError, read_json, read_stored, write_stored
from t2i_jax.core.errors import CheckpointError
from t2i_jax.core.outputs import whole_folder
from t2i_jax.core.params import Named, abstract, check_fits, named
from t2i_jax.core.sharding import on_cpu
from t2i_jax.core.specs import Shaped
from t2i_jax.core.types import Trainable
from t2i_jax.interop import tensorfile
from t2i_jax.nn.layers import ModelState
from t2i_jax.nn.lora import LoRA, adapted, added
from t2i_jax.storage.hub import readable
from t2i_jax.storage.remote import download
from t2i_jax.storage.stored import stored

FILE = "adapter.safetensors"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The trained arrays of adapters, by name: `NAME.a` and `NAME.b` for a matrix NAME, and NAME for what was trained
    whole."""

    config: Trainable
    """of the model that they adapt"""
    lora: LoRA
    arrays: Mapping[str, np.ndarray]
    step: int = 0


class ReleasedAdapter(TypedDict):
    """The content of the config.json of released adapters."""

    model: Trainable
    lora: LoRA
    step: int


def trained_shapes(config: Trainable, lora: LoRA) -> Named:
    """What a run of adapters trains or carries, abstract."""
    make = lambda key: adapted(config.init(key), lora, key)
    found = named(jax.eval_shape(make, jax.random.key(0)))
    return {k: v for k, v in found.items() if isinstance(v, nnx.Param | ModelState)}


def from_run(
    folder: Path, config: Trainable, lora: LoRA, layout: Mapping[str, Sharding] | None = None
) -> tuple[int, dict[str, Array]]:
    """The step and the arrays of the newest sound checkpoint of a run that trains adapters.

    layout: the shardings of the model's arrays; adapters are put on all of its devices. None: in host memory.
    """
    some = next(iter(layout.values())) if layout else on_cpu()
    on_all = NamedSharding(some.mesh, P()) if isinstance(some, NamedSharding) else some

    def lay(source: Path, shapes: Mapping[str, Shaped]) -> Mapping[str, Sharding]:
        try:
            check_fits(trained_shapes(config, lora), shapes, str(source))
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        return {k: (layout or {}).get(k, on_all) for k in shapes}

    from t2i_jax.storage.checkpoints import Checkpoints  # Orbax takes long to import; released adapters need none

    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        return checkpoints.weights(lay, lambda _, x: x, not on_all.is_fully_addressable)


def changed_start(folder: Path, step: int) -> str:
    """A message where the model that a run adapts is at another step than it was when the run began, else ""."""
    path = folder / "start.json"
    was = read_json(path) if path.exists() else {"step": step}
    if was["step"] == step:
        return ""
    return (
        f"{folder}: its adapters are of step {was['step']} of {was['from']}, which is at step {step} now: "
        "the sums are of no model that was trained"
    )


def lora_of(path: str | Path) -> LoRA | None:
    """`train.lora` of a run that has adapters; None for anything else."""
    return _lora_in(download(readable(path)))


def _lora_in(folder: Path) -> LoRA | None:
    """`lora_of` a folder of this machine."""
    alone = (folder / "model.safetensors").exists() or (folder / FILE).exists()
    if alone or not (folder / "config.json").exists():
        return None
    lora = stored(folder).train.lora
    return lora if lora.rank else None


def read_adapter(path: str | Path) -> Adapter:
    """The adapters of a run, or released ones. Errors: `ConfigError` for a folder of something else,
    `CheckpointError`."""
    where = readable(path)
    folder = download(where)
    if folder.is_file() or (folder / "adapter_config.json").exists():
        raise ConfigError(f"{path}: another program's; first: t2i convert FORMAT {path} --lora MODEL --out DIR")
    if not (folder / "config.json").exists():
        raise ConfigError(f"{path}: no adapters: there is no config.json in it")
    if (folder / FILE).exists():
        found = cast(ReleasedAdapter, read_stored(folder / "config.json"))
        try:
            arrays = dict(cast(tensorfile.SafeTensors, tensorfile.content(folder / FILE)))
            shapes = trained_shapes(found["model"], found["lora"])
            # Adapters from another program have none of the state that a run carries.
            wanted = {k: v for k, v in shapes.items() if isinstance(v, nnx.Param) or k in arrays}
            check_fits(wanted, arrays, str(folder / FILE))
        except (ValueError, OSError) as error:
            raise CheckpointError(str(error)) from error
        return Adapter(found["model"], found["lora"], arrays, found["step"])
    if (lora := _lora_in(folder)) is None:
        raise ConfigError(f"{path} holds no adapters: it is no run with train.lora, and has no {FILE}")
    config = stored(folder).model
    step, arrays = from_run(where, config, lora)
    return Adapter(config, lora, {k: np.asarray(x) for k, x in arrays.items()}, step)


def save_adapter(adapter: Adapter, folder: str | Path, card: str, half: bool = False) -> None:
    """Write adapters without their model; the folder appears whole or not at all. half: in bf16."""
    with whole_folder(folder) as made:
        shapes = tensorfile.stored_shapes(adapter.arrays, half)
        tensorfile.write(made / FILE, shapes, lambda put: [put(k, x) for k, x in adapter.arrays.items()], "t2i_jax")
        write_stored(made / "config.json", {"model": adapter.config, "lora": adapter.lora, "step": adapter.step})
        (made / "README.md").write_text(card)


def with_adapters(name: str, x: Array, adapters: Sequence[tuple[Adapter, float]]) -> Array:
    """An array of a model with its part of adapters added, each with its factor."""
    for adapter, factor in adapters:
        x = added(name, x, adapter.arrays, adapter.lora.scale, factor)
    return x


def check_adapters(config: Trainable, adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Errors: `ConfigError` for adapters of another model."""
    shapes = named(abstract(config)) if adapters else {}
    for adapter, _ in adapters:
        for name, target in named(abstract(adapter.config)).items():
            adapts = name in adapter.arrays or f"{name}.a" in adapter.arrays
            if adapts and (name not in shapes or shapes[name].shape != target.shape):
                here = f"{shapes[name].shape}" if name in shapes else "nothing of that name"
                raise ConfigError(
                    f"the adapters are of another model: theirs has {name} {target.shape}, this one {here}"
                )
