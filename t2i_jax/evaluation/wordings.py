"""How well a text encoder knows a training caption in new words, before anything is trained on it.

    python -m t2i_jax.evaluation.wordings configs/zoo.py --encoder minilm --data.source.path=data/glyphs_all

The caption of each of some training images, in a wording that no training caption has (`unseen_caption`), is compared
with the first caption of every training image, by the cosine of the encoder's vectors; counted is how often the nearest
one is of the same image: what the vectors tell apart before a model has learned which of their differences matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from t2i_jax.core.config import ConfigError, parse_some
from t2i_jax.core.console import stdout
from t2i_jax.core.fields import Checked, Range
from t2i_jax.core.outputs import check_free, local, write_json
from t2i_jax.core.sharding import own_mesh
from t2i_jax.data.records import Record
from t2i_jax.evaluation.alignment import unit
from t2i_jax.evaluation.embedders import Embedder, load_embedder
from t2i_jax.evaluation.program import as_program
from t2i_jax.evaluation.run import records_of, wording
from t2i_jax.training.experiment import load_experiment

NAMES = ("concept", "style")
"""Fields of a record, of which the share with an equal value is counted too."""


@dataclasses.dataclass(frozen=True)
class WordingsArguments(Checked):
    """How often the training caption nearest to a new wording is of the same image, by a text encoder."""

    config: tyro.conf.Positional[Path]
    """its data have images, and are those of training"""
    encoder: str = ""
    """minilm, or KIND:FOLDER as of `t2i data neighbours`; the config's text unless given"""
    count: Annotated[int, Range(low=2)] = 300
    """training images whose new wording is looked for, evenly spaced"""
    most: Annotated[int, Range(low=2)] = 100_000
    """training images among which it is looked for"""
    out: Path | None = None
    """a JSON file of the numbers"""


def known(records: Sequence[Record], embed: Embedder, count: int) -> dict[str, float]:
    """Shares of `count` evenly spaced records whose new wording is nearest to the caption of the same image, or of one
    of the same concept or style, where records have these.

    Errors: `ConfigError` for records without new wordings.
    """
    rows = np.unique(np.linspace(0, len(records) - 1, count).round().astype(int))
    if not any("unseen_caption" in records[row] for row in rows):
        raise ConfigError("the data keep no new wordings: no record has an 'unseen_caption'")
    new = [{"captions": [wording(records[row])]} for row in rows]
    near = np.argmax(unit(embed(new)) @ unit(embed(records)).T, 1)
    pairs = [(records[a], records[b]) for a, b in zip(near, rows, strict=True)]
    shares = {f"same {name}": np.mean([a[name] == b[name] for a, b in pairs]) for name in NAMES if name in records[0]}
    return {name: float(share) for name, share in {"same image": np.mean(near == rows), **shares}.items()}


def main(arguments: Sequence[str]) -> None:
    args, rest = parse_some(WordingsArguments, list(arguments), "python -m t2i_jax.evaluation.wordings")
    if args.out:
        check_free(local(args.out))
    experiment = load_experiment(args.config, rest)
    embed = load_embedder(args.encoder, experiment.text, "captions", own_mesh(experiment.mesh), 128)
    records = records_of(experiment.data, "train", args.most, captions=True)
    shares = known(records, embed, args.count)
    report = {"encoder": embed.name, "images": len(records), **{k: round(v, 4) for k, v in shares.items()}}
    if args.out:
        write_json(args.out, report)
    stdout().print_json(data=report)


if __name__ == "__main__":
    as_program(main)
