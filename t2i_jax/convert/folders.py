"""A published checkpoint to a released folder that `t2i sample` takes, and a folder back to a published file."""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from t2i_jax import convert
from t2i_jax.convert.hints import check_fields, check_values, kind_name, takes, text_of, unknown
from t2i_jax.convert.hints import value as value_of
from t2i_jax.core.conditions import Tokenizer
from t2i_jax.core.config import ConfigError, refused
from t2i_jax.core.fields import values
from t2i_jax.core.narrow import as_codec, as_family, check_codes, reads_codec, text_encoder
from t2i_jax.core.outputs import whole_file
from t2i_jax.core.params import named
from t2i_jax.core.types import Codec, Trainable
from t2i_jax.interop.names import Fields
from t2i_jax.interop.wrapping import holds
from t2i_jax.storage.artifacts import Artifact, is_stored, load_artifact, load_codec, save_artifact
from t2i_jax.storage.hub import hub_metadata, readable
from t2i_jax.text.clip import ClipCaption, ClipEmbedding, ClipText
from t2i_jax.text.cut import FolderEncoder
from t2i_jax.text.damsm import DamsmText
from t2i_jax.text.decoder_lm import DecoderLM
from t2i_jax.text.retrieval import Neighbours
from t2i_jax.text.t5 import T5

E = TypeVar("E", bound=FolderEncoder | DamsmText)
FAULTS = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
"""Errors that a published file, or hints that do not fit it, may cause."""


def to_folder(
    name: str,
    weights: str | Path,
    out: str | Path,
    hints: Mapping[str, object],
    codec: str = "",
    text: Tokenizer | None = None,
) -> Artifact:
    """Convert the file `weights` of format `name` and write it as a released model, with codec and text encoder.

    hints: values that the file lacks, and fields of the configuration. codec: a folder with a run or a released codec.
    Where `weights` is a folder that holds all three, its own codec and text are taken unless others are given.
    Errors: `ConfigError` for an unknown format or hint, and for a file that lacks names, has others, or other shapes.
    """
    format, weights = convert.find(name), readable(weights)
    if Path(out).exists():  # before the work, not after it
        raise ConfigError(f"{out}: exists already; choose another folder")
    if not Path(weights).exists():
        raise ConfigError(f"{weights}: there is no such file or folder; a hub's is hf://org/name/file")
    if is_stored(weights):
        raise ConfigError(f"{weights}: is a run or a released model already; --back makes a published file of it")
    if codec:
        codec_in(codec)
    found = None
    try:
        folder = format.folder if Path(weights).is_dir() else None
        found = folder(Path(weights)) if folder else convert.ModelFolder(convert.read(weights, name), {})
        config, model = convert.convert(name, found.tensors, str(weights), **(found.hints | dict(hints)))
        check_fields(config, hints)
        if config.capabilities.reads_codec:
            model = _with_codec(config, model, codec)
        if text is not None:
            _check_text(config, text)
        else:
            text = format.fit_text(config, found.text) if format.fit_text else found.text
    except FAULTS as error:
        raise ConfigError(_fault(name, format, weights, error, found, hints)) from error
    with tempfile.TemporaryDirectory() as temporary:
        if found.codec and not codec:
            codec = f"{temporary}/codec"
            save_artifact(Artifact(*found.codec), codec, f"# {type(found.codec[0]).__name__}\n")
        artifact = Artifact(config, model, text, codec, image_size=image_side(config, codec))
        save_artifact(artifact, out, _card(name, Path(weights), Path(out), artifact))
    return dataclasses.replace(artifact, codec=str(Path(out, "codec")) if codec else "")


def _fault(
    name: str,
    format: convert.Format,
    weights: object,
    error: Exception,
    found: convert.ModelFolder | None,
    hints: Mapping[str, object],
) -> str:
    """Why a file could not be converted."""
    message = str(error)
    if (m := re.search(r"(?:unexpected keyword argument|has no field) '(\w+)'", message)) and m[1] in hints:
        return unknown(name, format, m[1])
    if not isinstance(error, ValueError | OSError):  # wrapped in the message of the code that raised it
        message = f"its tensors are not as they should be ({type(error).__name__}: {error})"
        message += f", or the hints {text_of(hints)} do not suit it" if hints else ""
    if found and not holds(found.tensors, *format.needed) and (others := convert.alike(found.tensors)):
        message += f"; its names are those of {', '.join(others)}"
    return f"{name}: {message}" if str(weights) in message else f"{weights} as {name}: {message}"


