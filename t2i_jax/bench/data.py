"""Making batches: images decoded and cropped, and records of codes read, against the limits here.

The limits are of one thread: an image's file decoded by pillow and nothing else, and a record's bytes read by
ArrayRecord and nothing else. The demand is that of chips that train at half of their peak.
"""

from __future__ import annotations

import dataclasses
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
from PIL import Image

from t2i_jax.bench.measure import Arguments, Result, interleaved, print_results, read_arguments, table
from t2i_jax.core import flops
from t2i_jax.core.config import ConfigError
from t2i_jax.core.fields import Range, Size, Workers
from t2i_jax.core.params import abstract
from t2i_jax.data.images import draft_side
from t2i_jax.data.pipeline import Data
from t2i_jax.data.records import Record, write_records
from t2i_jax.data.sources import ArrayRecord, Folder
from t2i_jax.plan.chips import CHIPS
from t2i_jax.presets import OF_AR

MFU = 0.5


def draw_images(folder: Path, suffix: str, count: int, size: int) -> int:
    """Images size x size of soft shapes with some grain, each with a caption; returns their bytes an image.

    They compress about as photographs do: neither flat colour nor noise.
    """
    rng = np.random.default_rng(0)
    total = 0
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        grain = rng.normal(0, 6, (size, size, 1))
        image = Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))
        file = folder / f"{i:05d}.{suffix}"
        image.save(file, quality=90) if suffix == "jpg" else image.save(file)
        file.with_suffix(".txt").write_text(f"image {i}\n")
        total += file.stat().st_size
    return total // count


def rate(batches: Iterator[object], size: int, wanted: int) -> float:
    """Examples a second over at least `wanted` of them, after what was made ahead is used up."""
    for _ in range(2):
        next(batches)
    start, count = time.perf_counter(), 0
    while count < wanted:
        next(batches)
        count += size
    return count / (time.perf_counter() - start)


def bench_images(suffix: str, side: int, image_size: int, count: int, workers: int, repeats: int) -> Result:
    """Images of `side` from files to crops of `image_size`: examples/s, and decodes/s of pillow alone."""
    with tempfile.TemporaryDirectory() as name:
        size = draw_images(Path(name), suffix, count, side)
        files = [f.read_bytes() for f in sorted(Path(name).glob(f"*.{suffix}"))]
        data = Data(Folder(name), image_size=image_size, batch_size=16, crop="random", workers=workers, threads=1)

        needed = draft_side(image_size, data.smallest_crop)

        def alone() -> float:
            start = time.perf_counter()
            for file in files:
                image = Image.open(io.BytesIO(file))
                image.draft(None, (needed, needed))
                image.load()
            return len(files) / (time.perf_counter() - start)

        return _measured(f"{suffix}, {side} to {image_size}", data, size, alone, count, workers, repeats)


def bench_codes(grid: int, features: tuple[int, int], count: int, workers: int, repeats: int) -> Result:
    """Records of codes (and of text features) to batches: examples/s, and reads/s of ArrayRecord alone."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    rng = np.random.default_rng(0)
    fields: Record = {"codes": rng.integers(0, 16384, (grid, grid)).astype(np.uint16)}
    if features[0]:
        fields["features"] = rng.standard_normal((1, *features), np.float32).astype(np.float16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "codes")
        write_records(folder, ({**fields, "captions": [f"image {i}"], "key": str(i)} for i in range(count)))
        files = [str(f) for f in folder.glob("*.arrayrecord")]
        size = sum(Path(f).stat().st_size for f in files) // count
        raw = ArrayRecordDataSource(files)
        data = Data(ArrayRecord(str(folder)), batch_size=64, workers=workers, threads=1)

        def alone() -> float:
            start = time.perf_counter()
            for i in range(count):
                raw[i]
            return count / (time.perf_counter() - start)

        about = f"codes {grid}x{grid}" + (f", features {features[0]}x{features[1]}" if features[0] else "")
        return _measured(about, data, size, alone, count, workers, repeats)


def _measured(
    name: str, data: Data, size: int, alone: Callable[[], float], count: int, workers: int, repeats: int
) -> Result:
    stream = data.batches()
    with closing(stream):
        made = lambda: rate(stream, data.batch_size, count)
        found, spread = interleaved({"per_second": made, "limit": alone}, repeats)
    cores = max(workers, 1)
    return {
        "name": name,
        "bytes": size,
        "workers": workers,
        **found,
        "spread": spread["per_second"],
        "per_core": found["per_second"] / cores,
        "of_limit": found["per_second"] / cores / found["limit"],
    }


def need(size: str, chip: str) -> float:
    """Images a second that one chip takes which trains `presets.OF_AR[size]` on 16 x 16 codes at half of its peak."""
    config = dataclasses.replace(OF_AR[size], vocabulary=16384, grid=(16, 16))
    model = abstract(config)
    batch = {"codes": jax.ShapeDtypeStruct((1, 16, 16), np.int32), "label": jax.ShapeDtypeStruct((1,), np.int32)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    work = 3 * flops.count(lambda m, b, k: config.loss(m, b, k).loss, model, batch, key)
    return MFU * CHIPS[chip].flops / work


@dataclasses.dataclass(frozen=True)
class DataBench(Arguments):
    """Examples a second from image files and from codes, against what chips consume. All data are made for the run.

    Example: t2i bench data --workers 2 --out data.json
    """

    side: Annotated[int, Range(1, 8192)] = 512
    """of the images in the files"""
    image_size: Annotated[int, Range(1, 8192)] = 256
    """of the crops"""
    images: Size = 128
    records: Size = 4096
    workers: Workers = 0
    """processes that make batches; 0: one thread of this one"""
    repeats: Size = 3
    chips: tuple[str, ...] = ("v5e", "v5p", "h100")
    shapes: tuple[str, ...] = ("llamagen-b", "llamagen-xl")


ROWS: dict[str, Callable[[Result], str]] = {
    "examples / s": lambda r: f"{r['per_second']:.0f} (spread {r['spread']:.0%})",
    "per core": lambda r: f"{r['per_core']:.0f}",
    "decoding or reading alone": lambda r: f"{r['limit']:.0f}",
    "share of that": lambda r: f"{r['of_limit']:.0%}",
    "KB an example": lambda r: f"{r['bytes'] / 1e3:.1f}",
}


def main(arguments: list[str]) -> None:
    """`t2i bench data ...`"""
    a, _ = read_arguments(DataBench, arguments, "t2i bench data")
    for flag, given, known in (("--chips", a.chips, CHIPS), ("--shapes", a.shapes, OF_AR)):
        if odd := [name for name in given if name not in known]:
            raise ConfigError(f"{flag} {odd[0]!r}: one of {', '.join(known)}")
    results = [bench_images(s, a.side, a.image_size, a.images, a.workers, a.repeats) for s in ("jpg", "png")]
    results += [bench_codes(16, f, a.records, a.workers, a.repeats) for f in ((0, 0), (120, 2048))]
    rows = dict(ROWS)
    for shape in a.shapes:
        for chip in a.chips:
            takes = need(shape, chip)
            for r in results:
                r.setdefault("cores_a_chip", {})[f"{shape} on {chip}"] = takes / r["per_core"]
            about = f"cores a chip: {shape} on {chip}, {takes:.0f} / s"
            rows[about] = lambda r, at=f"{shape} on {chip}": f"{r['cores_a_chip'][at]:.2f}"
    title = f"making batches, {a.workers or 'one thread, no'} worker processes"
    print_results("data", results, table(title, results, rows), a.out)
