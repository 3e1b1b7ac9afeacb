"""`t2i encode`: images and captions to codes and features, once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from t2i_jax.core.config import ConfigError, parse_some
from t2i_jax.core.fields import Checked, Size
from t2i_jax.core.outputs import local
from t2i_jax.encode import encode_splits
from t2i_jax.training.experiment import load_experiment


@dataclasses.dataclass(frozen=True)
class EncodeArguments(Checked):
    """Compute the codes (and the features of a frozen text encoder) of a config's data once, and store them.

    Example: t2i encode configs/glyphs_ar.py --out data/glyphs_codes
    """

    config: tyro.conf.Positional[Path]
    out: Path
    splits: tuple[str, ...] = ("train", "val", "test")
    batch_size: Size = 128
    block: Size = 8192
    """records of a file; interrupted work continues after the last complete file"""


def run(arguments: list[str]) -> None:
    if "--database" in arguments:
        raise ConfigError("--database: databases of neighbours are made by `t2i data neighbours CONFIG --out FOLDER`")
    args, rest = parse_some(EncodeArguments, arguments, "t2i encode")
    encode_splits(load_experiment(args.config, rest), local(args.out), args.splits, args.batch_size, args.block)
