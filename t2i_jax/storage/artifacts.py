"""Models in folders: one function reads runs and released models, with the same result for both.

A released model is one folder: `config.json`, `model.safetensors`, `README.md` (the model card), its vocabulary, and
its parts from other models: the released codec in `codec/`, the frozen text encoder in `text/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar, cast

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from t2i_jax import zoo
from t2i_jax.core.conditions import Tokenizer
from t2i_jax.core.config import ConfigError, write_stored
from t2i_jax.core.errors import CheckpointError
from t2i_jax.core.fields import File, files, values
from t2i_jax.core.outputs import whole_folder
from t2i_jax.core.params import HasInit, abstract, assemble, check_fits, named, rebuild
from t2i_jax.core.sharding import on_cpu, shardings
from t2i_jax.core.specs import Shaped
from t2i_jax.core.types import Codec, Trainable
from t2i_jax.interop import tensorfile
from t2i_jax.nn.lora import LoRA, added
from t2i_jax.storage import adapters
from t2i_jax.storage.adapters import Adapter
from t2i_jax.storage.hub import readable
from t2i_jax.storage.moved import moved, moves
from t2i_jax.storage.remote import download
from t2i_jax.storage.stored import released, stored

log = logging.getLogger(__name__)
T = TypeVar("T")
M = TypeVar("M", bound=nnx.Module)
R = TypeVar("R")
C = TypeVar("C", bound=Trainable, covariant=True)


@dataclasses.dataclass(frozen=True)
class Artifact(Generic[C]):
    """A model with its weights, and what it was trained with."""

    config: C
    """the family or codec: `core.narrow` says which"""
    model: nnx.Module
    text: Tokenizer | None = None
    codec: str = ""
    """folder of its codec; empty for a codec, and for models of pixels"""
    step: int = 0
    image_size: int = 0


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """Within the block arrays are made in the memory of this machine, so that each device gets its part alone; where
    JAX_PLATFORMS leaves the CPU out they are made on the first device."""
    with jax.default_device(*on_cpu().device_set):
        yield


def load_artifact(
    folder: str | Path,
    host: bool = False,
    mesh: Mesh | None = None,
    dtypes: Callable[[Trainable], Mapping[str, DTypeLike]] = lambda _: {},
    lora: Sequence[tuple[Adapter, float]] = (),
) -> Artifact[Trainable]:
    """The model in a run folder (its newest checkpoint, averaged weights where it keeps them) or a released folder.

    `folder` may be in an object store (`gs://...`, `s3://...`). host: leave the weights in this machine's memory, for a
    caller that distributes them over devices. mesh: read each part of them onto the devices that hold it there; a call
    of all its processes, of which none reads more than its own. dtypes: from the configuration to the dtypes of weights
    that are cast as soon as they are on the mesh. lora: adapters that are added to the weights, each with its factor.

    Errors: `ConfigError` for a folder that is neither, naming what is missing; `CheckpointError` for weights that
    cannot be read or belong to another model.
    """
    with on_host() if host else contextlib.nullcontext():
        there = open_artifact(folder)
        layout: dict[str, Sharding] = dict.fromkeys(named(there.artifact.model), on_cpu())
        adapters.check_adapters(there.artifact.config, lora)
        use: Callable[[str, Array], np.ndarray] = lambda k, x: np.asarray(adapters.with_adapters(k, x, lora))
        if mesh is not None:
            layout = {k: v.get_value() for k, v in named(shardings(there.artifact.model, mesh)).items()}
            cast = dtypes(there.artifact.config)
            whole = lambda k, x: adapters.with_adapters(k, x, lora)
            use = lambda k, x: jax.block_until_ready(whole(k, x).astype(cast.get(k, x.dtype)))
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            step, arrays = there.read(layout, use)
        if mesh is None:
            model = assign(there.artifact.config, arrays, there.source)
        else:  # they are checked, and on their devices
            weights = named(there.artifact.model)
            model = rebuild(there.artifact.model, {k: v.replace(arrays[k]) for k, v in weights.items()})
        return dataclasses.replace(there.artifact, model=model, step=step)


def load_codec(folder: str | Path, host: bool = False, mesh: Mesh | None = None) -> Artifact[Codec]:
    """The codec in a folder, as `load_artifact` reads it. Errors: also `ConfigError` where it holds no codec."""
    artifact = load_artifact(folder, host, mesh)
    if not artifact.config.capabilities.codec:
        raise ConfigError(f"{folder} holds a {type(artifact.config).__name__}, which is no codec")
    return cast(Artifact[Codec], artifact)


class ReadWeights(Protocol):
    """(shardings of all weights by name, a function of each weight) -> the step and the results by name."""

    def __call__(
        self, layout: Mapping[str, Sharding], use: Callable[[str, Array], R], /
    ) -> tuple[int, dict[str, R]]: ...


@dataclasses.dataclass(frozen=True)
class OpenArtifact:
    """A model in a folder whose weights are not read yet: `artifact.model` holds shapes."""

    artifact: Artifact[Trainable]
    source: Path
    """folder of the weights"""
    read: ReadWeights


def open_artifact(path: str | Path) -> OpenArtifact:
    """The artifact that `load_artifact` reads. Errors: as there."""
    where = readable(path)
    folder = download(where)
    if not (folder / "config.json").exists():
        there = "there is no such folder" if not where.exists() else "there is no config.json in it"
        there = there if where.is_dir() or not where.exists() else "it is a file; name the folder that holds it"
        raise ConfigError(f"{where}: neither a run nor a released model: {there}{zoo.hint(path)}")
    weights = folder / "model.safetensors"
    if weights.exists():
        content = released(folder)
        try:
            arrays = tensorfile.content(weights)
            if not isinstance(arrays, tensorfile.SafeTensors):
                raise ValueError(f"{weights}: is a PyTorch file; a released model has a safetensors file")
            arrays = tensorfile.Restored(arrays)
        except (ValueError, OSError) as error:
            raise CheckpointError(str(error)) from error
        codec = str(folder / name) if (name := content.get("codec")) else ""
        text, model = resolve_files(content.get("text"), folder), abstract(content["model"])
        made = Artifact(content["model"], model, text, codec, content.get("step", 0), content.get("image_size", 0))
        return OpenArtifact(made, weights, lambda lay, use: (made.step, from_file(arrays, weights, model, lay, use)))
    if (folder / adapters.FILE).exists():
        raise ConfigError(f"{folder}: holds adapters alone; give their model, and these by --lora {folder}")
    experiment = stored(folder)
    text, model = resolve_files(experiment.text, folder), abstract(experiment.model)
    codec = find_artifact(experiment.codec, folder)
    made = Artifact(experiment.model, model, text, codec, 0, values(experiment.data)["image_size"])
    if not experiment.train.lora.rank:
        return OpenArtifact(made, where / "checkpoints", lambda lay, use: from_run(where, model, lay, use))
    base, lora = open_base(where, find_artifact(experiment.train.start, folder)), experiment.train.lora
    read = lambda lay, use: from_adapters(where, base, made.config, lora, lay, use)
    return OpenArtifact(made, where / "checkpoints", read)


def open_base(run: Path, start: str) -> OpenArtifact:
    """The artifact that a run adapts. Errors: `ConfigError` where it is gone, and as of `open_artifact`."""
    if "://" not in start and not Path(start, "config.json").exists():
        advice = f"put it back, or give a copy of it and --lora {run}"
        raise ConfigError(f"{run}: holds adapters of {start}, its train.start, where there is no model; {advice}")
    if os.path.realpath(start) == os.path.realpath(run):
        raise ConfigError(f"{run}: its train.start is this folder itself")
    return open_artifact(start)


def from_adapters(
    folder: Path,
    base: OpenArtifact,
    config: Trainable,
    lora: LoRA,
    layout: Mapping[str, Sharding],
    use: Callable[[str, Array], R],
) -> tuple[int, dict[str, R]]:
    """The step and the weights of a run that trains adapters: those of its start, with the adapters of its newest sound
    checkpoint added, sharded as `layout` says, through `use`."""
    step, mine = adapters.from_run(folder, config, lora, layout)
    result = {k: use(k, mine[k]) for k in layout if k in mine}
    rest = set(layout) - set(result)

    def one(name: str, x: Array) -> None:
        if name in rest:
            result[name] = use(name, added(name, x, mine, lora.scale))

    # An array that was trained whole may have another shape in the start.
    anywhere = next(iter(layout.values()))
    anywhere = NamedSharding(anywhere.mesh, PartitionSpec()) if isinstance(anywhere, NamedSharding) else anywhere
    begun, _ = base.read({k: layout[k] if k in rest else anywhere for k in named(base.artifact.model)}, one)
    if gone := sorted(set(layout) - set(result)):
        raise CheckpointError(f"{base.source}: has no {', '.join(gone[:4])}, which {folder} does not train")
    if changed := adapters.changed_start(folder, begun):
        log.warning(changed)
    return step, result


def from_run(
    folder: Path, model: nnx.Module, layout: Mapping[str, Sharding], use: Callable[[str, Array], R]
) -> tuple[int, dict[str, R]]:
    """The step and the weights of the newest sound checkpoint of a run, sharded as `layout` says, through `use`."""
    from t2i_jax.storage.checkpoints import Checkpoints  # Orbax takes long to import, and a released model needs none

    def lay(source: Path, shapes: Mapping[str, Shaped]) -> Mapping[str, Sharding]:
        try:
            check_fits(named(model), shapes, str(source))
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        return layout

    with contextlib.closing(Checkpoints(folder / "checkpoints", older=moved(model))) as checkpoints:
        together = any(not sharding.is_fully_addressable for sharding in layout.values())
        return checkpoints.weights(lay, use, together)


def from_file(
    arrays: tensorfile.Restored,
    source: Path,
    model: nnx.Module,
    layout: Mapping[str, Sharding],
    use: Callable[[str, Array], R],
) -> dict[str, R]:
    """The weights of a released model, with the shardings of `layout`, through `use`: one device's part at a time."""
    wanted = named(model)
    try:
        older = moves(moved(model), arrays.shapes)
        gone = {name for move in older.values() for name in move.names}
        shapes = {k: x for k, x in arrays.shapes.items() if k not in gone}
        check_fits(wanted, shapes | {k: move.shape(arrays.shapes) for k, move in older.items()}, str(source))
        whole = lambda move: move.array({name: arrays[name] for name in move.names})
        part_of = lambda name, index: whole(older[name])[index] if name in older else arrays.part(name, index)
        made = {}
        for name, v in wanted.items():
            part = lambda index, name=name, dtype=v.get_value().dtype: np.asarray(part_of(name, index), dtype)
            made[name] = use(name, jax.make_array_from_callback(v.shape, layout[name], part))
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from error
    return made


