"""A published checkpoint to a released folder that `t2i sample` takes, and a folder back to a published file."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from t2i_jax import convert
from t2i_jax.config import ConfigError
from t2i_jax.nn.trees import named
from t2i_jax.training.artifacts import Artifact, load_artifact, save_artifact


def to_folder(
    name: str, weights: str | Path, out: str | Path, hints: Mapping[str, Any], codec: str = "", text: Any = None
) -> Artifact:
    """Convert the file `weights` of format `name` and write it as a released model, with its codec and its text side.

    hints: what the file cannot tell, and fields of the configuration. codec: a folder with a run or a released codec.
    Where `weights` is a folder that holds all three, its own codec and text are taken unless others are given.
    Errors: `ConfigError` for an unknown format or hint, and for a file that lacks names, has others, or other shapes.
    """
    if Path(out).exists():  # told before the work, not after it
        raise ConfigError(f"{out}: exists already; choose another folder")
    if not Path(weights).exists():
        raise ConfigError(f"{weights}: there is no such file")
    try:
        found = _opened(name, Path(weights))
        config, model = convert.convert(name, found.tensors, str(weights), **(found.hints | dict(hints)))
    except (ValueError, TypeError, KeyError) as error:
        known = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{weights} as {name}: {known}") from error
    with tempfile.TemporaryDirectory() as room:
        if found.codec and not codec:
            codec = f"{room}/codec"
            save_artifact(Artifact(*found.codec), codec, f"# {type(found.codec[0]).__name__}\n")
        artifact = Artifact(config, model, text or found.text, codec, image_size=picture_side(config, codec))
        save_artifact(artifact, out, _card(name, Path(weights), Path(out), artifact))
    return dataclasses.replace(artifact, codec=str(Path(out, "codec")) if codec else "")


def _opened(name: str, path: Path) -> convert.Folder:
    """The tensors of a published file, or what lies in a folder of a format that is one."""
    folder = convert.find(name).folder
    return folder(path) if folder and path.is_dir() else convert.Folder(convert.read(path, name), {})


def to_file(name: str, folder: str | Path, out: str | Path) -> None:
    """Write the model of a run or a released folder as a published file, .safetensors.

    Errors: `ConfigError` where the model is not one that the format can hold.
    """
    out, artifact, format = Path(out), load_artifact(folder), find(name)
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: what is written is safetensors; end its name so")
    if out.exists():
        raise ConfigError(f"{out}: exists already; choose another file")
    try:
        table = format.table(artifact.config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder} holds a {type(artifact.config).__name__}, which {name} cannot: {error}") from error
    homeless = sorted(named(artifact.model).keys() ^ table.keys())
    if homeless:
        raise ConfigError(f"{folder} has parts that {name} has no place for, or lacks some: {', '.join(homeless[:8])}")
    tensors = convert.restore(name, artifact.config, artifact.model)
    tensors |= format.buffers(artifact.config) if format.buffers else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}")
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, temporary, metadata={"format": "pt"})
    temporary.replace(out)


def find(name: str) -> convert.Format:
    """`convert.find` whose error is one that the command line tells."""
    try:
        return convert.find(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def hints(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """`--grid 24 24`, `--heads=16`, `--legacy` as values by name. Errors: `ConfigError` for a hint that is none."""
    found: dict[str, list[str]] = {}
    for word in arguments:
        if word.startswith("--"):
            key, _, value = word[2:].partition("=")
            found[key.replace("-", "_")] = [value] if value else []
        elif found:
            found[list(found)[-1]].append(word)
        else:
            raise ConfigError(f"what is {word!r}? Hints are --name value")
    signature = inspect.signature(find(name).describe).parameters.values()
    known = [p.name for p in signature if p.kind is inspect.Parameter.KEYWORD_ONLY]
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature):
        for key in found.keys() - set(known):
            near = difflib.get_close_matches(key, known, 1, 0.3)
            raise ConfigError(f"{name} takes no hint --{key}" + (f"; did you mean --{near[0]}?" if near else ""))
    return {key: _value(words) for key, words in found.items()}


def text_side(words: str) -> Any:
    """The frozen text encoder that `t5:FOLDER`, `clip:PATH` (one vector a caption), `clip-tokens:PATH` (one a token, of
    length 1) or `lm:FOLDER` (hidden states of a language model) names, with fields of it set as `encoder` has it.

    Errors: `ConfigError` for other kinds, paths and fields.
    """
    from t2i_jax.text.clip import ClipEmbedding, ClipText
    from t2i_jax.text.decoder_lm import DecoderLM
    from t2i_jax.text.t5 import T5

    kinds = {"t5": (T5, {"clean": True}), "clip": (ClipEmbedding, {}), "clip-tokens": (ClipText, {"normalise": True})}
    kinds["lm"] = DecoderLM, {}
    kind, _, rest = words.partition(":")
    if kind not in kinds:
        known = ", ".join(f"{k}:FOLDER" for k in kinds)
        raise ConfigError(f"--text {words}: it is one of {known}, with a folder as Hugging Face lays it out")
    return encoder(kinds[kind][0], rest, f"--text {words}", **kinds[kind][1])


def encoder(kind: Any, words: str, said: str, **fields: Any) -> Any:
    """A text encoder of a class, from its path and fields of it behind commas: `vit_b_32.pt,activation=gelu`.

    said: what errors begin with. Errors: `ConfigError` for a path that is not there, and for fields of no such class.
    """
    path, *settings = words.split(",")
    if not Path(path).exists():
        raise ConfigError(f"{said}: there is no '{path}'; it names a folder as Hugging Face lays it out, or a file")
    known = [f.name for f in dataclasses.fields(kind) if f.name != "folder"]
    given = {key: _value([value]) for key, _, value in (setting.partition("=") for setting in settings)}
    if wrong := given.keys() - set(known):
        raise ConfigError(f"{said}: {kind.__name__} has no field {min(wrong)}; it has {', '.join(known)}")
    return kind(path, **(fields | given))


def _value(words: list[str]) -> Any:
    """No word is True, one is a value, more are a tuple of them."""

    def one(word: str) -> Any:
        try:
            return ast.literal_eval(word.title() if word in ("true", "false", "none") else word)
        except (ValueError, SyntaxError):
            return word

    if len(words) < 2:
        return one(words[0]) if words else True
    return tuple(map(one, words))


def help_text() -> str:
    """Every format with what it is and an example."""
    lines = []
    for name, format in sorted(convert.formats().items()):
        lines += [f"  {name}: {format.title}", " " * 8 + f"t2i convert {name} {format.example} --out models/{name}"]
    return "\n".join(lines)


def picture_side(config: Any, codec: str) -> int:
    """Side of the pictures, as far as configuration and codec tell. Errors: `ConfigError` where they do not fit."""
    if not codec:
        return 0
    decoder = load_artifact(codec).config
    if not hasattr(decoder, "factor"):
        raise ConfigError(f"{codec} holds a {type(decoder).__name__}, which is no codec")
    if getattr(decoder, "vocabulary", None) != getattr(config, "vocabulary", None):
        ours, theirs = getattr(config, "vocabulary", "no"), getattr(decoder, "vocabulary", "no")
        raise ConfigError(f"{codec} has {theirs} codes, the model {ours}: this is not its codec")
    rows, *_, channels = getattr(config, "shape", (getattr(config, "grid", (0, 0))[0], None))
    if channels is not None and channels != getattr(decoder, "dim", channels):
        raise ConfigError(f"{codec} has codes of {decoder.dim} numbers, the model {channels}: this is not its codec")
    return rows * decoder.factor


def _card(name: str, weights: Path, out: Path, artifact: Artifact) -> str:
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(artifact.model))
    fields = dataclasses.fields(artifact.config)
    rows = "\n".join(f"| {f.name} | {getattr(artifact.config, f.name)} |" for f in fields)
    prompt = "7" if "label" in artifact.config.batch_spec() else '"a prompt"'
    sample = f"```\nt2i sample {out.name} {prompt}\n```\n\n" if hasattr(artifact.config, "sample") else ""
    return (
        f"# {out.name}\n\n{type(artifact.config).__name__}, {count / 1e6:.1f} M parameters, converted from "
        f"`{weights.name}` ({find(name).title or name}). The licence is that of the published weights.\n\n{sample}"
        f"| field | value |\n|---|---|\n{rows}\n"
    )