def _with_codec(config: Trainable, model: nnx.Module, codec: str) -> nnx.Module:
    """The model with the vectors of the codec in a folder. Errors: ValueError without one."""
    if not codec:
        raise ValueError(f"a {type(config).__name__} reads the vectors of its codec: give --codec")
    part = load_codec(codec, host=True)
    return reads_codec(config).with_codec(model, part.config, part.model)


def _check_text(config: Trainable, text: Tokenizer) -> None:
    """Errors: ValueError where a text encoder does not fit a model; those of the encoder's files."""
    spec = config.batch_spec()
    if not {"features", "text"} & spec.keys():
        raise ValueError(f"a {type(config).__name__} without captions takes no --text")
    if "features" in spec:
        gives, reads = text_encoder(text).feature_shape, spec["features"].shape
        if gives != reads:
            shape = "{} vectors of {} numbers a caption"
            raise ValueError(f"--text gives {shape.format(*gives)}; the model reads {shape.format(*reads)}")


def to_file(name: str, folder: str | Path, out: str | Path) -> None:
    """Write the model of a run or a released folder as a published file, .safetensors.

    Errors: `ConfigError` where the model is not one that the format can hold.
    """
    out, format = Path(out), convert.find(name)
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: safetensors is written; the name has to end in .safetensors")
    if out.exists():
        raise ConfigError(f"{out}: exists already; choose another file")
    artifact = load_artifact(folder)
    try:
        table = format.table(artifact.config)
    except FAULTS as error:
        why = f": {error}" if isinstance(error, ValueError) else ""
        raise ConfigError(f"{folder} holds a {type(artifact.config).__name__}, which is no {name}{why}") from error
    unmapped = sorted(named(convert.part_in_files(format, artifact.model)).keys() ^ table.keys())
    if unmapped:
        raise ConfigError(f"{folder} cannot be exported as {name}: unmapped variables: {', '.join(unmapped[:8])}")
    tensors = convert.restore(name, artifact.config, artifact.model)
    tensors |= format.buffers(artifact.config) if format.buffers else {}
    with whole_file(out) as temporary:
        save_file({k: np.asarray(v, order="C") for k, v in tensors.items()}, temporary, metadata={"format": "pt"})


def text_side(words: str, option: str = "--text") -> Tokenizer:
    """The frozen text encoder that `t5:FOLDER`, `clip:PATH` (one vector a caption), `clip-tokens:PATH` (one a token, of
    length 1), `clip-caption:PATH` (both, as they are), `lm:FOLDER` (hidden states of a language model), `damsm:FOLDER`
    (a run or a converted DAMSM) or `neighbours:PATH` (of a CLIP's vector in a database) names, with fields of it set as
    `encoder` has it.

    option: prefix of errors. Errors: `ConfigError` for other kinds, paths and fields.
    """
    kinds: dict[str, tuple[type[FolderEncoder] | type[DamsmText], Fields]] = {
        "t5": (T5, {"clean": True}),
        "clip": (ClipEmbedding, {}),
        "clip-tokens": (ClipText, {"normalise": True}),
        "clip-caption": (ClipCaption, {}),
        "lm": (DecoderLM, {}),
        "damsm": (DamsmText, {}),
    }
    kind, _, rest = words.partition(":")
    if kind == "neighbours":
        return neighbours(rest, f"{option} {words}")
    if kind not in kinds:
        known = ", ".join(f"{k}:FOLDER" for k in (*kinds, "neighbours"))
        raise ConfigError(f"{option} {words}: it is one of {known}; `t2i convert --help` says which folders these are")
    encodes, fields = kinds[kind]
    return encoder(encodes, rest, f"{option} {words}", **fields)


