"""Checks of an accelerator: kernels against reference attention, a train step and decoding, with goals.

The limits are those of data sheets (`flops.PEAKS`, `plan.chips`). Decoding is bound by memory (weights once a token,
and the cache of all tokens so far) or by products, whichever takes longer: the result says which, and both in seconds.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import Array
from rich.table import Table

from t2i_jax.bench.measure import Arguments, Result, print_results, read_arguments, write
from t2i_jax.bench.sample import bench_sample, decode_bound
from t2i_jax.bench.train import bench_train
from t2i_jax.core.family import with_fields
from t2i_jax.core.fields import Positive, Size, Sizes
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.networks.condition import TextFeatures
from t2i_jax.nn import kernels
from t2i_jax.nn.attention import Causal, MaskSpec, Padding, attend, plain
from t2i_jax.nn.kernels import Kind
from t2i_jax.plan.chips import Chip, chip_of
from t2i_jax.plan.ready import batch_shapes
from t2i_jax.presets import OF_AR
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

GOALS = {"kernel": 0.01, "train": 0.55, "decode": 0.50, "decode alone": 0.60}
"""The largest error of a kernel, of the largest number; the MFU of a train step; shares of the limit that binds in
decoding, and of the bandwidth where one image is drawn alone."""


@dataclasses.dataclass(frozen=True)
class Sizing:
    """What is measured: a model by its name in `presets.OF_AR`, and the shapes of attention."""

    model: str
    grid: tuple[int, int]
    vocabulary: int
    features: tuple[int, int]
    """width and length of the text features in training"""
    heads: tuple[tuple[int, int, int], ...]
    """query heads, key-value heads and width of a head"""
    places: int
    """of the sequence in attention"""
    dtype: str = "bfloat16"


FULL = Sizing("llamagen-xl", (16, 16), 16384, (2048, 120), ((20, 20, 64), (8, 2, 128)), 377)
TINY = Sizing("1M", (2, 2), 16, (8, 3), ((2, 1, 16),), 130, "float32")


def rules(places: int) -> dict[str, MaskSpec | None]:
    """Every structured mask that kernels take, of two rows, the second of which begins with padding."""
    valid = jnp.arange(places) >= jnp.array([[0], [5]])
    return {
        "all": None,
        "causal": Causal(),
        "causal, padding before": Causal(valid, 8),
        "causal, bidirectional prefix": Causal(None, 3, 3),
        "padding": Padding(valid),
    }


def kernel_error(kind: Kind, rule: MaskSpec | None, heads: tuple[int, int, int], places: int) -> float:
    """The largest difference of a kernel in bfloat16 from reference attention in fp32, in its outputs and in the
    gradients of their squares, over the largest number of each. Places that are padding do not count."""
    n, m, h = heads
    drawn = lambda i, heads: jax.random.normal(jax.random.key(i), (2, places, heads, h)).astype(jnp.bfloat16)
    x = drawn(0, n), drawn(1, m), drawn(2, m)
    real = rule.valid[..., None, None] if isinstance(rule, Causal) and rule.valid is not None else True

    def both(attention: Callable[..., Array], *x: Array) -> tuple[Array, ...]:
        def loss(*x: Array) -> tuple[Array, Array]:
            y = jnp.where(real, attention(*x), 0).astype(jnp.float32)
            return (y**2).sum(), y

        gradients, y = jax.grad(loss, (0, 1, 2), has_aux=True)(*x)
        return y, *gradients

    def errors(*x: Array) -> Array:
        mask = rule.dense(places) if isinstance(rule, Causal | Padding) else None
        written = both(lambda q, k, v: plain(q, k, v, mask), *(a.astype(jnp.float32) for a in x))
        found = both(lambda q, k, v: attend(q, k, v, rule, kind=kind), *x)
        apart = [
            jnp.abs(a - b.astype(jnp.float32)).max() / jnp.abs(a).max() for a, b in zip(written, found, strict=True)
        ]
        return jnp.stack(apart).max()

    return float(jax.jit(errors)(*x))


def kernel_checks(sizing: Sizing) -> Iterator[tuple[str, Callable[[], Result]]]:
    """One for each mask and shape of heads, of the platform's kernel; on a CPU of the one that can be interpreted."""
    kind: Kind = kernels.OF_PLATFORM.get(kernels.platform(), "splash")
    for heads in sizing.heads:
        for name, rule in rules(sizing.places).items():

            def check(rule: MaskSpec | None = rule, heads: tuple[int, int, int] = heads) -> Result:
                error = kernel_error(kind, rule, heads, sizing.places)
                return {"figure": error, "of": "the largest number", "passed": error <= GOALS["kernel"]}

            yield f"{kind}, {name}, heads {'/'.join(map(str, heads))}", check


