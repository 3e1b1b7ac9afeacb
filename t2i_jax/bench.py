"""Speeds beside the limits of this machine, measured in the same run and in turns: a busy machine slows down both.

`t2i bench sample` decodes images from random weights and compares with the bound of a memory-bound decoder,

    T = sum over tokens of max(2 N R / F, W / B) + cache bytes / B,

N the matrix parameters, R the rows (2 an image with guidance), W the bytes of the weights, F FLOP/s, B bytes/s.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax import Array
from rich.console import Console
from rich.table import Table

from t2i_jax.models.ar import AR, SIZES
from t2i_jax.nn.condition import Classes


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call, until its arrays are there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def limits(dtype: str = "float32", size: int = 0) -> dict[str, Callable[[], float]]:
    """Measurements of this device: FLOP/s of a square matrix product, bytes/s of a read and of a copy.

    Each call of a function measures once. The arrays are larger than the caches; size: bytes of the largest one.
    """
    accelerator = jax.default_backend() != "cpu"
    n = 8192 if accelerator else 2048
    size = size or (2**31 if accelerator else 2**28)
    square = jax.random.normal(jax.random.key(0), (n, n), dtype)
    big = jnp.ones(size // 4, jnp.float32)
    multiply, total, copy = jax.jit(jnp.matmul), jax.jit(jnp.sum), jax.jit(lambda x: x + 1)
    jax.block_until_ready((multiply(square, square), total(big), copy(big)))  # compiled
    return {
        "flops": lambda: 2 * n**3 / seconds(lambda: multiply(square, square)),
        "read": lambda: size / seconds(lambda: total(big)),
        "copy": lambda: 2 * size / seconds(lambda: copy(big)),
    }


def measure_limits(dtype: str = "float32", repeats: int = 3) -> dict[str, float]:
    """The best of `repeats` measurements: `flops` in FLOP/s, `read` and `copy` in bytes/s."""
    return {name: max(measure() for _ in range(repeats)) for name, measure in limits(dtype).items()}


def decode_bound(config: AR, rows: int, flops: float, bandwidth: float) -> float:
    """Least seconds to decode an image in every one of `rows` rows, with a cache of exactly the tokens so far.

    Weights are read once a token, in the dtype of the computation, and so is the cache.
    """
    layer, size = config.layer, jnp.dtype(config.dtype).itemsize
    attention = layer.width * layer.head * 2 * (layer.heads + layer.groups)
    weights = config.depth * (attention + 3 * layer.width * layer.inner) + layer.width * config.vocabulary
    step = max(2 * weights * rows / flops, weights * size / bandwidth)
    per_token = rows * config.depth * 2 * layer.groups * layer.head * size
    seen = sum(config.condition.length + i for i in range(1, config.length + 1))
    return config.length * step + seen * per_token / bandwidth


def bench_sample(config: AR, batch: int, guided: bool = True, segments: int = 0, repeats: int = 3) -> dict[str, float]:
    """Decoding speed of `config` with random weights beside its bound; limits and decoding measured in turns.

    Returns seconds and its spread, compile seconds, images/s, tokens/s, the limits, the bound in seconds, and
    `of_bound`, the share of the bound that is reached, from the medians.
    """
    model = jax.jit(config.init)(jax.random.key(0))
    condition = {"label": jnp.arange(batch, dtype=jnp.int32)}
    keys = jax.random.split(jax.random.key(1), batch)
    options = dataclasses.replace(config.options(), top_k=min(2000, config.vocabulary // 2), top_p=0.95)

    def decode() -> Array:
        return config.sample(model, condition, keys, options, guided=guided, segments=segments)

    first = seconds(decode)
    measures = {"seconds": lambda: seconds(decode), **limits(config.dtype)}
    taken: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(repeats):
        for name, measure in measures.items():
            taken[name].append(measure())
    found = {name: statistics.median(values) for name, values in taken.items()}
    bound = decode_bound(config, batch * (1 + guided), found["flops"], found["read"])
    return {
        "batch": batch,
        "parameters": sum(x.size for x in jax.tree.leaves(model)),
        **found,
        "spread": (max(taken["seconds"]) - min(taken["seconds"])) / found["seconds"],
        "compile": first - found["seconds"],
        "images_per_second": batch / found["seconds"],
        "tokens_per_second": batch * config.length / found["seconds"],
        "bound": bound,
        "of_bound": bound / found["seconds"],
    }


@dataclasses.dataclass(frozen=True)
class SampleBench:
    """Decode images of random weights, beside what this machine could do.

    Example: t2i bench sample --size llamagen-b --batch 4
    """

    size: str = "5M"
    """A name of the table of sizes: 1M, 5M, 30M, llamagen-b, ..."""
    batch: tuple[int, ...] = (1, 4, 16)
    grid: int = 0
    """Codes along a side; 0: 16, as published, and 8 for own small sizes."""
    vocabulary: int = 0
    """Codes of the codec; 0: 16384 as published, and 1024 for own small sizes."""
    guided: bool = True
    segments: int = 0
    dtype: str = "float32"
    repeats: int = 3


def main(arguments: list[str]) -> None:
    """`t2i bench sample ...`: print a table, one column a batch size."""
    if arguments[:1] not in (["sample"], ["-h"], ["--help"]):
        raise SystemExit("t2i bench: what to measure is missing; there is: sample")
    args = tyro.cli(SampleBench, args=[a for a in arguments if a != "sample"], prog="t2i bench sample")
    published = args.size in SIZES and args.size.startswith("llamagen")
    side = args.grid or (16 if published else 8)
    config = AR.sized(
        args.size,
        vocabulary=args.vocabulary or (16384 if published else 1024),
        grid=(side, side),
        condition=Classes(1000),
        dtype=args.dtype,
    )
    results = [bench_sample(config, b, args.guided, args.segments, args.repeats) for b in args.batch]
    Console().print(report(config, results))


def report(config: AR, results: list[dict[str, float]]) -> Table:
    """The results of `bench_sample` as a table."""
    rows: dict[str, Callable[[dict[str, float]], str]] = {
        "images / s": lambda r: f"{r['images_per_second']:.3g}",
        "tokens / s": lambda r: f"{r['tokens_per_second']:.0f}",
        "seconds": lambda r: f"{r['seconds']:.3f} (spread {r['spread']:.0%})",
        "bound, seconds": lambda r: f"{r['bound']:.3f}",
        "share of the bound": lambda r: f"{r['of_bound']:.0%}",
        "compile, seconds": lambda r: f"{r['compile']:.1f}",
        "matrix product, GFLOP/s": lambda r: f"{r['flops'] / 1e9:.0f}",
        "read, GB/s": lambda r: f"{r['read'] / 1e9:.1f}",
        "copy, GB/s": lambda r: f"{r['copy'] / 1e9:.1f}",
    }
    millions = results[0]["parameters"] / 1e6
    title = (
        f"{millions:.1f} M parameters, {math.prod(config.grid)} tokens, {config.dtype}, {jax.devices()[0].device_kind}"
    )
    table = Table("", *(f"batch {int(r['batch'])}" for r in results), title=title)
    for name, cell in rows.items():
        table.add_row(name, *(cell(r) for r in results))
    return table
