"""`t2i release`: a run to one folder that can be moved."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from t2i_jax.core.config import parse
from t2i_jax.core.console import console
from t2i_jax.core.outputs import local
from t2i_jax.release import release as release_run


@dataclasses.dataclass(frozen=True)
class ReleaseArguments:
    """Write the model of a run as a released model: weights as safetensors, config, tokenizer, codec, model card.

    Example: t2i release runs/quickstart/model --out models/glyphs
    """

    run: tyro.conf.Positional[Path]
    out: Path
    scale: bool = False
    """of a KL autoencoder or a TAESD: measure the scale and shift of its codes on the run's images, for the release"""
    merge: bool = False
    """of a run with train.lora: write the model with its adapters added; else the adapters alone"""
    half: bool = False
    """write weights in bf16, in half of the space; they are read as fp32"""
    int8: bool = False
    """write matrices in 8 bits with a scale for each output, in a quarter of the space; they are read as fp32"""


def run(arguments: list[str]) -> None:
    args = parse(ReleaseArguments, arguments, "t2i release")
    release_run(args.run, local(args.out), args.scale, args.half, args.merge, args.int8)
    console.print(f"{args.out}: released; it can be moved anywhere")
