"""`t2i push`: a released model to a hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from t2i_jax.core.config import parse
from t2i_jax.core.console import console
from t2i_jax.storage.adapters import FILE, read_adapter
from t2i_jax.storage.artifacts import open_artifact
from t2i_jax.storage.hub import push


@dataclasses.dataclass(frozen=True)
class PushArguments:
    """Upload a released model, or released adapters, to a repository of a hub, with its card.

    Example: t2i push models/glyphs someone/glyphs --private
    """

    model: tyro.conf.Positional[Path]
    """folder that t2i release or t2i convert wrote"""
    repo: tyro.conf.Positional[str]
    """ORG/NAME; it is made where it is not there"""
    private: bool = False
    """a new repository is closed to others"""


def run(arguments: list[str]) -> None:
    args = parse(PushArguments, arguments, "t2i push")
    if (args.model / FILE).exists():  # a damaged one is not pushed
        read_adapter(args.model)
    elif (args.model / "model.safetensors").exists():
        open_artifact(args.model)
    where = push(args.model, args.repo, args.private)
    console.print(f'{args.model}: pushed; t2i sample {where} "a prompt"', soft_wrap=True)
