"""What each command has to have made where it accepted its input."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from fuzzing import LEAVES, Result, World
from PIL import Image
from safetensors import safe_open

from t2i_jax.core import config
from t2i_jax.core.image_files import read_png_text
from t2i_jax.core.text import mend, read_lines
from t2i_jax.data import ArrayRecord
from t2i_jax.storage.artifacts import config_of, load_artifact
from t2i_jax.storage.checkpoints import Checkpoints
from t2i_jax.text.sentencepiece import SentencePiece


def arguments(leaf: str, argv: list[str]) -> Any:
    """The command's own arguments, by the parser that it uses."""
    return config.parse(LEAVES[tuple(leaf.split())], argv, leaf, return_unknown_args=True)[0]


def finite(value: Any) -> bool:
    """Whether all numbers of a JSON value are finite."""
    if isinstance(value, dict | list):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def read(path: Path) -> Any:
    content = json.loads(path.read_text("utf-8"))
    assert finite(content), f"{path}: holds numbers that are not finite"
    return content


def sample(world: World, result: Result, argv: list[str]) -> None:
    """An image for every prompt and seed, which says what it was made for."""
    args = arguments("sample", argv)
    prompts = [mend(p).replace("\0", " ") for p in args.text] + (read_lines(args.prompts) if args.prompts else [])
    jobs = [(p, args.seed + n) for p in prompts for n in range(args.count)]
    assert f"{len(jobs)} in all" in " ".join(result.err.split())
    found = sorted(p for p in args.out.glob("*.png") if p.stem.isdigit())
    assert [int(p.stem) for p in found] == list(range(len(jobs)))
    for path, (prompt, seed) in zip(found, jobs, strict=True):
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((8, 8), "RGB")
        said = read_png_text(path)
        assert (said["prompt"], said["Description"], said["seed"]) == (prompt, prompt, str(seed)), said
    with Image.open(args.out / "grid.png") as image:
        image.load()


def train(world: World, result: Result, argv: list[str]) -> None:
    """A checkpoint of the last step, and finite numbers of every step that is logged."""
    args = arguments("train", argv)
    run = args.run or Path("runs") / args.config.stem
    steps = config.load(run).train.steps
    checkpoints = Checkpoints(run / "checkpoints")
    assert checkpoints.steps()[-1] == steps
    checkpoints.close()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records and finite(records)
    load_artifact(run)


def encode(world: World, result: Result, argv: list[str]) -> None:
    """As many records as the index and the message say."""
    args = arguments("encode", argv)
    for split, about in read(args.out / "index.json")["splits"].items():
        reader = ArrayRecord(str(args.out), split).open()
        said = re.search(rf"{split}: (\d+) of \d+ records are stored", " ".join(result.err.split()))
        assert len(reader) == about["count"] == int(said[1])
        assert all(reader[i]["codes"].dtype == np.uint16 for i in range(len(reader)))


def evaluate(world: World, result: Result, argv: list[str]) -> None:
    args = arguments("evaluate", argv)
    out = args.out or args.model
    assert read(out / "report.json")["numbers"]
    assert (out / "report.md").stat().st_size
    with Image.open(out / "samples.png") as image:
        image.load()


def released(world: World, result: Result, argv: list[str]) -> None:
    load_artifact(arguments("release", argv).out)


def convert(world: World, result: Result, argv: list[str]) -> None:
    if not {"--out", "--back"} & {word.partition("=")[0] for word in argv}:
        return
    args = arguments("convert", argv)
    if args.back:
        with safe_open(args.out, "np") as file:
            assert file.keys()
    else:
        assert config_of(args.out) == load_artifact(args.out).config


def plan(world: World, result: Result, argv: list[str]) -> None:
    out = arguments("plan", argv).out
    if out and out.suffix == ".md":
        assert "|" in out.read_text()
    elif out:
        assert all(p["seconds"] > 0 for p in read(out)) if "seconds" in read(out)[0] else read(out)


def build(world: World, result: Result, argv: list[str]) -> None:
    args = arguments("data build", argv)
    index = read(args.out / "metadata.json")
    reader = ArrayRecord(str(args.out)).open()
    assert len(reader) == index["splits"]["train"]["count"] and reader[0]["image"]


def index(world: World, result: Result, argv: list[str]) -> None:
    assert re.search(r"[1-9]\d* tar files, [1-9]\d* samples", result.err), result.err


def vocab(world: World, result: Result, argv: list[str]) -> None:
    out = arguments("data vocab", argv).out
    words = SentencePiece(str(out), 8)
    assert f"vocabulary of {words.pieces} pieces" in " ".join(result.err.split())
    assert words(["a red square"])[1].any()


def bench(leaf: str) -> Any:
    def check(world: World, result: Result, argv: list[str]) -> None:
        out = arguments(leaf, argv).out
        assert result.out.strip()
        assert out is None or read(out)["results"]

    return check


def solvers(world: World, result: Result, argv: list[str]) -> None:
    out = arguments("bench solvers", argv).out
    text = out.read_text() if out else result.out
    assert "# Solvers" in text and not re.search(r"\b(nan|inf)\b", text), text


def compare(world: World, result: Result, argv: list[str]) -> None:
    out = arguments("compare", argv).out
    assert read(out.with_suffix(".json"))["runs"] and out.with_suffix(".md").exists()


CHECKS: dict[tuple[str, ...], Any] = {
    ("train",): train,
    ("encode",): encode,
    ("sample",): sample,
    ("evaluate",): evaluate,
    ("compare",): compare,
    ("convert",): convert,
    ("release",): released,
    ("plan",): plan,
    ("data", "build"): build,
    ("data", "vocab"): vocab,
    ("data", "index"): index,
    ("bench", "solvers"): solvers,
    **{("bench", name): bench(f"bench {name}") for name in ("sample", "train", "codec", "data", "check", "plan")},
}
