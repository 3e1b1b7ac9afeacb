"""`t2i train`: train the model of a config, or go on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import tyro

from t2i_jax.api import train
from t2i_jax.core import config
from t2i_jax.core.config import ConfigError, parse_some
from t2i_jax.core.console import console
from t2i_jax.core.outputs import in_store
from t2i_jax.training.experiment import load_experiment


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """Train the model of a config, or go on with the run where it stopped.

    Every field of the config can be set: t2i train CONFIG --help lists them.
    Example: t2i train configs/glyphs_ar.py --run runs/mine --train.steps=500 --train.optimizer.learning-rate=1e-3
    """

    config: tyro.conf.Positional[Path]
    run: Path | None = None
    """run folder; unless given, the config where it is a run itself, else runs/NAME of the config file"""
    accept_changes: bool = False
    """go on with a config that is not that of the run so far; `history.jsonl` keeps what has changed, and when"""


def _home(path: Path) -> Path:
    """The run that a path is, or a new one by the name of the config file, or of the folder that a stored one is in."""
    if (path / "checkpoints").is_dir():
        return path
    folder = path if path.is_dir() else path.parent
    return Path("runs") / (path.stem if path.suffix == ".py" else folder.resolve().name)


def run(arguments: list[str]) -> None:
    if arguments and Path(arguments[0]).exists() and {"-h", "--help"} & set(arguments):
        config.load(arguments[0], ["--help"])
    args, rest = parse_some(TrainArguments, arguments, "t2i train")
    if in_store(args.config):
        raise ConfigError(f"{args.config}: a run in a store goes on by its config file and --run")
    experiment = load_experiment(args.config, rest)
    run = args.run or _home(args.config)
    train(experiment, run, args.accept_changes)
    if jax.process_index() == 0:
        console.print(f"{run}: done; metrics.jsonl, samples/ and checkpoints/ are there", soft_wrap=True)
