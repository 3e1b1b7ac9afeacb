"""What works, as a table: a line for each published system, from the arrays compared and the models that ran."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parity import HERE, Line, Oracle

from t2i_jax import convert

HEAD = """# Parity with published programs

Random weights under the published names go through the converter that a released file takes; every array that the
published program gives is compared. Written by `python tests/published/run.py --table {file} FOLDER...`, which keeps
the lines of systems that it is not asked for.

scores: log-likelihoods or a training loss; sharded: every mesh computes what one device does (`tests/test_meshes*.py`).

| system | original | format | model | loads | scores | samples | trains | sharded | arrays | worst error |
|---|---|---|---|---|---|---|---|---|---|---|
"""


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


def row(oracle: Oracle, lines: list[Line], seen: list[tuple[str, Any]]) -> str:
    """The line of a system whose arrays have been compared."""
    kinds = {type(config) for _, config in seen}
    has = lambda *names: "yes" if any(hasattr(kind, name) for kind in kinds for name in names) else "-"
    meshes = "".join(path.read_text() for path in HERE.parent.glob("test_meshes*.py"))
    sharded = any(re.search(rf"\b{kind.__name__}\b", meshes) for kind in kinds)
    passed = sum(line.passed for line in lines)
    cells = [
        oracle.meta["system"],
        oracle.meta.get("repo", ""),
        ", ".join(f"`{name}`" for name in dict.fromkeys(name for name, _ in seen)) or "-",
        ", ".join(sorted(kind.__name__ for kind in kinds)) or "-",
        "yes" if seen else "-",
        has("log_likelihood", "loss", "players"),
        has("sample"),
        has("loss", "players"),
        "yes" if sharded else "-",
        f"{passed} of {len(lines)}",
        f"{max((line.error for line in lines), default=0.0):.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def write(file: Path, rows: dict[str, str]) -> None:
    """Write the table with these lines by system, and those of other systems that it has already."""
    old = re.findall(r"^\| (\w+) \|.*\|$", file.read_text(), re.M) if file.exists() else []
    text = file.read_text() if file.exists() else ""
    kept = {name: re.search(rf"^\| {name} \|.*\|$", text, re.M) for name in old if name != "system"}
    known = {name: found[0] for name, found in kept.items() if found} | rows
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(HEAD.format(file=file) + "\n".join(known[name] for name in sorted(known)) + "\n")
