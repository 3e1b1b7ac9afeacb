"""Codes and text features computed once and stored, so that training reads them instead of images.

The records of a split are cut into blocks, and each block becomes a file. Processes divide the blocks among
themselves and compute on their own devices; a file appears whole or not at all, so interrupted work goes on with the
missing blocks, on any number of processes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from t2i_jax.core.config import ConfigError, differences, read_json, read_stored, refused, stored_form, to_json
from t2i_jax.core.console import bar, console
from t2i_jax.core.fields import values
from t2i_jax.core.migration import migrated
from t2i_jax.core.narrow import embeds_images, gives_features, learns_from_images
from t2i_jax.core.outputs import check_parent, whole_file, write_text
from t2i_jax.core.sharding import MeshConfig, batch_sharding, put_on_mesh, shardings
from t2i_jax.data.records import (
    INDEX,
    DataError,
    Record,
    count_records,
    may_become,
    put_in_place,
    shard_name,
    write_file,
)
from t2i_jax.storage.artifacts import on_host
from t2i_jax.text.clip import ClipEmbedding
from t2i_jax.text.retrieval import Neighbours
from t2i_jax.training.experiment import Experiment, as_floats, frozen_parts, make_store
from t2i_jax.training.watch import raise_peer_lost

log = logging.getLogger(__name__)
WORK = "work.json"


def encode_splits(
    experiment: Experiment, out: str | Path, splits: Sequence[str], batch_size: int, block: int = 8192
) -> Record:
    """Write an ArrayRecord data set of `codes` (with a codec), `low_codes` (if the model reads them), `features` (with
    a frozen text encoder) and `image_features` (with one that embeds images, too).

    Codes are of images cropped at the centre, with `Data.shapes` each to its own shape; without a codec the images stay
    with the records as they are. Captions, keys and licences stay too, and the records keep their order; features have
    a row for each caption. Broken records, those without a caption where features are computed (`Data.empty_captions`
    takes them) and too small images are left out, logged and counted; too many broken ones stop the work, as in
    training. A file holds up to `block` records. Batches are split over `data` and `fsdp` of the experiment's mesh,
    with several processes over the devices of each one. Unfinished work is in `OUT.partial`. Returns the index.

    Errors: `ConfigError` where the config has neither a codec nor a frozen text encoder, or where `OUT.partial` was
    begun with another config; `DataError` where something else is at `out`, where too many records are broken, or where
    a split has none to store.
    """
    out, data = Path(out), experiment.data
    may_become(out)
    check_parent(out)
    if (out / INDEX).exists() and "codec" not in read_json(out / INDEX):
        raise ConfigError(f"{out}: is a data set that `t2i encode` did not make; choose another --out")
    from_captions = gives_features(experiment.text) and not learns_from_images(experiment.text)
    text, keep = experiment.text if from_captions else None, not experiment.codec
    examples = {split: data.examples(split, text=text, files=keep) for split in splits}
    if not examples:
        raise ConfigError("--splits: name one at least")
    counts = {split: -(-len(e) // block) for split, e in examples.items()}
    folder, main = out.with_name(out.name + ".partial"), jax.process_index() == 0
    with raise_peer_lost():
        encoded = encoder(experiment, batch_size, max(map(len, examples.values())))
        if main:
            check_unfinished_work(folder, experiment, {split: len(e) for split, e in examples.items()}, block)
        multihost_utils.sync_global_devices("encode: begun")
        files = [(folder / shard_name(split, k, n), split, k) for split, n in counts.items() for k in range(n)]
        missing = [file for file in files if not file[0].exists()]
        multihost_utils.sync_global_devices("encode: what is missing is known")
        with bar() as progress:
            task = progress.add_task("encoding", total=None)
            for path, split, k in missing[jax.process_index() :: jax.process_count()]:
                ends = [len(examples[split]) * i // counts[split] for i in (k, k + 1)]
                records = encoded(examples[split].block(*ends, threads=data.threads))
                made = write_file(path, ({**record, "split": split} for record in records))
                progress.advance(task, made)
        for split, read in examples.items():
            if summary := read.summary():
                log.warning("%s: %s", split, summary)
        multihost_utils.sync_global_devices("encode: all is there")
        if main:
            found: Record = {split: {"count": 0, "shards": n, "order": "blocks"} for split, n in counts.items()}
            for path, split, _ in files:
                found[split]["count"] += count_records(path)
            for split, read in examples.items():
                if not (count := found[split]["count"]):
                    raise DataError(f"the split '{split}' has {len(read)} records, and none that can be stored")
                console.print(f"{split}: {count} of {len(read)} records are stored", soft_wrap=True, highlight=False)
            index = {"codec": experiment.codec, "image_size": data.image_size, "splits": found}
            write_text(folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False) + "\n")
            put_in_place(folder, out)
            (out / WORK).unlink()
        multihost_utils.sync_global_devices("encode: it is in its place")
    return json.loads((out / INDEX).read_text())


def check_unfinished_work(folder: Path, experiment: Experiment, records: dict[str, int], block: int) -> None:
    """Make the folder of unfinished work, or go on in it. Errors: `ConfigError` where it is that of another config."""
    data = experiment.data
    work = {"records": records, "block": block, "codec": experiment.codec, "text": experiment.text}
    fields = values(data)
    work |= {k: fields[k] for k in ("source", "held_out", "image_size", "fields")}
    work |= {k: fields[k] for k in ("smallest_side", "empty_captions", "shapes") if fields[k]}
    new = stored_form(work)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WORK
    if not path.exists() and any(p for p in folder.iterdir() if p.name != f".{WORK}"):
        raise ConfigError(
            f"{folder} is there, and is no unfinished work of `t2i encode`; remove it or choose another --out"
        )
    if path.exists() and (changed := differences(to_json(read_stored(path)), migrated(new))):
        raise ConfigError(
            f"{folder} holds unfinished work of another config; remove it, or choose another --out:\n  "
            + "\n  ".join(changed)
        )
    for left in folder.glob(".*"):  # half written when killed
        left.unlink()
    if not path.exists():
        (folder / f".{WORK}").write_text(json.dumps(new, indent=1))
        (folder / f".{WORK}").replace(path)


def encoder(experiment: Experiment, batch_size: int, most: int) -> Callable[[Iterable[Record]], Iterator[Record]]:
    """A function that adds the outputs of the frozen parts to records, on the devices of this process.

    most: records in a call; batches are not larger.
    """
    many = jax.process_count() > 1
    mesh = MeshConfig(1, -1).build(jax.local_devices()) if many else experiment.mesh.build()
    if batch_size % (rows := mesh.shape["data"] * mesh.shape["fsdp"]):
        raise ConfigError(f"--batch-size {batch_size} must be a multiple of the {rows} devices that it is split over")
    batch_size = min(batch_size, most + -most % rows)
    frozen, codec = frozen_parts(experiment)
    frozen.pop("loss", None)  # nothing is trained here
    if not frozen:
        raise ConfigError("the config has neither a codec nor a frozen text encoder: there is nothing to encode")
    frozen = put_on_mesh(frozen, shardings(frozen, mesh))
    store = jax.jit(make_store(codec.config if codec else None, experiment.text, experiment.model.batch_spec()))
    seen = codec or learns_from_images(experiment.text) or embeds_images(experiment.text)

    def ready(**arrays: Sequence[np.ndarray] | np.ndarray) -> Record:
        """The outputs of the frozen parts for up to a batch of rows, padded so that one program serves all."""
        rows = len(next(iter(arrays.values())))
        filled = {k: np.concatenate([v, np.repeat(v[-1:], batch_size - rows, 0)]) for k, v in arrays.items()}
        with jax.set_mesh(mesh):
            made = jax.device_get(store(frozen, put_on_mesh(filled, batch_sharding(mesh))))
        return {k: small(v[:rows]) for k, v in made.items()}

    def coded(records: list[Record]) -> list[Record]:
        """The outputs for the image of each record; images of one shape are a batch."""
        found: list[Record] = [{} for _ in records]
        for shape, rows in groups(r["image"].shape[:2] for r in records).items():
            for some in (rows[at : at + batch_size] for at in range(0, len(rows), batch_size)):
                made = ready(image=np.stack([records[row]["image"] for row in some]))
                for i, row in enumerate(some):
                    found[row] = {k: v[i : i + 1] if k == "features" else v[i] for k, v in made.items()}
                    found[row] |= {"size": list(shape)} if experiment.data.shapes else {}
        return found

    def batch(records: list[Record]) -> Iterator[Record]:
        """The records of one batch with their codes, and with features for each of their captions."""
        codes = coded(records) if seen else [{} for _ in records]
        by_caption: Record = {}
        if "text" in frozen and "features" not in codes[0]:  # else the captions' features are those of the images
            ids, mask = (np.concatenate(rows) for rows in zip(*(r["tokens"] for r in records), strict=True))
            chunks = [slice(at, at + batch_size) for at in range(0, len(ids), batch_size)]
            parts = [ready(text=ids[c], text_mask=mask[c]) for c in chunks]
            by_caption = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        row = 0
        for i, record in enumerate(records):
            rows = slice(row, row := row + len(record["tokens"][0]) if by_caption else 0)
            left_out = ("image", "tokens", "file", *(("crop",) if "file" in record else ()))
            rest = {k: v for k, v in record.items() if k not in left_out}
            rest |= {"image": record["file"]} if "file" in record else {}
            yield rest | codes[i] | {k: v[rows] for k, v in by_caption.items()}

    def encoded(records: Iterable[Record]) -> Iterator[Record]:
        records, count = iter(records), batch_size * len(experiment.data.all_shapes)
        while some := list(islice(records, count)):
            yield from batch(some)

    return encoded


def encode_database(experiment: Experiment, out: str | Path, split: str = "train", batch_size: int = 128) -> int:
    """Write the embeddings fp32 (n, k), not normalised, of a split's images by the CLIP of the config: `.npy`.

    It is the `database` of `text.retrieval.Neighbours`. Gives the number of images. Errors: `ConfigError` for a config
    without such a text, a file that is there, and several processes; `DataError` where no image can be read.
    """
    text, out = experiment.text, Path(out)
    clip = text.clip if isinstance(text, Neighbours) else text
    if not isinstance(clip, ClipEmbedding):
        raise ConfigError("--database: the embeddings are those of the config's `text`, Neighbours or ClipEmbedding")
    if out.suffix != ".npy" or out.exists():
        raise ConfigError(f"{out}: a file to write, .npy, that is not there yet")
    if jax.process_count() > 1:
        raise ConfigError("--database works in one process alone")
    check_parent(out)
    examples = experiment.data.with_shapes().examples(split)
    with refused("text"), on_host():
        model = clip.load()
    model = jax.tree.map(jnp.asarray, model)  # on the device once, not with each batch
    embed = jax.jit(lambda model, images: clip.embed_images(model, as_floats({"image": images})["image"]))
    records, parts = iter(examples), []
    while some := [record["image"] for record in islice(records, batch_size) if "image" in record]:
        images = np.stack(some + some[-1:] * (batch_size - len(some)))
        parts.append(np.asarray(embed(model, images), np.float32)[: len(some)])
    if not parts:
        raise DataError(f"the split '{split}' has no images that can be read")
    with whole_file(out) as temporary, temporary.open("wb") as file:  # of a path, NumPy would change the ending
        np.save(file, np.concatenate(parts))
    return sum(map(len, parts))


def groups(shapes: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    """The rows of each shape, shapes in the order in which they come."""
    found: dict[tuple[int, ...], list[int]] = {}
    for row, shape in enumerate(shapes):
        found.setdefault(shape, []).append(row)
    return found


def small(x: np.ndarray) -> np.ndarray:
    """Codes in the smallest unsigned type that holds any vocabulary of the field; other arrays as they are."""
    return x.astype(np.uint16) if x.dtype.kind == "i" and x.max(initial=0) < 2**16 else x