def is_stored(path: str | Path) -> bool:
    """Whether a path is that of a run or a released model, or of an object store or a hub, where nothing else is
    read."""
    if "://" in str(path):
        return True
    try:
        content = json.loads(Path(zoo.find(path) or path, "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    model = content.get("model") if isinstance(content, dict) else None
    return isinstance(model, dict) and ":" in str(model.get("type"))


def config_of(folder: str | Path) -> Trainable:
    """The configuration of the family or codec in a run or a released folder of this machine, without its weights."""
    where = zoo.find(folder) or Path(folder)
    if (where / "model.safetensors").exists():
        return released(where)["model"]
    return stored(where).model


def assign(config: HasInit[M], arrays: dict[str, np.ndarray], source: Path) -> M:
    """The model of `config` that holds `arrays` by dotted name. Errors: `CheckpointError` lists what is wrong."""
    try:
        return assemble(config.init, arrays, str(source))
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def save_artifact(artifact: Artifact[Trainable], folder: str | Path, card: str, half: bool = False) -> None:
    """Write a released model; the folder appears whole or not at all, and none is overwritten. half: in bf16."""
    weights = named(artifact.model)

    def fill(put: tensorfile.Use) -> int:
        for name, v in weights.items():
            put(name, v[...])
        return artifact.step

    _save(artifact, fill, folder, lambda _: card, half)


def copy_artifact(
    source: str | Path,
    folder: str | Path,
    card: Callable[[Artifact[Trainable]], str],
    config: Trainable | None = None,
    half: bool = False,
    int8: bool = False,
) -> None:
    """Write the model of a run, or a released one, as a released model, one weight after the other: no more than
    one of them is in memory. card: the text of its card, for the artifact with shapes in the place of arrays.
    config: another of its kind, with other fields of those that no training depends on. half: weights of fp32 are
    written in bf16, those of its codec too; what reads them computes in fp32 as before. int8: matrices in 8 bits,
    with a scale for each output.

    Errors: as `load_artifact` and `save_artifact`.
    """
    there = open_artifact(source)
    layout = dict.fromkeys(named(there.artifact.model), on_cpu())
    artifact = dataclasses.replace(there.artifact, config=config or there.artifact.config)
    _save(artifact, lambda put: there.read(layout, put)[0], folder, card, half, int8)


def _save(
    artifact: Artifact[Trainable],
    fill: Callable[[tensorfile.Use], int],
    folder: str | Path,
    card: Callable[[Artifact[Trainable]], str],
    half: bool,
    int8: bool = False,
) -> None:
    """Write a released model whose weights `fill` writes; it returns their step. half, int8: as of `copy_artifact`."""
    with whole_folder(folder) as made:
        shapes = tensorfile.stored_shapes({k: v.get_value() for k, v in named(artifact.model).items()}, half, int8)
        step = tensorfile.write(made / "model.safetensors", shapes, fill, "t2i_jax")
        artifact = dataclasses.replace(artifact, step=step)
        text = bundle_files(artifact.text, made, whole=True, half=half, int8=int8)
        shared = zoo.shared(artifact.codec, folder)
        config = {"model": artifact.config, "text": text, "codec": shared or ("codec" if artifact.codec else "")}
        config |= {"step": artifact.step, "image_size": artifact.image_size}
        write_stored(made / "config.json", config)
        (made / "README.md").write_text(card(artifact))
        if artifact.codec and not shared:
            about = lambda codec: f"# {type(codec.config).__name__}\n\nThe codec of the model above.\n"
            copy_artifact(artifact.codec, made / "codec", about, half=half, int8=int8)


def bundle_files(text: T, folder: Path, whole: bool = False, half: bool = False, int8: bool = False) -> T:
    """`text` with its vocabulary copied into `folder`, and if `whole` with its frozen encoder too, so that the folder
    can be moved. An encoder that is a run becomes a released model; half, int8: as of `copy_artifact`."""

    def copy(file: File, part: str, value: str) -> str:
        if file.large and not whole:
            return value
        name = part + file.name + ("" if Path(value).is_dir() else Path(value).suffix)
        if not (folder / name).exists() and (Path(value) / "checkpoints").is_dir():
            about = lambda encoder: f"# {type(encoder.config).__name__}\n\nThe text encoder of the model above.\n"
            copy_artifact(value, folder / name, about, half=half, int8=int8)
        elif not (folder / name).exists():
            copy_files(Path(value), folder / name)
        return name

    return with_files(text, copy)


def resolve_files(text: T, folder: Path) -> T:
    """`text` with file fields resolved to full paths inside `folder`, whether the files exist or not."""

    def find(file: File, part: str, value: str) -> str:
        names = (part + file.name, part + file.name + Path(value).suffix)
        gone = str(folder / value) if value in names and not Path(value).exists() else find_artifact(value, folder)
        return next((str(folder / name) for name in names if (folder / name).exists()), gone)

    return with_files(text, find)


def find_artifact(path: str, run: Path) -> str:
    """A path of a run's config, which may be relative to where training ran: resolved from here, or else from the
    nearest parent folder of the run that has it; unchanged where none has."""
    if not path or "://" in path or os.path.exists(path):
        return path
    return next((str(p / path) for p in Path(os.path.realpath(run)).parents if (p / path).exists()), path)


def with_files(text: T, change: Callable[[File, str, str], str], part: str = "") -> T:
    """`text` with `change(file, part, value)` in place of each field marked `File`, in nested texts too.

    part: distinguishes the files of several texts.
    """
    if not dataclasses.is_dataclass(text) or isinstance(text, type):
        return text
    fields = values(text)
    inner = {k: with_files(v, change, f"{part}{k}_") for k, v in fields.items() if dataclasses.is_dataclass(v)}
    named = {k: change(file, part, fields[k]) for k, file in files(type(text)).items() if fields[k]}
    return dataclasses.replace(text, **inner, **named)


def copy_files(source: Path, target: Path) -> None:
    """Copy a file or a folder, by hard links where the file system has them: encoders are large."""

    def one(source: str | Path, target: str | Path) -> None:
        try:
            os.link(os.path.realpath(source), target)
        except OSError:
            shutil.copyfile(source, target)

    if source.is_dir():
        ignored = shutil.ignore_patterns("*.h5", "*.msgpack", "*.onnx", "onnx", "openvino", ".*")
        shutil.copytree(source, target, copy_function=one, ignore=ignored)
    else:
        one(source, target)
