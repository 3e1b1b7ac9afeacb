"""What works, as tables: a line for each published system, from the arrays compared and the models that ran."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from t2i_jax import convert
from tests.fixtures.families import ALL, SYSTEMS
from tests.fixtures.meshes import sharded
from tests.published.parity import Line, Oracle

HEAD = """# Parity with published programs

Random weights under the published names go through the converter that a released file takes; every array that the
published program gives is compared. Written by `python -m tests.published.run --table {file} FOLDER...`, which keeps
the lines of systems that it is not asked for.

Equal: integers exactly, fp32 arrays to 1e-4 in norm and 1e-3 at worst. Gradients of LlamaGen's codec are less exact in
fp32 itself: its entropy loss divides distances by 0.01. Over nine configurations the original's own fp32 gradients of
`encoder.conv_in` and `quantize.embedding` differ from its float64 ones by 2e-5 to 3e-4, ours in fp32 by 2e-5 to 5e-4,
while in float64 the original and this project agree to 3e-12. So these are computed in float64 here, and the limit is
ten times the error of our own fp32 where that is above 1e-4, and 1e-3 at most.

{legend}
"""
LEGEND = """\
loads: the converter places every published name. scores, samples, trains: the contract tests compute log-likelihoods
with, sample from, and train a small model of this kind; whether it does what the original does is said by the arrays
alone. sharded: a test finds the loss and the gradients of one device on meshes of eight, for every model here; part:
for some. arrays: how many of those that the original gives are equal, and the largest error among them.
"""
COLUMNS: tuple[str, ...] = (
    "system",
    "original",
    "format",
    "model",
    "loads",
    "scores",
    "samples",
    "trains",
    "sharded",
    "arrays",
)
COLUMNS += ("worst error",)
SUMMARY = ("system", "formats", "loads", "scores", "samples", "trains", "sharded", "arrays equal", "worst error")
MARKS = "<!-- systems -->", "<!-- /systems -->"


@contextmanager
def converted() -> Iterator[list[tuple[str, Any]]]:
    """The formats and configurations of what is converted inside of it."""
    seen: list[tuple[str, Any]] = []
    find = convert.find

    def watched(name: str) -> convert.Format:
        format = find(name)

        def describe(*arguments: Any, **hints: Any) -> Any:
            config = format.describe(*arguments, **hints)
            seen.append((name, config))
            return config

        return dataclasses.replace(format, describe=describe)

    convert.find = watched
    try:
        yield seen
    finally:
        convert.find = find


def row(oracle: Oracle, lines: list[Line], seen: list[tuple[str, Any]]) -> dict[str, str]:
    """The line of a system whose arrays have been compared."""
    cases = [ALL[name] for name in SYSTEMS[oracle.meta["system"]]]
    cells = (
        oracle.meta["system"],
        oracle.meta.get("repo", ""),
        ", ".join(f"`{name}`" for name in dict.fromkeys(name for name, _ in seen)) or "-",
        ", ".join(sorted({type(config).__name__ for _, config in seen})) or "-",
        some(bool(seen)),
        some(any(case.capabilities.likelihood for case in cases)),
        some(any(case.capabilities.family for case in cases)),
        some(bool(cases)),
        some(*(type(case) in sharded() for case in cases)),
        f"{sum(line.passed for line in lines)} of {len(lines)}",
        f"{max((line.error for line in lines), default=0.0):.1e}",
    )
    return dict(zip(COLUMNS, cells, strict=True))


def some(*found: bool) -> str:
    """Whether all of them hold, some, or none."""
    return "-" if not any(found) else "yes" if all(found) else "part"


def table(columns: tuple[str, ...], rows: list[dict[str, str]]) -> str:
    """Rows as Markdown."""
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    return head + "".join(f"| {' | '.join(row[c] for c in columns)} |\n" for row in rows)


def write(file: Path, rows: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    """Write the table with these rows by system, and those of other systems that it has already. Gives all of them."""
    lines = re.findall(r"^\| (\w+ \|.*) \|$", file.read_text(), re.M) if file.exists() else []
    old: list[dict[str, str]] = [
        dict(zip(COLUMNS, line.split(" | "), strict=True)) for line in lines if not line.startswith("system")
    ]
    known = {row["system"]: row for row in old} | rows
    whole = [known[name] for name in sorted(known)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(HEAD.format(file=file, legend=LEGEND) + table(COLUMNS, whole))
    return whole


def summary(rows: list[dict[str, str]]) -> str:
    """One line a published program, for what any of its parts does and the worst error; then what the columns mean."""
    programs: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        programs.setdefault(row["original"], []).append(row)

    def line(original: str, parts: list[dict[str, str]]) -> dict[str, str]:
        models = [part for part in parts if part["format"] != "-"]
        counts = [[int(n) for n in part["arrays"].split(" of ")] for part in parts]
        cells = {c: some(any(part[c] == "yes" for part in models)) for c in ("scores", "samples", "trains")}
        cells["sharded"] = some(*(part["sharded"] == "yes" for part in models))
        if any(part["sharded"] == "part" for part in models):
            cells["sharded"] = "part"
        return cells | {
            "system": original.split("/")[-1],
            "formats": ", ".join(dict.fromkeys(f for part in models for f in part["format"].split(", "))),
            "loads": some(*(part["loads"] == "yes" for part in models)),
            "arrays equal": f"{sum(good for good, _ in counts)} of {sum(total for _, total in counts)}",
            "worst error": max((part["worst error"] for part in parts), key=float),
        }

    by_name = sorted(programs.items(), key=lambda item: item[0].split("/")[-1].lower())
    return f"{table(SUMMARY, [line(*item) for item in by_name])}\n{LEGEND}"


def insert(file: Path, text: str) -> None:
    """Put `text` between the marks in a file. Errors: ValueError where it has no marks."""
    whole, (first, last) = file.read_text(), MARKS
    if not re.search(f"{first}.*{last}", whole, re.S):
        raise ValueError(f"{file}: no {first} and {last}, between which the table is to stand")
    file.write_text(re.sub(f"{first}.*{last}", lambda _: f"{first}\n{text}{last}", whole, flags=re.S))
