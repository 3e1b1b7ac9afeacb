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
from t2i_jax.evaluation.features import FeatureNetwork, Space, check_images
from t2i_jax.evaluation.metrics import (
    NEIGHBOURS,
    GaussianFit,
    frechet,
    inception_score,
    kernel_distance,
    overlap,
    principal,
    psnr,
    ssim,
)

SPACES = (FeatureNetwork("efficientnet_lite0"), FeatureNetwork("pixels"))


@dataclasses.dataclass(frozen=True)
class Number:
    """A measured value and the same measure of something known: real images, chance, an image of one colour."""

    value: float
    better: Literal["higher", "lower"] = "higher"
    baselines: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
    """Named numbers, and the facts needed to interpret them (counts, settings, model)."""

    title: str
    numbers: Mapping[str, Number]
    facts: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict:
        numbers = {k: {"value": n.value, "better": n.better, **n.baselines} for k, n in self.numbers.items()}
        return {"title": self.title, "facts": dict(self.facts), "numbers": numbers}

    def save(self, path: str | os.PathLike) -> None:
        """Write the report as JSON to `path` and as markdown of the same name, each whole or not at all."""
        write_json(path, self.to_json())
        write_markdown(Path(path).with_suffix(".md"), self.markdown())

    def rows(self) -> list[tuple[str, str, str]]:
        sign = {"higher": "↑", "lower": "↓"}
        baselines = lambda n: ", ".join(f"{name} {digits(v)}" for name, v in n.baselines.items())
        return [(f"{name} {sign[n.better]}", digits(n.value), baselines(n)) for name, n in self.numbers.items()]

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
        lines = [f"# {self.title}", "", "| measure | value | baselines |", "|---|---:|---|"]
        lines += [f"| {name} | {value} | {baselines} |" for name, value, baselines in self.rows()]
        lines += ["", *(f"- {k}: {v}" for k, v in self.facts.items())]
        return "\n".join(lines) + "\n"


def evaluate_pictures(
    generated: np.ndarray,
    real: np.ndarray,
    captions: Sequence[str],
    train_real: np.ndarray,
    spaces: Sequence[FeatureNetwork | Space] = SPACES,
    *,
    real_captions: Sequence[str] | None = None,
    components: int = 128,
    neighbours: int = NEIGHBOURS,
    progress: bool = True,
) -> dict[str, Number]:
    """Measures of generated images against real ones, in every space.

    Args:
        generated: uint8 (n, i, j, 3), one image per caption.
        real: uint8 (m, i, j, 3), real images that were not trained on; one or more of every caption.
        captions: n prompts; those of `real` too, in order, unless `real_captions` are given.
        train_real: uint8 (p, i, j, 3), training images: the baseline of every distance is that of as many of these in
            place of the generated ones. No more than needed are used.
        spaces: feature spaces, loaded or to be loaded.
        components: the Frechet distance is taken along so many principal directions of the training images where
            there are fewer images than features.
        neighbours: k of precision and recall.

    Returns:
        `SPACE/frechet`, `/kernel_distance`, `/precision`, `/recall`, `/density`, `/coverage`, `/inception_score` (where
        the space has a classifier), and how often the image of the prompt is found among those of all prompts:
        `/top1`, `/top5`, `/median_rank`.

    Errors: `ValueError` names the argument that does not fit.
    """
    for name, images in {"generated": generated, "real": real, "train_real": train_real}.items():
        check_images(images, name)
    real_captions = captions if real_captions is None else real_captions
    for name, images, texts in (("generated", generated, captions), ("real", real, real_captions)):
        if len(images) != len(texts):
            raise ValueError(f"{name}: {len(images)} images with {len(texts)} captions")
    needed = max(len(generated), 4 * components)
    train_real = train_real[np.random.default_rng(0).permutation(len(train_real))[:needed]]
    numbers: dict[str, Number] = {}
    for space in spaces:
        space = space.load() if isinstance(space, FeatureNetwork) else space
        g, r, t = (space(x, progress) for x in (generated, real, train_real))
        found = {**compare(g, r, t, components, neighbours), **aligned(retrieve(g, r, captions, real_captions))}
        if space.classify is not None:
            score = lambda features, space=space: inception_score(space.logits(features))
            found["inception_score"] = Number(score(g), "higher", {"real": score(r)})
        numbers |= {f"{space.name}/{name}": number for name, number in found.items()}
    return numbers


