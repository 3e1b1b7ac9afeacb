"""The first minute of a newcomer, before and after: CPU and wall seconds of the commands that come first.

    python -m benchmarks.first_minute --before 60c8156

measures this checkout and one of an earlier commit in turns, in processes of their own with empty caches, and writes
docs/results/first_minute.md. The model is the first of the zoo, or, where it has none, one of that shape with random
weights: an autoregressive Transformer over 16x16 codes, captions by MiniLM.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from t2i_jax import zoo
from t2i_jax.core import config
from t2i_jax.core.outputs import write_markdown
from t2i_jax.models.ar import AR
from t2i_jax.release import card
from t2i_jax.storage.artifacts import Artifact, copy_artifact, save_artifact
from t2i_jax.training.experiment import Experiment

HOME = Path(__file__).parents[1]
GOALS = {"t2i --help": "1 CPU", "t2i sample, again": "5 CPU, 6 wall", "t2i sample, the first": "25 wall"}
"""Seconds on two free cores."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a process took, in seconds."""

    cpu: float
    wall: float


def measured(checkout: Path, scratch: Path, *arguments: str) -> Cost:
    """A call of the command of a checkout, whose caches are in `scratch`."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH")))),
        "PYTHONPYCACHEPREFIX": str(scratch / "bytecode"),
        "XDG_CACHE_HOME": str(scratch / "cache"),
    }
    for name in ("PYTHONDONTWRITEBYTECODE", "JAX_COMPILATION_CACHE_DIR", "T2I_PROGRAMS"):
        env.pop(name, None)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "t2i_jax.cli", *arguments]
    subprocess.run(command, env=env, cwd=scratch, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cpu, time.monotonic() - began)


def calls(checkout: Path, scratch: Path, model: Path, repeats: int) -> dict[str, Cost]:
    """What each call took; of those that are repeated the median."""

    def sample() -> Cost:
        shutil.rmtree(scratch / "out", ignore_errors=True)
        return measured(checkout, scratch, "sample", str(model), "a red heart, noto style", "--out", "out")

    def median(*arguments: str) -> Cost:
        costs = [measured(checkout, scratch, *arguments) if arguments else sample() for _ in range(repeats)]
        return Cost(statistics.median(c.cpu for c in costs), statistics.median(c.wall for c in costs))

    for words in (("--help",), ("sample", "--help")):  # compiles Python's bytecode, once for all later ones
        measured(checkout, scratch, *words)
    return {
        "t2i --help": median("--help"),
        "t2i sample --help": median("sample", "--help"),
        "t2i sample, the first": sample(),
        "t2i sample, again": median(),
    }


def subject(folder: Path) -> tuple[Path, Path, str]:
    """The model that is sampled, in the form that an earlier commit reads, and as it is now; and what it is."""
    if found := list(zoo.models().values()):
        first = found[0]
        copy_artifact(first.folder, folder / "model", lambda artifact: card(artifact, first.name), half=True)
        return folder / "model", first.folder, f"`{first.name}` of the zoo, before in bf16"
    codec = config.load(HOME / "configs" / "glyphs_vqgan.py")
    base = config.load(HOME / "configs" / "glyphs_ar.py")
    assert isinstance(codec, Experiment) and isinstance(base, Experiment) and isinstance(base.model, AR)
    shape = dataclasses.replace(base.model.transformer, width=256, depth=8)
    model = dataclasses.replace(base.model, grid=(16, 16), transformer=shape)
    part = Artifact(codec.model, codec.model.init(jax.random.key(0)), image_size=64)
    save_artifact(part, folder / "codec", card(part, "codec"))
    made = Artifact(model, model.init(jax.random.key(0)), base.text, str(folder / "codec"), image_size=64)
    save_artifact(made, folder / "model", card(made, "model"), half=True)
    return (
        folder / "model",
        folder / "model",
        "a model of the zoo's shape with random weights: 256 codes by `AR`, captions by MiniLM",
    )


def table(before: dict[str, Cost], after: dict[str, Cost]) -> str:
    """Rows of both, in seconds."""
    rows = ["| call | before: CPU, wall | now: CPU, wall | goal on two free cores |", "|---|---|---|---|"]
    said = lambda cost: f"{cost.cpu:.1f}, {cost.wall:.1f}"
    rows += [
        f"| `{name}` | {said(before[name])} | {said(cost)} | {GOALS.get(name, '')} |" for name, cost in after.items()
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU and wall seconds of the commands of the first minute")
    parser.add_argument("--before", default="60c8156", help="commit to compare with")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each command, of which the median is written")
    parser.add_argument("--out", type=Path, default=HOME / "docs" / "results" / "first_minute.md")
    args = parser.parse_args()
    git = lambda *words: subprocess.run(["git", "-C", str(HOME), *words], check=True, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        *models, what = subject(folder / "models")
        git("worktree", "add", "--detach", str(folder / "before"), args.before)
        try:
            costs = []
            for name, checkout, model in zip(("old", "new"), (folder / "before", HOME), models, strict=True):
                (folder / name).mkdir()
                costs.append(calls(checkout, folder / name, model, args.repeats))
        finally:
            git("worktree", "remove", "--force", str(folder / "before"))
    load = os.getloadavg()[1]
    write_markdown(
        args.out,
        f"# The first minute\n\nSeconds of a process, before (commit {args.before}) and now. The model is {what}; "
        f"{os.cpu_count()} cores of {platform.machine()}, Python {platform.python_version()}, jax {jax.__version__}; "
        f"on average {load:.1f} programs wanted a core in the five minutes before the end, so that wall seconds say "
        "little where that is more than there are cores, and CPU seconds are more than on free ones. Bytecode was "
        f"compiled before; caches of programs were empty before the first call.\n\n{table(*costs)}\n\n"
        "Measured by `python -m benchmarks.first_minute`.\n",
    )
    print(args.out.read_text())


if __name__ == "__main__":
    main()
