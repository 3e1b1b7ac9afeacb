"""Codes and text features computed once and stored, so that training reads them instead of pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t2i_jax.config import ConfigError
from t2i_jax.data.records import Record, write_records
from t2i_jax.parallel import batch_sharding, shardings
from t2i_jax.progress import bar
from t2i_jax.training.experiment import Experiment, frozen_parts, make_prepare


def encode_splits(experiment: Experiment, out: Path, splits: Sequence[str], batch_size: int) -> Record:
    """Write an ArrayRecord data set of `codes` (with a codec) and `features` (with a frozen text encoder).

    Pictures are cropped at the centre; captions, keys and licences stay with the records; features have a row for each
    caption. Batches are split over `data` and `fsdp` of the experiment's mesh. Returns the index.
    Errors: `ConfigError` where the config has neither a codec nor a frozen text encoder.
    """
    mesh = experiment.mesh.build()
    frozen, codec = frozen_parts(experiment)
    frozen.pop("loss", None)  # nothing is trained here
    if not frozen:
        raise ConfigError("the config has neither a codec nor a frozen text encoder: there is nothing to encode")
    with jax.set_mesh(mesh):
        frozen = jax.device_put(frozen, shardings(frozen, mesh))
        prepare = jax.jit(make_prepare(codec.config if codec else None, experiment.text))

        def ready(**arrays: Sequence[Any] | np.ndarray) -> Record:
            """What the frozen parts make of up to a batch of rows, filled up so that one program serves all."""
            rows = len(next(iter(arrays.values())))
            filled = {k: np.concatenate([v, np.repeat(v[-1:], batch_size - rows, 0)]) for k, v in arrays.items()}
            made = jax.device_get(prepare(frozen, jax.device_put(filled, batch_sharding(mesh))))
            return {k: small(v[:rows]) for k, v in made.items() if k in ("codes", "latents", "features", "text_mask")}

        def encoded(records: list[Record]) -> Iterator[Record]:
            """The records of one batch with their codes, and with features for each of their captions."""
            seen = codec or hasattr(experiment.text, "image_features")
            codes = ready(image=np.stack([r["image"] for r in records])) if seen else {}
            by_caption: Record = {}
            if "text" in frozen and "features" not in codes:
                captions = [caption for r in records for caption in captions_of(r)]
                chunks = [captions[at : at + batch_size] for at in range(0, len(captions), batch_size)]
                parts = [ready(**dict(zip(("text", "text_mask"), experiment.text(c), strict=True))) for c in chunks]
                by_caption = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
            row = 0
            for i, record in enumerate(records):
                rows = slice(row, row := row + len(captions_of(record)))
                rest = {k: v for k, v in record.items() if k != "image"}
                one = {k: v[i : i + 1] if k == "features" else v[i] for k, v in codes.items()}
                yield rest | one | {k: v[rows] for k, v in by_caption.items()}

        def every() -> Iterator[Record]:
            for split in splits:
                examples = experiment.data.examples(split)
                with bar() as progress:
                    task = progress.add_task(f"encoding {split}", total=len(examples))
                    records = iter(examples)
                    while some := list(islice(records, batch_size)):
                        yield from ({**r, "split": split} for r in encoded(some))
                        progress.advance(task, len(some))

        about = {"codec": experiment.codec, "image_size": experiment.data.image_size}
        return write_records(out, every(), about=about)


def captions_of(record: Record) -> Sequence[str]:
    return record.get("captions") or [""]


def small(x: np.ndarray) -> np.ndarray:
    """Codes in the smallest unsigned type that holds any vocabulary of the field; other arrays as they are."""
    return x.astype(np.uint16) if x.dtype.kind == "i" and x.max(initial=0) < 2**16 else x