def compare(
    generated: np.ndarray, real: np.ndarray, train: np.ndarray, components: int = 128, neighbours: int = NEIGHBOURS
) -> dict[str, Number]:
    """Distances of features generated (n, d) and real (m, d), with those of `train` (p, d) and real as baselines."""
    # Distances depend on the number of images, so the baseline has as many.
    stand_in = train[np.random.default_rng(0).permutation(len(train))[: len(generated)]]
    project = lambda x: x
    if min(len(generated), len(real)) <= real.shape[1]:
        mean, directions = principal(train, components)
        project = lambda x: (x - mean) @ directions
    target = GaussianFit.of(project(real))
    fd = lambda x: frechet(GaussianFit.of(project(x)), target)
    numbers = {
        "frechet": Number(fd(generated), "lower", {"real": fd(stand_in)}),
        "kernel_distance": Number(kernel_distance(generated, real), "lower", {"real": kernel_distance(stand_in, real)}),
    }
    theirs = values(overlap(real, stand_in, neighbours))
    for name, value in values(overlap(real, generated, neighbours)).items():
        numbers[name] = Number(value, "higher", {"real": theirs[name]})
    return numbers


def aligned(found: Retrieval, **real: Retrieval) -> dict[str, Number]:
    """Retrieval as numbers, with chance as baseline, and the retrieval of real images where it is given."""
    top = lambda k: {name: r.top(k) for name, r in real.items()} | {"chance": found.chance(k)}
    median = {name: r.median for name, r in real.items()} | {"chance": found.median_by_chance}
    return {
        "top1": Number(found.top(1), "higher", top(1)),
        "top5": Number(found.top(5), "higher", top(5)),
        "median_rank": Number(found.median, "lower", median),
    }


def evaluate_reconstruction(
    real: np.ndarray,
    reconstructed: np.ndarray,
    perceptual: Callable[[np.ndarray, np.ndarray], object] | None = None,
    spaces: Sequence[FeatureNetwork | Space] = (),
    *,
    components: int = 128,
    batch: int = 64,
    progress: bool = True,
) -> dict[str, Number]:
    """Measures of reconstructed images against their originals, with one flat colour per image as baseline.

    Args:
        real, reconstructed: uint8 (n, i, j, 3) in the same order.
        perceptual: two float arrays (b, i, j, 3) in [-1, 1] -> distance per image (b,) or their mean.
        spaces: feature spaces of the Frechet distance of the two sets (`SPACE/frechet`), of sets with more images than
            `components` directions.

    Returns:
        `psnr` in dB, `ssim`, `perceptual` where it is given, means over images.
    """
    flat = np.broadcast_to(np.round(real.mean((1, 2), keepdims=True)).astype(np.uint8), real.shape)
    both = lambda measure: (
        float(measure(real, reconstructed).mean()),
        {"flat colour": float(measure(real, flat).mean())},
    )
    value, baseline = both(psnr)
    numbers = {"psnr": Number(value, "higher", baseline)}
    value, baseline = both(ssim)
    numbers["ssim"] = Number(value, "higher", baseline)
    if perceptual is not None:
        signed = lambda x: x.astype(np.float32) / 127.5 - 1

        def measure(a: np.ndarray, b: np.ndarray) -> np.floating:
            parts = [slice(i, i + batch) for i in range(0, len(a), batch)]
            values = [np.asarray(perceptual(signed(a[p]), signed(b[p]))).mean() * len(a[p]) for p in parts]
            return np.sum(values) / len(a)

        value, baseline = both(measure)
        numbers["perceptual"] = Number(value, "lower", baseline)
    for space in spaces:
        space = space.load() if isinstance(space, FeatureNetwork) else space
        r, o, f = (space(x, progress) for x in (real, reconstructed, flat))
        if len(r) <= r.shape[1]:
            mean, directions = principal(r, components)
            r, o, f = ((x - mean) @ directions for x in (r, o, f))
        target = GaussianFit.of(r)
        baseline = {"flat colour": frechet(GaussianFit.of(f), target)}
        numbers[f"{space.name}/frechet"] = Number(frechet(GaussianFit.of(o), target), "lower", baseline)
    return numbers


def digits(value: float) -> str:
    """Four significant digits, without exponents where they are not needed."""
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
