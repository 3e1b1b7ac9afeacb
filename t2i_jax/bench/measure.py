"""Times, limits, and tables of results."""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from rich.table import Table

from t2i_jax.core import config
from t2i_jax.core.console import stdout
from t2i_jax.core.fields import Checked
from t2i_jax.core.memory import check_memory
from t2i_jax.core.outputs import check_free, local, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(Checked):
    """Arguments that all benchmarks have."""

    out: Path | None = None
    """write the results as JSON"""


A = TypeVar("A", bound=Arguments)
M = TypeVar("M", bound=nnx.Module)
Result = dict[str, Any]
Measure = Callable[[], float]


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call, until its arrays are ready."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def weights(init: Callable[[jax.Array], M]) -> M:
    """A model with fresh weights."""
    with config.refused("model"):
        sizes = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    check_memory("the weights of the model", sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(sizes)))
    # Many unrolled random draws that run once: a CPU's compiler would take minutes to make them fast.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    return jax.jit(init, compiler_options=options)(jax.random.key(0))


def limits(dtype: str = "float32", size: int = 0) -> dict[str, Measure]:
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


def interleaved(measures: Mapping[str, Measure], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Medians of `repeats` alternating calls of each measure, and their spreads (largest - smallest) / median."""
    taken: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(repeats):
        for name, measure in measures.items():
            taken[name].append(measure())
    found = {name: statistics.median(values) for name, values in taken.items()}
    return found, {name: (max(values) - min(values)) / found[name] for name, values in taken.items()}


LIMITS: dict[str, Callable[[Result], str]] = {
    "matrix product, GFLOP/s": lambda r: f"{r['flops'] / 1e9:.0f}",
    "read, GB/s": lambda r: f"{r['read'] / 1e9:.1f}",
    "copy, GB/s": lambda r: f"{r['copy'] / 1e9:.1f}",
}
"""Rows of every table: the limits that `limits` measures."""


EAGER: dict[str, Callable[[Result], str]] = {
    "eager PyTorch, seconds": lambda r: f"{r['eager']:.3f}",
    "times as fast as that": lambda r: f"{r['eager'] / r['seconds']:.2f}",
}
"""Rows where the same was measured in eager PyTorch (`benchmarks/pytorch`) as "eager"."""


def table(title: str, results: Sequence[Result], rows: Mapping[str, Callable[[Result], str]]) -> Table:
    """One column a result, under its "name"; a row for which a result lacks the field is left empty there."""

    def cell(show: Callable[[Result], str], result: Result) -> str:
        try:
            return show(result)
        except KeyError:
            return ""

    shown = Table("", *(str(r["name"]) for r in results), title=title)
    for name, show in rows.items():
        cells = [cell(show, r) for r in results]
        if any(cells):
            shown.add_row(name, *cells)
    return shown


def read_arguments(kind: type[A], arguments: list[str], prog: str, some: bool = False) -> tuple[A, list[str]]:
    """The arguments of a benchmark; and the rest, fields of a config, if it takes `some`.

    Errors: `ConfigError`, also for a results file that no command has written.
    """
    args, rest = config.parse_some(kind, arguments, prog)
    if rest and not some:
        config.parse(kind, arguments, prog)  # which says what is wrong with them
    if args.out:
        check_free(local(args.out))
    return args, rest


def print_results(what: str, results: Sequence[Result], shown: Table, out: Path | None) -> None:
    """Print the table; write the results as JSON with a description of the machine. Only the first process does."""
    if jax.process_index():
        return
    stdout().print(shown)
    if out:
        write(what, results, out)
        stdout().print(f"{out}: written", soft_wrap=True)


def write(what: str, results: Sequence[Result], out: Path) -> None:
    """The results as JSON, with a description of the machine."""
    device = jax.devices()[0]
    machine = {"device": device.device_kind, "devices": jax.device_count(), "host": platform.machine()}
    write_json(out, {"what": what, "machine": machine, "jax": jax.__version__, "results": list(results)})
