"""Models in folders: runs and released models are read by one function and look the same to whoever uses them.

A released model is one folder: `config.json`, `model.safetensors`, `README.md` (the model card), its vocabulary, and
what it needs of other models: the released codec in `codec/`, the frozen text encoder in `text/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from t2i_jax.config import ConfigError, read_stored, to_json
from t2i_jax.core.outputs import check_parent
from t2i_jax.interop import tensorfile
from t2i_jax.nn.trees import assemble, named
from t2i_jax.training.checkpoints import CheckpointError, Checkpoints
from t2i_jax.training.remote import fetched, place

BESIDE = {"path": "vocabulary", "vocabulary": "vocabulary", "folder": "text"}
"""Fields of texts that name files, and how the copies in a model's folder are called."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A model with its weights, and what it was trained with."""

    config: Any
    """the family or codec"""
    model: Any
    text: Any = None
    codec: str = ""
    """folder of its codec; empty for a codec, and for models of pixels"""
    step: int = 0
    image_size: int = 0


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """Arrays that are made within lie in the memory of this machine, from where each device gets its part alone; where
    JAX_PLATFORMS leaves the CPU out they lie on the first device."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = None
    with jax.default_device(device) if device else contextlib.nullcontext():
        yield


def load_artifact(folder: str | Path, host: bool = False) -> Artifact:
    """The model in a run folder (its newest checkpoint, averaged weights where it keeps them) or a released folder.

    `folder` may lie in an object store (`gs://...`, `s3://...`). host: leave the weights in this machine's memory, for
    someone who spreads them over devices.

    Errors: `ConfigError` for a folder that is neither, naming what is missing; `CheckpointError` for weights that
    cannot be read or belong to another model.
    """
    with on_host() if host else contextlib.nullcontext():
        return _loaded(place(folder))


def _loaded(where: Any) -> Artifact:
    folder = fetched(where)
    if not (folder / "config.json").exists():
        there = "there is no such folder" if not where.exists() else "there is no config.json in it"
        there = there if where.is_dir() or not where.exists() else "it is a file; name the folder that holds it"
        raise ConfigError(f"{where}: neither a run nor a released model: {there}")
    weights = folder / "model.safetensors"
    if weights.exists():
        content = released(folder)
        try:
            arrays = dict(tensorfile.content(weights))
        except (ValueError, OSError) as error:
            raise CheckpointError(str(error)) from error
        codec = str(folder / content["codec"]) if content.get("codec") else ""
        text = relocated(content.get("text"), folder)
        model = assign(content["model"], arrays, weights)
        return Artifact(content["model"], model, text, codec, content.get("step", 0), content.get("image_size", 0))
    experiment = stored(folder)
    step, arrays = run_weights(where)
    model = assign(experiment.model, arrays, where / "checkpoints")
    text = relocated(experiment.text, folder)
    return Artifact(experiment.model, model, text, found(experiment.codec, folder), step, experiment.data.image_size)


def config_of(folder: str | Path) -> Any:
    """The configuration of the family or codec in a run or a released folder of this machine, without its weights."""
    if (Path(folder) / "model.safetensors").exists():
        return released(Path(folder))["model"]
    return stored(Path(folder)).model


def released(folder: Path) -> dict[str, Any]:
    """What the config.json of a released model says. Errors: `ConfigError` where it is another program's."""
    content = read_stored(folder / "config.json")
    if not isinstance(content, dict) or not dataclasses.is_dataclass(content.get("model")):
        raise ConfigError(f"{folder}: its config.json is not that of a released model of t2i_jax")
    return content


def stored(folder: Path) -> Any:
    """The experiment of a run. Errors: `ConfigError` where its config.json is another program's."""
    experiment = read_stored(folder / "config.json")
    if not dataclasses.is_dataclass(experiment) or "model" not in {f.name for f in dataclasses.fields(experiment)}:
        raise ConfigError(f"{folder}: its config.json is not that of a run of t2i_jax")
    return experiment


def run_weights(folder: Any) -> tuple[int, dict[str, np.ndarray]]:
    """The step and the weights (averaged where there is an average) of a run's newest checkpoint."""
    checkpoints = Checkpoints(folder / "checkpoints")
    arrays = checkpoints.arrays("")
    checkpoints.close()
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    return int(arrays["step"]), part("params/") | part("carried/") | part("ema/")


