"""Measures of generated and of reconstructed images, each with its baselines."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from rich.table import Table

from t2i_jax.core.fields import values
from t2i_jax.core.outputs import write_json, write_markdown
from t2i_jax.evaluation.alignment import Retrieval, retrieve
from t2i_jax.evaluation.features import Space, check_images
from t2i_jax.evaluation.metrics import (
    GaussianFit,
    frechet,
    inception_score,
    kernel_distance,
    overlap,
    principal,
    psnr,
    ssim,
)

COMPONENTS = 128
"""Principal directions of the Frechet distance of sets with fewer images than features."""


@dataclasses.dataclass(frozen=True)
class Number:
    """A measured value and the same measure of something known: real images, chance, an image of one colour."""

    value: float
    better: Literal["higher", "lower"] = "higher"
    baselines: Mapping[str, float] = dataclasses.field(default_factory=dict)
    interval: tuple[float, float] | None = None
    """of 95 %, where the value is a share"""

    def to_json(self) -> dict:
        interval = {} if self.interval is None else {"interval": [round(x, 4) for x in self.interval]}
        return {"value": self.value, "better": self.better, **interval, **self.baselines}

    def __str__(self) -> str:
        return digits(self.value) + ("" if self.interval is None else f" ({' to '.join(map(digits, self.interval))})")


@dataclasses.dataclass(frozen=True)
class Report:
    """Named numbers, and the facts needed to interpret them (counts, settings, model)."""

    title: str
    numbers: Mapping[str, Number]
    facts: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict:
        numbers = {k: n.to_json() for k, n in self.numbers.items()}
        return {"title": self.title, "facts": dict(self.facts), "numbers": numbers}

    def save(self, path: str | os.PathLike) -> None:
        """Write the report as JSON to `path` and as markdown of the same name, each whole or not at all."""
        write_json(path, self.to_json())
        write_markdown(Path(path).with_suffix(".md"), self.markdown())

    def rows(self) -> list[tuple[str, str, str]]:
        sign = {"higher": "↑", "lower": "↓"}
        baselines = lambda n: ", ".join(f"{name} {digits(v)}" for name, v in n.baselines.items())
        return [(f"{name} {sign[n.better]}", str(n), baselines(n)) for name, n in self.numbers.items()]

    def table(self) -> Table:
        """For a rich console."""
        table = Table(title=self.title, caption="; ".join(f"{k}: {v}" for k, v in self.facts.items()))
        table.add_column("measure")
        table.add_column("value", justify="right", style="bold")
        table.add_column("baselines", style="dim")
        group = ""
        for name, value, baselines in self.rows():
            if name.rpartition("/")[0] != group:
                table.add_section()
            group = name.rpartition("/")[0]
            table.add_row(name, value, baselines)
        return table

    def markdown(self) -> str:
        lines = [
            f"# {self.title}",
            "",
            "| measure | value | baselines |",
            "|---|---:|---|",
            *(f"| {name} | {value} | {baselines} |" for name, value, baselines in self.rows()),
            "",
            *(f"- {k}: {v}" for k, v in self.facts.items()),
        ]
        return "\n".join(lines) + "\n"


def evaluate_images(
    generated: np.ndarray,
    real: np.ndarray,
    captions: Sequence[str],
    train_real: np.ndarray,
    spaces: Sequence[Space],
) -> dict[str, Number]:
    """Measures of generated images against real ones, in every space.

    Args:
        generated: uint8 (n, i, j, 3), one image per caption.
        real: uint8 (n, i, j, 3), real images that were not trained on, of the same captions in the same order.
        captions: n prompts.
        train_real: uint8 (p, i, j, 3), training images: the baseline of every distance is that of as many of these in
            place of the generated ones. No more than needed are used.

    Returns:
        `SPACE/frechet`, `/kernel_distance`, `/precision`, `/recall`, `/density`, `/coverage`, `/inception_score` (where
        the space has a classifier), and how often the image of the prompt is found among those of all prompts:
        `/top1`, `/top5`, `/median_rank`.

    Errors: `ValueError` names the argument that does not fit.
    """
    for name, images in {"generated": generated, "real": real, "train_real": train_real}.items():
        check_images(images, name)
    for name, images in {"generated": generated, "real": real}.items():
        if len(images) != len(captions):
            raise ValueError(f"{name}: {len(images)} images with {len(captions)} captions")
    needed = max(len(generated), 4 * COMPONENTS)
    train_real = train_real[np.random.default_rng(0).permutation(len(train_real))[:needed]]
    numbers: dict[str, Number] = {}
    for space in spaces:
        g, r, t = (space(x) for x in (generated, real, train_real))
        found = {**compare(g, r, t), **aligned(retrieve(g, r, captions, captions))}
        if space.classify is not None:
            ours, theirs = (inception_score(space.logits(features)) for features in (g, r))
            found["inception_score"] = Number(ours, "higher", {"real": theirs})
        numbers |= {f"{space.name}/{name}": number for name, number in found.items()}
    return numbers


def compare(generated: np.ndarray, real: np.ndarray, train: np.ndarray) -> dict[str, Number]:
    """Distances of features generated (n, d) and real (m, d), with those of `train` (p, d) and real as baselines."""
    # Distances depend on the number of images, so the baseline has as many.
    stand_in = train[np.random.default_rng(0).permutation(len(train))[: len(generated)]]
    fd = _frechet_to(real, train if min(len(generated), len(real)) <= real.shape[1] else None)
    numbers = {
        "frechet": Number(fd(generated), "lower", {"real": fd(stand_in)}),
        "kernel_distance": Number(kernel_distance(generated, real), "lower", {"real": kernel_distance(stand_in, real)}),
    }
    theirs = values(overlap(real, stand_in))
    for name, value in values(overlap(real, generated)).items():
        numbers[name] = Number(value, "higher", {"real": theirs[name]})
    return numbers


def _frechet_to(real: np.ndarray, spanning: np.ndarray | None) -> Callable[[np.ndarray], float]:
    """Features (n, d) -> their Frechet distance to real ones, along the principal directions of `spanning` if given."""
    project = lambda x: x
    if spanning is not None:
        mean, directions = principal(spanning, COMPONENTS)
        project = lambda x: (x - mean) @ directions
    target = GaussianFit.of(project(real))
    return lambda x: frechet(GaussianFit.of(project(x)), target)


def aligned(found: Retrieval, **real: Retrieval) -> dict[str, Number]:
    """Retrieval as numbers, with chance as baseline, and the retrieval of real images where it is given."""
    top = lambda k: {name: r.top(k) for name, r in real.items()} | {"chance": found.chance(k)}
    median = {name: r.median for name, r in real.items()} | {"chance": found.median_by_chance}
    return {
        "top1": Number(found.top(1), "higher", top(1), found.interval(1)),
        "top5": Number(found.top(5), "higher", top(5), found.interval(5)),
        "median_rank": Number(found.median, "lower", median),
    }


def evaluate_reconstruction(
    real: np.ndarray,
    reconstructed: np.ndarray,
    perceptual: Callable[[np.ndarray, np.ndarray], object] | None = None,
    spaces: Sequence[Space] = (),
    *,
    batch: int = 64,
) -> dict[str, Number]:
    """Measures of reconstructed images against their originals, with one flat colour per image as baseline.

    Args:
        real, reconstructed: uint8 (n, i, j, 3) in the same order.
        perceptual: two float arrays (b, i, j, 3) in [-1, 1] -> distance per image (b,) or their mean.
        spaces: of the Frechet distance of the two sets (`SPACE/frechet`).
        batch: images that `perceptual` gets at once.

    Returns:
        `psnr` in dB, `ssim`, `perceptual` where it is given, means over images.
    """
    flat = np.broadcast_to(np.round(real.mean((1, 2), keepdims=True)).astype(np.uint8), real.shape)
    measured = lambda measure, better: Number(
        float(measure(real, reconstructed).mean()), better, {"flat colour": float(measure(real, flat).mean())}
    )
    numbers = {"psnr": measured(psnr, "higher"), "ssim": measured(ssim, "higher")}
    if perceptual is not None:
        signed = lambda x: x.astype(np.float32) / 127.5 - 1

        def measure(a: np.ndarray, b: np.ndarray) -> np.floating:
            parts = [slice(i, i + batch) for i in range(0, len(a), batch)]
            values = [np.asarray(perceptual(signed(a[p]), signed(b[p]))).mean() * len(a[p]) for p in parts]
            return np.sum(values) / len(a)

        numbers["perceptual"] = measured(measure, "lower")
    for space in spaces:
        r, o, f = (space(x) for x in (real, reconstructed, flat))
        fd = _frechet_to(r, r if len(r) <= r.shape[1] else None)
        numbers[f"{space.name}/frechet"] = Number(fd(o), "lower", {"flat colour": fd(f)})
    return numbers


def digits(value: float) -> str:
    """Four significant digits, without exponents where they are not needed."""
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
