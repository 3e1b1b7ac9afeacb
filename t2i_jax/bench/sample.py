"""Decoding images from random weights, against the bound of a memory-bound decoder,

    T = sum over tokens of max(2 N R / F, W / B) + cache bytes / B,

N the matrix parameters, R the rows (2 an image with guidance), W the bytes of the weights, F FLOP/s, B bytes/s. Of a
config or a run, of whatever family, the sampler is measured against the FLOP limit instead: see `bench.drawing`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import tyro
from jax import Array

from t2i_jax.bench import drawing
from t2i_jax.bench.baselines import baseline
from t2i_jax.bench.measure import (
    EAGER,
    LIMITS,
    Arguments,
    Result,
    interleaved,
    limits,
    print_results,
    read_arguments,
    seconds,
    table,
    weights,
)
from t2i_jax.core.config import ConfigError, refused
from t2i_jax.core.fields import Count, Range, Size, Sizes, values
from t2i_jax.core.memory import check_memory
from t2i_jax.models.ar import AR
from t2i_jax.nn.decode import int8_weights
from t2i_jax.presets import OF_AR, preset


def decode_bound(config: AR, rows: int, flops: float, bandwidth: float, int8: bool = False) -> float:
    """Least seconds to decode an image in every one of `rows` rows, with a cache of exactly the tokens so far.

    Weights are read once a token, in the dtype of the computation or as int8, and so is the cache.
    """
    shape, size = config.transformer, jnp.dtype(config.compute.dtype).itemsize
    attention = shape.width * shape.head_size * 2 * (shape.heads + shape.num_kv_heads)
    weights = shape.depth * (attention + 3 * shape.width * shape.mlp_dim) + shape.width * config.vocabulary
    step = max(2 * weights * rows / flops, weights * (1 if int8 else size) / bandwidth)
    read = sum(cache_bytes(config, rows, i) for i in range(1, config.length + 1))
    return config.length * step + read / bandwidth


def cache_bytes(config: AR, rows: int, drawn: int) -> int:
    """Bytes of the keys and values of `rows` rows when so many tokens are drawn."""
    shape, size = config.transformer, jnp.dtype(config.compute.dtype).itemsize
    return rows * shape.depth * 2 * shape.num_kv_heads * shape.head_size * size * (config.prefix_length + drawn)


def bench_sample(
    config: AR,
    batch: int,
    guided: bool = True,
    segments: int = 0,
    repeats: int = 3,
    int8: bool = False,
    top_p: float = 1.0,
    eager: bool = False,
) -> Result:
    """Decoding speed of `config` with random weights, and its bound; limits and decoding measured alternately.

    Returns seconds and their spread, compile seconds, images/s, tokens/s, the limits, the bound in seconds, and
    `of_bound`, the share of the bound that is reached, from the medians; with `eager` also the seconds of the same
    network and draws in eager PyTorch on a CPU (`benchmarks/pytorch`). Errors: `ConfigError` for a batch that the
    memory of a CPU's machine cannot hold.
    """
    if jax.default_backend() == "cpu":
        check_memory(
            f"a batch of {batch}: its keys and values", cache_bytes(config, batch * (1 + guided), config.length)
        )
    model = weights(config.init)
    count = sum(x.size for x in jax.tree.leaves(model))
    labels = jnp.arange(batch, dtype=jnp.int32)
    keys = jax.random.split(jax.random.key(1), batch)
    options = dataclasses.replace(config.options(), top_k=min(2000, config.vocabulary // 2), top_p=top_p)
    others = {}
    if eager:
        with refused("--eager"):
            theirs = baseline("autoregressive").Decoder(config, model)
        others["eager"] = lambda: seconds(lambda: theirs.sample(labels, options, guided))
        others["eager"]()  # with warm caches, as the others
    model = jax.jit(int8_weights)(model) if int8 else model

    def decode() -> Array:
        return config.sample(model, {"label": labels}, keys, options, guided=guided, segments=segments)

    first = seconds(decode)
    measures = {"seconds": lambda: seconds(decode), **others, **limits(config.compute.dtype)}
    found, spread = interleaved(measures, repeats)
    bound = decode_bound(config, batch * (1 + guided), found["flops"], found["read"], int8)
    return {
        "name": f"batch {batch}" + ", int8" * int8,
        "batch": batch,
        "int8": int8,
        "parameters": count,
        "guided": guided,
        **found,
        "spread": spread["seconds"],
        "compile": first - found["seconds"],
        "images_per_second": batch / found["seconds"],
        "tokens_per_second": batch * config.length / found["seconds"],
        "bound": bound,
        "of_bound": bound / found["seconds"],
    }


@dataclasses.dataclass(frozen=True)
class SampleBench(Arguments):
    """Draw images with random weights, against the limits of this machine.

    Of a config, a run or a released model the sampler runs with its own options; fields of the config can be set as for
    `train`. Examples: t2i bench sample configs/glyphs_mar.py --batch 4 --model.sampling.iterations 32, and
    t2i bench sample --shape llamagen-b --batch 1 4 --int8
    """

    model: tyro.conf.Positional[Path | None] = None
    """a config, a run or a released model of any family; without one, next-token decoding of --shape"""
    batch: Sizes = (1, 4, 16)
    guided: bool = True
    shape: str = "5M"
    """a name of the table of sizes: 1M, 5M, 30M, llamagen-b, ...; this and what follows to `int8` are for no config"""
    grid: Count = 0
    """codes along a side; 0: 16, as published, and 8 for own small sizes"""
    vocabulary: Count = 0
    """codes of the codec; 0: 16384 as published, and 1024 for own small sizes"""
    segments: Count = 0
    top_p: Annotated[float, Range(above=0, high=1)] = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    int8: bool = False
    """measure with weights in int8 too"""
    eager: bool = False
    """measure the same in eager PyTorch on the CPU too, which has to be installed; of a config with a `Diffusion` by a
    DiT along a flow with --model.solver euler"""
    repeats: Size = 3


OF_SHAPE = ("grid", "vocabulary", "segments", "top_p", "dtype", "int8")
"""Fields that say more of --shape."""

ROWS: dict[str, Callable[[Result], str]] = {
    "images / s": lambda r: f"{r['images_per_second']:.3g}",
    "tokens / s": lambda r: f"{r['tokens_per_second']:.0f}",
    "seconds": lambda r: f"{r['seconds']:.3f} (spread {r['spread']:.0%})",
    "bound, seconds": lambda r: f"{r['bound']:.3f}",
    "share of the bound": lambda r: f"{r['of_bound']:.0%}",
    **EAGER,
    "compile, seconds": lambda r: f"{r['compile']:.1f}",
    **LIMITS,
}


def main(arguments: list[str]) -> None:
    """`t2i bench sample ...`: one column a batch size, and one more with int8."""
    args, rest = read_arguments(SampleBench, arguments, "t2i bench sample", some=True)
    if args.model is not None:
        return _any_family(args, args.model, rest)
    if rest:
        raise ConfigError(f"t2i bench sample: {' '.join(rest)}: fields can be set of a config, and none was named")
    published = args.shape in OF_AR and args.shape.startswith("llamagen")
    side = args.grid or (16 if published else 8)
    with refused("--shape"):
        vocabulary = args.vocabulary or (16384 if published else 1024)
        family = preset(args.shape, vocabulary=vocabulary, grid=(side, side), dtype=args.dtype)
        if not isinstance(family, AR):
            raise ConfigError(f"{args.shape}: one of {', '.join(OF_AR)}")
    kinds = [(b, int8) for b in args.batch for int8 in (False, True)[: 1 + args.int8]]
    results = [
        bench_sample(family, b, args.guided, args.segments, args.repeats, int8, args.top_p, args.eager)
        for b, int8 in kinds
    ]
    millions = results[0]["parameters"] / 1e6
    title = f"{args.shape}: {millions:.1f} M parameters, {math.prod(family.grid)} tokens, {family.compute.dtype}"
    shown = table(f"{title}, {jax.devices()[0].device_kind}", results, ROWS)
    about = {"shape": args.shape, "grid": side, "vocabulary": family.vocabulary, "dtype": family.compute.dtype}
    print_results("sample", [about | r for r in results], shown, args.out)


def _any_family(args: SampleBench, path: Path, overrides: list[str]) -> None:
    given, default = values(args), values(SampleBench())
    odd = [n for n in (*OF_SHAPE, "shape") if given[n] != default[n]]
    if odd:
        raise ConfigError(
            f"{path}: --{odd[0].replace('_', '-')} is for --shape alone; set fields of the config instead"
        )
    experiment = drawing.experiment_of(path, overrides)
    results = [drawing.bench_drawing(experiment, b, args.guided, args.repeats, args.eager) for b in args.batch]
    title = f"{path}: {type(experiment.model).__name__}, {results[0]['parameters'] / 1e6:.1f} M parameters"
    shown = table(f"{title}, {jax.devices()[0].device_kind}", results, drawing.ROWS)
    print_results("sample", [{"model": str(path)} | r for r in results], shown, args.out)