def assign(config: Any, arrays: dict[str, np.ndarray], source: Path) -> Any:
    """The model of `config` that holds `arrays` by dotted name. Errors: `CheckpointError` lists what is wrong."""
    try:
        return assemble(config.init, arrays, str(source))
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def save_artifact(artifact: Artifact, folder: str | Path, card: str) -> None:
    """Write a released model; the folder appears whole or not at all, and none is overwritten."""
    folder = Path(folder)
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name[:50]}.", dir=folder.parent) as scratch:
        temporary = Path(scratch, "model")
        temporary.mkdir()
        _write_artifact(artifact, temporary, card)
        os.replace(temporary, folder)


def check_new(folder: str | Path) -> None:
    """Errors: `ConfigError` where a released model cannot be written, as something is there already."""
    if os.path.lexists(folder):
        raise ConfigError(f"{folder}: exists already; choose another folder for the released model")
    check_parent(Path(folder))


def _write_artifact(artifact: Artifact, temporary: Path, card: str) -> None:
    text = bundled(artifact.text, temporary, whole=True)
    config = {"model": artifact.config, "text": text, "codec": "codec" if artifact.codec else ""}
    config |= {"step": artifact.step, "image_size": artifact.image_size}
    (temporary / "config.json").write_text(json.dumps({k: to_json(v) for k, v in config.items()}, indent=2))
    arrays = {k: np.asarray(v[...]) for k, v in named(artifact.model).items()}
    save_file(arrays, temporary / "model.safetensors", metadata={"format": "t2i_jax"})
    (temporary / "README.md").write_text(card)
    if artifact.codec:
        codec = load_artifact(artifact.codec)
        save_artifact(codec, temporary / "codec", f"# {type(codec.config).__name__}\n\nThe codec of the model above.\n")


def bundled(text: Any, folder: Path, whole: bool = False) -> Any:
    """`text` with its vocabulary copied into `folder`, and if `whole` with its frozen encoder too, so that the folder
    can travel."""

    def copy(kind: str, part: str, value: str) -> str:
        if not whole and kind != "vocabulary":
            return value
        name = part + kind + ("" if Path(value).is_dir() else Path(value).suffix)
        if not (folder / name).exists():
            copied(Path(value), folder / name)
        return name

    return with_files(text, copy)


def relocated(text: Any, folder: Path) -> Any:
    """`text` with what of it lies in `folder`, or should, named by its full path."""

    def find(kind: str, part: str, value: str) -> str:
        names = (part + kind, part + kind + Path(value).suffix)
        gone = str(folder / value) if value in names and not Path(value).exists() else found(value, folder)
        return next((str(folder / name) for name in names if (folder / name).exists()), gone)

    return with_files(text, find)


def found(path: str, run: Path) -> str:
    """A path of a run's config, which may be relative to where training ran: from here, or else from the nearest of the
    folders that hold the run; as it is where it is nowhere."""
    if not path or "://" in path or os.path.exists(path):
        return path
    return next((str(p / path) for p in run.resolve().parents if (p / path).exists()), path)


def with_files(text: Any, change: Callable[[str, str, str], str], part: str = "") -> Any:
    """`text` with `change(kind, part, value)` in the place of each name of a file in it and in the texts it is made of.

    part: what tells the files of one of several texts from those of the others.
    """
    if not dataclasses.is_dataclass(text) or isinstance(text, type):
        return text
    fields = {field.name: getattr(text, field.name) for field in dataclasses.fields(text)}
    inner = {k: with_files(v, change, f"{part}{k}_") for k, v in fields.items() if dataclasses.is_dataclass(v)}
    files = {k: change(BESIDE[k], part, v) for k, v in fields.items() if k in BESIDE and v}
    return dataclasses.replace(text, **inner, **files)


def copied(source: Path, target: Path) -> None:
    """Copy a file or a folder, by hard links where the file system has them: encoders are large."""

    def one(source: Any, target: Any) -> None:
        try:
            os.link(os.path.realpath(source), target)
        except OSError:
            shutil.copyfile(source, target)

    if source.is_dir():
        ignored = shutil.ignore_patterns("*.h5", "*.msgpack", "*.onnx", "onnx", "openvino", ".*")
        shutil.copytree(source, target, copy_function=one, ignore=ignored)
    else:
        one(source, target)
