"""`t2i convert`: a published checkpoint to a released model, and back."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import tyro

from t2i_jax.convert import adapters, find, folders
from t2i_jax.convert.hints import parse
from t2i_jax.core.config import ConfigError, parse_some
from t2i_jax.core.console import console
from t2i_jax.core.narrow import as_family
from t2i_jax.core.outputs import local
from t2i_jax.release import adapter_card
from t2i_jax.storage.adapters import FILE as ADAPTER_FILE
from t2i_jax.storage.adapters import read_adapter, save_adapter
from t2i_jax.storage.artifacts import config_of
from t2i_jax.storage.hub import readable
from t2i_jax.storage.remote import download


@dataclasses.dataclass(frozen=True)
class ConvertArguments:
    """A published checkpoint (.pt, .pth, .ckpt, .safetensors) to a released model that `t2i sample` takes, and back.

    Further flags are values that the file lacks, as --grid 24 24, and fields of the configuration.

    --text names the frozen encoder of captions: t5:FOLDER, lm:FOLDER (hidden states of a Llama- or Qwen-shaped language
    model), clip:PATH (one vector), clip-tokens:PATH, clip-caption:PATH (both, for unCLIP), damsm:FOLDER (a run or a
    converted DAMSM) or neighbours:PATH,database=FILE (the nearest of a database of a CLIP's vectors, .npy, .npz or a
    folder of them). The others are folders as Hugging Face or open_clip lay them out or, for CLIP, a run of a `CLIP` or
    a file with OpenAI's names. Such a file lacks its activation: those that open_clip trained with plain GELU, as most
    on LAION-2B and DataComp, need clip:FILE,activation=gelu.
    """

    format: tyro.conf.Positional[str]
    weights: tyro.conf.Positional[Path]
    """the published file; with --back a run or a released model"""
    out: Path
    """folder to write; with --back a .safetensors file"""
    codec: Path | None = None
    """run or released codec that makes images of the model's codes; it is copied into the folder"""
    text: str = ""
    """frozen text encoder of the model: t5:FOLDER, lm:FOLDER, clip:PATH, clip-tokens:PATH, damsm:FOLDER,
    neighbours:PATH, its fields after commas"""
    back: bool = False
    """write a run or a released model as a published file"""
    lora: Path | None = None
    """WEIGHTS are adapters (of PEFT, diffusers or Kohya's scripts) of this converted model: write a folder for
    t2i sample --lora"""
    names: Literal["diffusers", "kohya", "peft"] = "diffusers"
    """with --back, of adapters: whose names the file has"""


def run(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments) and not arguments[0].startswith("-"):
        print(folders.help_of(arguments[0]) + "\n\n`t2i convert --help` lists all formats and flags")
        return
    if not arguments or {"-h", "--help"} & set(arguments):
        print("usage: t2i convert FORMAT WEIGHTS --out DIR [--codec DIR] [--text KIND:FOLDER] [hints]")
        print("       t2i convert FORMAT DIR --back --out FILE.safetensors\n\n" + str(ConvertArguments.__doc__))
        print(
            "formats, each with an example; t2i convert FORMAT --help lists the hints of one:\n" + folders.help_text()
        )
        sys.exit(0 if arguments else 2)
    args, rest = parse_some(ConvertArguments, arguments, "t2i convert")
    local(args.out)
    if args.back and (rest or args.text or args.codec):
        raise ConfigError(f"--back takes no hints, no --text and no --codec: {' '.join(rest) or '--text, --codec'}")
    if args.lora is not None and (rest or args.text or args.codec or args.back):
        raise ConfigError("--lora takes no hints, no --text, no --codec and no --back: they are the model's")
    if args.lora is not None:
        adapter = adapters.read_published(args.weights, args.format, config_of(download(readable(args.lora))))
        save_adapter(adapter, args.out, adapter_card(adapter, args.out.name))
        console.print(f"{args.out}: converted; t2i sample {args.lora} --lora {args.out}", soft_wrap=True)
        return
    if args.back and (args.weights / ADAPTER_FILE).exists():
        adapters.write_published(read_adapter(args.weights), args.format, args.out, args.names)
        console.print(f"{args.out}: written in the names of {args.names}", soft_wrap=True)
        return
    if args.back:
        folders.to_file(args.format, args.weights, args.out)
        console.print(f"{args.out}: written in the names of {args.format}", soft_wrap=True)
        return
    text = folders.text_side(args.text) if args.text else None
    codec = str(args.codec) if args.codec else ""
    given = parse(args.format, find(args.format), rest)
    artifact = folders.to_folder(args.format, args.weights, args.out, given, codec, text)
    needs = artifact.config.capabilities.family and not codec
    needs = needs and as_family(artifact.config).sample_spec().kind != "pixels"
    console.print(f"{args.out}: converted" + ("; give --codec to draw images with it" * needs), soft_wrap=True)
