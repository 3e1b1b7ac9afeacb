"""Neighbour indexes: embeddings of the records of a source, and the nearest records of each or of other images.

The records are cut into blocks, and each block becomes a file that appears whole or not at all, so interrupted work
goes on with the missing ones, on any number of processes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors import safe_open
from safetensors.numpy import save_file

from t2i_jax.core import image_files
from t2i_jax.core.config import ConfigError, differences, stored_form
from t2i_jax.core.console import bar, console
from t2i_jax.core.fields import values
from t2i_jax.core.migration import Object, migrated
from t2i_jax.core.outputs import MAKER, check_free, check_parent, check_utf8, whole_file, write_json
from t2i_jax.core.sharding import own_mesh, put_on_mesh, shardings
from t2i_jax.core.unfinished import WORK, go_on
from t2i_jax.data.examples import Examples
from t2i_jax.data.images import open_image
from t2i_jax.data.pipeline import Data
from t2i_jax.data.records import DataError, Record, title
from t2i_jax.data.transforms import to_square
from t2i_jax.evaluation.embedders import Embedder
from t2i_jax.evaluation.features import batches
from t2i_jax.nn.search import EmbeddingTable, search
from t2i_jax.text.index import FACTS, VERSION, Index, is_index, parts_of, read_index
from t2i_jax.text.retrieval import first_caption
from t2i_jax.training.experiment import Experiment
from t2i_jax.training.watch import raise_peer_lost

How = Literal["exact", "faiss", "usearch"]
Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""(queries fp32 (n, k), count) -> cosines fp32 and numbers of rows int (n, count), by falling cosine"""
COMMAND = "t2i data neighbours"
QUERIES = 1024
"""queries of a batch"""


