"""Codes and text features computed once and stored, so that training reads them instead of pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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

    Pictures are cropped at the centre; captions, keys and licences stay with the records; features are those of the
    first caption. Batches are split over `data` and `fsdp` of the experiment's mesh. Returns the index.
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

        def encoded(records: list[Record]) -> Iterable[Record]:
            """The records of one batch; a short batch is filled up, so that one program serves all."""
            filled = records + records[-1:] * (batch_size - len(records))
            seen = hasattr(experiment.text, "image_features")
            batch: dict[str, Any] = {"image": np.stack([r["image"] for r in filled])} if codec or seen else {}
            if "text" in frozen and not seen:
                batch["text"], batch["text_mask"] = experiment.text([r["captions"][0] for r in filled])
            ready = jax.device_get(prepare(frozen, jax.device_put(batch, batch_sharding(mesh))))
            kept = {k: v for k, v in ready.items() if k in ("codes", "latents", "features", "text_mask")}
            for i, record in enumerate(records):
                rest = {k: v for k, v in record.items() if k != "image"}
                yield rest | {k: small(v[i]) for k, v in kept.items()}

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


def small(x: np.ndarray) -> np.ndarray:
    """Codes in the smallest unsigned type that holds any vocabulary of the field; other arrays as they are."""
    return x.astype(np.uint16) if x.dtype.kind == "i" and x.max(initial=0) < 2**16 else x