def train_check(sizing: Sizing, batch: int, repeats: int) -> Result:
    """MFU of a train step, of the largest batch up to `batch`, by halves, that there is memory for."""
    model = with_fields(
        OF_AR[sizing.model],
        vocabulary=sizing.vocabulary,
        grid=sizing.grid,
        condition=TextFeatures(*sizing.features, left=True),
        dtype=sizing.dtype,
        dropout=0.0,
        token_dropout=0.0,
        loss_chunk=64,
        remat="dots",
    )
    while True:
        data = Data(ArrayRecord("not read"), batch_size=batch)
        experiment = Experiment(model, data, train=Train(optimizer=Optimizer("adamw"), ema=0.0), mesh=MeshConfig(1))
        try:
            found = bench_train(experiment, batch_shapes(experiment), repeats)
            break
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith("RESOURCE_EXHAUSTED") or batch == 1:
                raise
            batch //= 2
    return found | share(found.get("mfu"), GOALS["train"], "the peak in products (MFU)")


def of_decode(batch: int) -> str:
    """The name of the figure of decoding in a batch."""
    return "decode alone" if batch == 1 else "decode"


def decode_check(sizing: Sizing, batch: int, repeats: int, chip: Chip | None) -> Result:
    """The share that decoding reaches of the limit that binds; of one image alone the share of the bandwidth."""
    model = with_fields(
        OF_AR[sizing.model],
        vocabulary=sizing.vocabulary,
        grid=sizing.grid,
        dtype=sizing.dtype,
    )
    found = bench_sample(model, batch, repeats=repeats)
    rows = 2 * batch  # with guidance
    peaks = (chip.flops, chip.bandwidth) if chip else (found["flops"], found["read"])
    products = decode_bound(model, rows, peaks[0], math.inf)
    memory = decode_bound(model, rows, math.inf, peaks[1])
    by_memory = batch == 1 or memory >= products
    limit, seconds = ("bandwidth", memory) if by_memory else ("the peak in products", products)
    found |= {"seconds_of_products": products, "seconds_of_memory": memory, "binds": limit}
    reached = seconds / found["seconds"] if chip else None
    return found | share(reached, GOALS[of_decode(batch)], limit)


def share(figure: float | None, goal: float, of: str) -> Result:
    """Whether a share of a limit meets its goal; without the chip's data sheet there is neither figure nor claim."""
    return {"figure": figure, "of": of, "passed": None if figure is None else figure >= goal}


@dataclasses.dataclass(frozen=True)
class CheckBench(Arguments):
    """Check this accelerator: every kernel against reference attention, the train step of a next-token model of 0.8B,
    and its decoding, each with its goal.

    Example: t2i bench check --out check.json
    """

    tiny: bool = False
    """a small model and few places, to try the command itself; of a chip without a data sheet nothing is claimed"""
    batches: Sizes = (1, 8, 64, 256)
    """images that are drawn at once"""
    train_batch: Size = 128
    """of the train step; halved where the memory is too small"""
    seconds: Positive = 420.0
    """after so many no check is started; those left over are reported and not passed"""
    repeats: Size = 3


def main(arguments: list[str]) -> None:
    """`t2i bench check ...`: a line a check."""
    args, _ = read_arguments(CheckBench, arguments, "t2i bench check")
    sizing, began = TINY if args.tiny else FULL, time.perf_counter()
    chip = chip_of(jax.devices()[0].device_kind)
    checks = [
        *((name, "kernel", check) for name, check in kernel_checks(sizing)),
        ("train", "train", lambda: train_check(sizing, args.train_batch, args.repeats)),
        *(
            (f"decode, batch {b}", of_decode(b), lambda b=b: decode_check(sizing, b, args.repeats, chip))
            for b in args.batches
        ),
    ]
    failed = lambda why: {"figure": None, "passed": False, "error": why, "took": 0.0}
    about: list[Result] = [{"name": name, "goal": GOALS[goal]} for name, goal, _ in checks]
    results = [about_one | failed("there was no time left for it") for about_one in about]
    for i, (_, _, check) in enumerate(checks):
        start = time.perf_counter()
        if start - began > args.seconds:
            break
        try:
            found = check()
        except Exception as error:  # an error of one check does not stop the others
            found = failed(" ".join(str(error).split())[:300])
        results[i] = found | about[i] | {"took": time.perf_counter() - start}
        if args.out:
            write("check", results, args.out)
    title = f"{jax.devices()[0].device_kind}, {time.perf_counter() - began:.0f} s"
    print_results("check", results, shown(results, title), args.out)


def shown(results: list[Result], title: str) -> Table:
    """The table of figures, goals and what passed."""
    out = Table("check", "figure", "goal", "of", "", "seconds", title=title)
    word = {True: "passed", False: "NOT PASSED", None: "no claim"}
    for r in results:
        figure = "" if r["figure"] is None else f"{r['figure']:.2g}"
        goal = f"{'<' if r['goal'] == GOALS['kernel'] else '>'} {r['goal']:.2g}"
        out.add_row(r["name"], figure, goal, r.get("of", r.get("error", "")), word[r["passed"]], f"{r['took']:.0f}")
    return out