def build_index(
    experiment: Experiment, embedder: Embedder, out: str | Path, split: str = "train", block: int = 8192
) -> Index:
    """The index of a split by an encoder, at `out`; made where it is not there, and unfinished work is continued.

    Broken and too small records are left out, logged and counted. Errors: `ConfigError` where something else is at
    `out`, an index of other records or by another encoder too, and where `OUT.partial` was begun with another config;
    `DataError` where too many records are broken, or all.
    """
    out, data = Path(out), experiment.data.with_shapes()  # encoders see squares
    check_utf8(out)
    check_parent(out)
    examples = data.examples(split, captions=embedder.of == "captions")
    work = work_of(data, split, embedder, len(examples))
    if is_index(out):
        return _of_same(out, work)
    if os.path.lexists(out):
        raise ConfigError(f"{out}: exists and is no index of `{COMMAND}`; choose another --out")
    folder, files = out.with_name(out.name + ".partial"), -(-len(examples) // block)
    with raise_peer_lost():
        if jax.process_index() == 0:
            go_on(folder, work | {"block": block}, COMMAND)
        multihost_utils.sync_global_devices("neighbours: begun")
        paths = [folder / f"embeddings-{k:05d}-of-{files:05d}.safetensors" for k in range(files)]
        missing = [k for k in range(files) if not paths[k].exists()]
        multihost_utils.sync_global_devices("neighbours: what is missing is known")
        with bar() as progress:
            task = progress.add_task("embedding", total=len(examples), completed=(files - len(missing)) * block)
            for k in missing[jax.process_index() :: jax.process_count()]:
                ends = [len(examples) * i // files for i in (k, k + 1)]
                numbers, rows = [np.zeros(0, np.int64)], []
                for some, vectors in embedder.numbered(examples.numbered(*ends, threads=data.threads)):
                    numbers.append(some)
                    rows.append(vectors)
                    progress.advance(task, len(some))
                with whole_file(paths[k]) as temporary:
                    record = np.concatenate(numbers)
                    save_file({"record": record, "embedding": np.concatenate(rows or [np.zeros((0, 0))])}, temporary)
        multihost_utils.sync_global_devices("neighbours: all is there")
        if jax.process_index() == 0:
            _finish(folder, out, work, paths)
        multihost_utils.sync_global_devices("neighbours: it is in its place")
    if summary := examples.summary():
        console.print(f"{split}: {summary}", style="yellow", soft_wrap=True, highlight=False)
    return read_index(out)


def work_of(data: Data, split: str, embedder: Embedder, count: int) -> dict[str, object]:
    """What an index depends on; the names of some records tell the source apart from others at the same path."""
    source = {"split": split, "image_size": data.image_size, "source": data.split(split)}
    names = dict(data.describe((split,))[split])
    fields = {k: v for k, v in values(data).items() if k in ("smallest_side", "empty_captions") and v}
    by = {"encoder": embedder.name, "digest": embedder.digest, "of": embedder.of}
    return {**by, "records": count, "names": names["names"], **source, **fields}


def _of_same(out: Path, work: Mapping[str, object]) -> Index:
    """The index at `out`. Errors: `ConfigError` where it is one of other work."""
    index = read_index(out)
    old, new = (migrated(form) for form in (cast(Object, index.facts.get("work") or {}), stored_form(dict(work))))
    moved = lambda form: {k: v for k, v in form.items() if k != "source"}  # its records say whether it is the same
    if changed := differences(moved(old), moved(new)):
        said = "\n  ".join(changed)
        raise ConfigError(f"{out}: is an index of something else; remove it, or choose another --out:\n  {said}")
    return index


def _finish(folder: Path, out: Path, work: Mapping[str, object], paths: Sequence[Path]) -> None:
    """Write what the index is of, and put it in its place; blocks without usable records are removed."""
    count, width, kept = 0, 0, 0
    for path in paths:
        with safe_open(path, "np") as file:
            n, k = file.get_slice("embedding").get_shape()
        if n:
            count, width, kept = count + n, k, kept + 1
        else:
            path.unlink()
    if not count:
        raise DataError(f"{out}: no record of the split '{work['split']}' can be read")
    facts = {"version": VERSION, "count": count, "width": width, "files": kept}
    by = {name: work[name] for name in ("encoder", "digest", "of")}
    write_json(folder / FACTS, facts | by | {"work": stored_form(dict(work))})
    (folder / WORK).unlink()
    os.replace(folder, out)


def searcher(index: Index, experiment: Experiment, how: How = "exact") -> Search:
    """A search of an index: exact, on all devices of the mesh, or approximate on the host, by a graph of a library that
    the user has. Errors: `ConfigError` that names the package to install."""
    if how != "exact":
        return approximate(index.rows, how)
    mesh = own_mesh(experiment.mesh)
    table = EmbeddingTable(jnp.asarray(index.rows))
    table = put_on_mesh(table, shardings(table, mesh))
    found = jax.jit(search, static_argnums=2)

    def run(queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        with jax.set_mesh(mesh):
            for rows, n in batches(len(queries), min(QUERIES, len(queries))):
                some = found(table, queries[rows], count)
                parts.append((np.asarray(some.cosines)[:n], np.asarray(some.rows)[:n]))
        cosines, numbers = zip(*parts, strict=True)
        return np.concatenate(cosines), np.concatenate(numbers)

    return run


def approximate(rows: np.ndarray, how: Literal["faiss", "usearch"]) -> Search:
    """The search of a graph of small worlds (HNSW), by cosine. Errors: `ConfigError` where the package is missing."""
    units = np.ascontiguousarray(_unit(rows))
    try:
        if how == "faiss":
            import faiss  # pyright: ignore[reportMissingImports]

            graph = faiss.IndexHNSWFlat(units.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
            graph.hnsw.efConstruction = graph.hnsw.efSearch = 128
            graph.add(units)
            return lambda queries, count: graph.search(np.ascontiguousarray(_unit(queries)), count)
        from usearch.index import Index as Graph  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        package = {"faiss": "faiss-cpu", "usearch": "usearch"}[how]
        raise ConfigError(f"--search {how}: pip install {package}, or --search exact ({error})") from error
    graph = Graph(ndim=units.shape[1], metric="cos", dtype="f32", expansion_add=128, expansion_search=128)
    graph.add(np.arange(len(units)), units)

    def run(queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        found = graph.search(np.ascontiguousarray(_unit(queries)), count)
        keys = np.asarray(found.keys).reshape(len(queries), -1).astype(np.int64)
        return 1 - np.asarray(found.distances, np.float32).reshape(keys.shape), keys

    return run


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def recall(index: Index, exact: Search, other: Search, count: int, most: int = 1000) -> float:
    """The share of the true `count` nearest rows of evenly spaced rows, themselves included, that a search finds."""
    chosen = index.rows[np.linspace(0, len(index.rows) - 1, min(most, len(index.rows))).round().astype(int)]
    truth, found = exact(chosen, count)[1], other(chosen, count)[1]
    return float(np.mean([len(set(a) & set(b)) / count for a, b in zip(truth, found, strict=True)]))


def write_neighbours(index: Index, out: Path, find: Search, count: int, how: How = "exact") -> None:
    """Of each record of an index its `count` nearest others: `neighbours-*.safetensors` with `record` int64 (n, count)
    and `cosine` fp32 (n, count), rows as in the file of the embeddings. Files that are there are kept, if they are of
    the same count and search. Errors: `ConfigError` for fewer records.
    """
    if len(index.rows) <= count:
        raise ConfigError(f"--count {count}: the index has {len(index.rows)} records, itself included")
    about, first = {"count": str(count), "search": how, "made_by": MAKER}, 0
    with bar() as progress:
        task = progress.add_task("neighbours", total=len(index.rows))
        for path in parts_of(out):
            target = path.with_name(path.name.replace("embeddings", "neighbours"))
            with safe_open(path, "np") as file:
                rows = np.arange(first, first := first + file.get_slice("embedding").get_shape()[0])
            if not (target.exists() and _said(target) == about):
                cosines, found = without_itself(*find(index.rows[rows], count + 1), rows)
                with whole_file(target) as temporary:
                    save_file({"record": index.records[found], "cosine": cosines}, temporary, metadata=about)
            progress.advance(task, len(rows))


def write_pairs(index: Index, data: Data, split: str, out: Path) -> None:
    """The images of the records of an index and a caption of each, the first: `pairs-*.safetensors`, for texts that
    read both (`text.index.read_pairs`). Files that are there are kept.

    Errors: `ConfigError` for records without images, `DataError` for one that can no longer be read.
    """
    work = cast(Object, index.facts.get("work") or {})
    source = lambda form: migrated(form).get("source")
    if differences(source(work), source(stored_form({"source": data.split(split)}))):
        raise ConfigError(f"{out}: --pairs: its embeddings are of data of another path; make them anew of these")
    examples, first = data.with_shapes().examples(split), 0
    with bar() as progress:
        task = progress.add_task("images and captions", total=len(index.rows))
        for path in parts_of(out):
            with safe_open(path, "np") as file:
                records = index.records[first : (first := first + file.get_slice("embedding").get_shape()[0])]
            target = path.with_name(path.name.replace("embeddings", "pairs"))
            if not target.exists():
                found = dict(examples.numbered(int(records.min()), int(records.max()) + 1, data.threads))
                if lost := [i for i in records if i not in found]:
                    raise DataError(f"{out}: record {lost[0]} of the index cannot be read any more")
                if any("image" not in found[i] for i in records):
                    raise ConfigError(f"{out}: --pairs: the records have no images; name data that are not encoded")
                captions = [first_caption(found[i]) for i in records]
                with whole_file(target) as temporary:
                    arrays = {"record": records, "image": np.stack([found[i]["image"] for i in records])}
                    save_file(arrays, temporary, metadata={"captions": json.dumps(captions), "made_by": MAKER})
            progress.advance(task, len(records))


def without_itself(cosines: np.ndarray, found: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest (n, count) of rows (n,) among those found (n, count + 1): without the row itself, or without the last
    where it is not among them. Equals of a row are others."""
    own = found == rows[:, None]
    own[:, -1] |= ~own.any(1)
    keep = lambda x: x[~own].reshape(len(rows), -1)
    return keep(cosines).astype(np.float32), keep(found)


def _said(path: Path) -> dict[str, str]:
    with safe_open(path, "np") as file:
        return file.metadata() or {}


def sheet_of_records(index: Index, data: Data, split: str, out: Path, count: int, rows: int) -> None:
    """`neighbours.png`: evenly spaced records of an index, and right of each its neighbours with their cosines."""
    examples = data.with_shapes().examples(split)
    read = {_number(path): path for path in parts_of(out, "neighbours")}
    chosen = np.linspace(0, len(index.rows) - 1, min(rows, len(index.rows))).round().astype(int)
    records, cosines = _read_neighbours(read, chosen)
    cells: list[tuple[np.ndarray, str]] = []
    for row, others, near in zip(chosen, records, cosines, strict=True):
        query = examples[int(index.records[row])]
        if "image" not in query:
            console.print(f"{out}: no sheet, as the records have no images")
            return
        cells.append((query["image"], title(query)))
        cells += [_captioned(examples, int(i), c) for i, c in zip(others, near, strict=True)]
    _save_sheet(cells, out / "neighbours.png", count)


def neighbours_of_images(
    index: Index,
    experiment: Experiment,
    split: str,
    embedder: Embedder,
    find: Search,
    images: Path,
    out: Path,
    count: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The records of an index nearest to the images in a folder: cosines (n, count) and numbers of records (n, count).

    Written next to the index, `out`, as `nearest-FOLDER.json`, a line for each image, and `nearest-FOLDER.png` with the
    first 64. Errors: `ConfigError` where there are no images, for an index of captions, and for files in the way.
    """
    if embedder.of != "images":
        raise ConfigError("--images: the index is one of captions; build it --of images")
    page, sheet = (out / f"nearest-{images.absolute().name}{ending}" for ending in (".json", ".png"))
    check_free(page, sheet)
    files = images_in(images)
    data = experiment.data.with_shapes()
    size, examples = data.image_size, data.examples(split)
    queries: list[Record] = [{"image": square_of(path, size)} for path in files]
    cosines, rows = find(embedder(queries), count)
    records = index.records[rows]
    cells: list[tuple[np.ndarray, str]] = []
    for query, path, others, near in list(zip(queries, files, records, cosines, strict=True))[:64]:
        cells.append((query["image"], image_files.read_png_text(path).get("prompt", "") or path.name))
        cells += [_captioned(examples, int(i), c) for i, c in zip(others, near, strict=True)]
    _save_sheet(cells, sheet, count)
    keys = [[str(examples[int(i)].get("key", "")) for i in some] for some in records]
    lines = [
        {"image": path.name, "records": r.tolist(), "keys": k, "cosines": c.tolist()}
        for path, r, k, c in zip(files, records, keys, cosines, strict=True)
    ]
    write_json(page, {"index": dict(index.facts), "images": lines})
    return cosines, records


def images_in(folder: Path) -> list[Path]:
    """The images of a folder: those that `t2i sample` numbered, or all PNG and JPEG files where there are none.

    Errors: `ConfigError` where there is none.
    """
    some = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    numbered = [p for p in some if p.stem.isdigit()]
    if not some:
        raise ConfigError(f"{folder}: there is no image in it")
    return numbered or some


def square_of(path: Path, size: int) -> np.ndarray:
    """The middle of an image file, uint8 (size, size, 3)."""
    return to_square(open_image(path, size, 1.0), size)


def _captioned(examples: Examples, record: int, cosine: float) -> tuple[np.ndarray, str]:
    found = examples[record]
    return found["image"], f"{cosine:.2f} {found.get('label_text') or title(found)}"


def _save_sheet(cells: Sequence[tuple[np.ndarray, str]], path: Path, count: int) -> None:
    images, captions = zip(*cells, strict=True)
    image_files.save_png(image_files.grid(np.stack(images), list(captions), columns=1 + count), path)


def _number(path: Path) -> str:
    return path.name.partition("-")[2]


def _read_neighbours(files: Mapping[str, Path], chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Records and cosines of the chosen rows of an index, from the files that `write_neighbours` wrote."""
    records, cosines, first = [], [], 0
    for name in sorted(files):
        with safe_open(files[name], "np") as file:
            several = file.get_tensor("record")
            own = chosen[(chosen >= first) & (chosen < first + len(several))] - first
            records.append(several[own])
            cosines.append(file.get_tensor("cosine")[own])
        first += len(several)
    return np.concatenate(records), np.concatenate(cosines)


def facts_line(index: Index, out: Path) -> str:
    """What was made, in a line."""
    facts = dict(index.facts)
    return f"{out}: {facts['count']} {facts['of']} by {facts['encoder']}, {facts['width']} numbers each"
