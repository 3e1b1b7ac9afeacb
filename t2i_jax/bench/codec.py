"""Encoding and decoding images by the codec of a config, against the FLOP/s of a matrix product."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import tyro

from t2i_jax.bench.baselines import baseline
from t2i_jax.bench.measure import (
    EAGER,
    LIMITS,
    Arguments,
    Measure,
    Result,
    interleaved,
    limits,
    print_results,
    read_arguments,
    seconds,
    table,
    weights,
)
from t2i_jax.core import flops
from t2i_jax.core.config import refused
from t2i_jax.core.fields import Size
from t2i_jax.core.narrow import as_codec
from t2i_jax.core.types import Codec
from t2i_jax.training.experiment import load_experiment


def bench_codec(codec: Codec, size: int, batch: int, repeats: int = 5, eager: bool = False) -> list[Result]:
    """Images of `size` a second through `codec.encode` and `codec.decode`, random weights; limits measured alternately.

    Returns a result for each way: images/s, seconds, FLOPs of an image, FLOP/s, and `of_limit`, their share of those
    of a matrix product; with `eager` also the seconds of the same network in eager PyTorch on a CPU. Errors:
    `ConfigError` for `eager` of a codec that is not among those of `benchmarks/pytorch`.
    """
    model = weights(codec.init)
    images = jax.random.uniform(jax.random.key(1), (batch, size, size, 3), minval=-1, maxval=1)
    encode, decode = jax.jit(codec.encode), jax.jit(codec.decode)
    compiling = {"encode": seconds(lambda: encode(model, images))}
    codes = encode(model, images)
    compiling["decode"] = seconds(lambda: decode(model, codes))
    runs = {"encode": lambda: encode(model, images), "decode": lambda: decode(model, codes)}
    work = {"encode": flops.count(codec.encode, model, images), "decode": flops.count(codec.decode, model, codes)}
    measures: dict[str, Measure] = {name: lambda run=run: seconds(run) for name, run in runs.items()}
    if eager:
        with refused("--eager"):
            theirs = baseline("codec").Codec(codec, model)
        for name, run in {"encode": lambda: theirs.encode(images), "decode": lambda: theirs.decode(codes)}.items():
            measures[f"{name}, eager"] = lambda run=run: seconds(run)
            run()  # its memory is at hand too
    dtype = codec.compute.dtype or "float32"
    found, spread = interleaved({**measures, **limits(dtype)}, repeats)
    rates = {name: found[name] for name in ("flops", "read", "copy")}
    return [
        {
            "name": name,
            "batch": batch,
            "size": size,
            "parameters": sum(x.size for x in jax.tree.leaves(model)),
            "seconds": found[name],
            "spread": spread[name],
            "compile": compiling[name] - found[name],
            "images_per_second": batch / found[name],
            "flops_per_image": work[name] / batch,
            "flops_per_second": work[name] / found[name],
            "of_limit": work[name] / found[name] / rates["flops"],
            **rates,
            **({"eager": found[f"{name}, eager"]} if eager else {}),
        }
        for name in runs
    ]


@dataclasses.dataclass(frozen=True)
class CodecBench(Arguments):
    """Images a second through the codec that a config trains, or that it reads its codes from.

    Fields of the config can be set as for `train`. Example: t2i bench codec configs/glyphs_vqgan.py --batch 8
    """

    config: tyro.conf.Positional[Path]
    batch: Size = 8
    repeats: Size = 5
    eager: bool = False
    """measure the same VQGAN in eager PyTorch on the CPU too, which has to be installed"""


ROWS: dict[str, Callable[[Result], str]] = {
    "images / s": lambda r: f"{r['images_per_second']:.3g}",
    "seconds": lambda r: f"{r['seconds']:.3f} (spread {r['spread']:.0%})",
    "GFLOPs an image": lambda r: f"{r['flops_per_image'] / 1e9:.2f}",
    "GFLOP/s": lambda r: f"{r['flops_per_second'] / 1e9:.1f}",
    "share of a matrix product's": lambda r: f"{r['of_limit']:.0%}",
    **EAGER,
    "compile, seconds": lambda r: f"{r['compile']:.1f}",
    **LIMITS,
}


def main(arguments: list[str]) -> None:
    """`t2i bench codec CONFIG ...`"""
    args, rest = read_arguments(CodecBench, arguments, "t2i bench codec", some=True)
    experiment = load_experiment(args.config, rest)
    with refused(f"{args.config}, the model"):
        codec = as_codec(experiment.model)
    results = bench_codec(codec, experiment.data.image_size, args.batch, args.repeats, args.eager)
    title = f"{args.config}: {type(codec).__name__}, {results[0]['parameters'] / 1e6:.1f} M parameters"
    size = experiment.data.image_size
    shown = table(f"{title}, {args.batch} images of {size} x {size}, {jax.devices()[0].device_kind}", results, ROWS)
    print_results("codec", [{"config": str(args.config)} | r for r in results], shown, args.out)