def neighbours(words: str, option: str) -> Neighbours:
    """Neighbours of the embeddings of a CLIP, from its path and comma-separated fields of both:
    `vit_b_32.pt,database=FILE,neighbours=3`. Errors: as of `encoder`."""
    path, *settings = words.split(",")
    mine = {f.name for f in dataclasses.fields(Neighbours)} - {"clip"}
    ours, others = ([x for x in settings if (x.partition("=")[0] in mine) == own] for own in (True, False))
    given: Fields = {key: value_of([value]) for key, _, value in (setting.partition("=") for setting in ours)}
    if "database" not in given or not Path(str(given["database"])).exists():
        raise ConfigError(f"{option}: database=FILE is wanted, embeddings of images by this CLIP")
    clip = encoder(ClipEmbedding, ",".join((path, *others)), option)
    with refused(option):
        check_values(Neighbours, given)
        return dataclasses.replace(Neighbours(clip, ""), **given)


def encoder(kind: type[E], words: str, option: str, **fields: object) -> E:
    """A text encoder of a class, from its path and comma-separated fields: `vit_b_32.pt,activation=gelu`.

    option: prefix of errors. Errors: `ConfigError` for a path that is not there, and for fields of no such class.
    """
    path, *settings = words.split(",")
    if not path or not Path(path).exists():
        raise ConfigError(f"{option}: there is no '{path}'; it names a folder as `--help` says, or a file")
    known = [f.name for f in dataclasses.fields(kind) if f.name not in ("folder", "path")]
    given = {key: value_of([value]) for key, _, value in (setting.partition("=") for setting in settings)}
    if wrong := given.keys() - set(known):
        raise ConfigError(f"{option}: {kind.__name__} has no field {min(wrong)}; it has {', '.join(known)}")
    with refused(option):
        check_values(kind, given)
        return dataclasses.replace(kind(path), **(fields | given))


def help_text() -> str:
    """Every format with what it is and an example."""
    lines = []
    for name, format in sorted(convert.formats().items()):
        lines += [f"  {name}: {format.title}", " " * 8 + f"t2i convert {name} {format.example} --out models/{name}"]
    return "\n".join(lines)


def help_of(name: str) -> str:
    """What one format is, an example, and its hints. Errors: `ConfigError` where there is no such format."""
    format = convert.find(name)
    lines = [f"{name}: {format.title}", f"  t2i convert {name} {format.example} --out models/{name}"]
    if hints := takes(format):
        said = (f"--{key.replace('_', '-')} ({kind_name(kind)})" for key, kind in hints.items())
        lines += ["hints, which have the released values unless given: " + ", ".join(said)]
    return "\n".join(lines)


def image_side(config: Trainable, codec: str) -> int:
    """Side of the images, 0 without a codec. Errors: `ConfigError` where configuration and codec do not fit."""
    if not codec:
        return 0
    if not config.capabilities.family:
        raise ConfigError(f"--codec {codec}: a {type(config).__name__} draws no images, so it takes no codec")
    family, decoder = as_family(config), codec_in(codec)
    check_codes(family, decoder, codec, exact=True)
    return family.sample_spec().grid[0] * decoder.spec.factor


def codec_in(folder: str) -> Codec:
    """The configuration of the codec in a folder. Errors: `ConfigError` where it holds none that makes images."""
    config = as_codec(load_codec(folder).config)
    if not config.spec.decodes:
        raise ConfigError(f"{folder} holds the encoder of a codec alone, which makes no images")
    return config


def _card(name: str, weights: Path, out: Path, artifact: Artifact) -> str:
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(artifact.model))
    rows = "\n".join(f"| {name} | {value} |" for name, value in values(artifact.config).items())
    prompt = "7" if "label" in artifact.config.batch_spec() else '"a prompt"'
    title = convert.find(name).title or name
    head = hub_metadata(type(artifact.config).__name__, "text-to-image" if artifact.config.capabilities.family else "")
    sample = f"```\nt2i sample {out.name} {prompt}\n```\n\n" if artifact.config.capabilities.family else ""
    return (
        f"{head}# {out.name}\n\n{type(artifact.config).__name__}, {count / 1e6:.1f} M parameters, converted from "
        f"`{weights.name}` ({title}). The licence is that of the published weights.\n\n{sample}"
        f"| field | value |\n|---|---|\n{rows}\n"
    )
