"""How much better guided images agree with their prompts, or with reference images, than others of the same seeds do.

    python -m t2i_jax.evaluation.agreement configs/semantic_diffusion.py --by docs/results/clip \\
        --plain samples/plain --guided samples/guided --out agreement.json

Pairs of folders are compared image by image, each pair drawn by `t2i sample` for the same prompts and seeds; the judge
is a CLIP or a DAMSM of clean images that guided none of them. With `--references`, one image for each pair of folders,
also by the cosine with the reference's embedding (Liu et al. 2023, Semantic Diffusion Guidance) and by the layout: the
mean absolute difference of 8x8 means of pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from t2i_jax.core.arrays import Float, UInt8, typed
from t2i_jax.core.config import ConfigError, parse_some
from t2i_jax.core.console import stdout
from t2i_jax.core.fields import Checked, Range
from t2i_jax.core.image_files import read_png_text
from t2i_jax.core.outputs import check_free, local, write_json
from t2i_jax.evaluation.alignment import unit
from t2i_jax.evaluation.features import images_of, space_of
from t2i_jax.evaluation.matching import Matching
from t2i_jax.evaluation.neighbours import images_in, square_of
from t2i_jax.evaluation.program import as_program
from t2i_jax.evaluation.report import compare
from t2i_jax.evaluation.run import records_of
from t2i_jax.training.experiment import load_experiment

CELLS = 8


@dataclasses.dataclass(frozen=True)
class AgreementArguments(Checked):
    """Agreement of guided images with prompts and references, next to that of others of the same prompts and seeds."""

    config: tyro.conf.Positional[Path]
    """of the real images for Frechet distances"""
    by: str
    """the judge: a run, a released model or a published file of a CLIP or DAMSM"""
    plain: tuple[Path, ...]
    """folders of `t2i sample`"""
    guided: tuple[Path, ...]
    """the same prompts and seeds, guided: as many folders"""
    references: tuple[Path, ...] = ()
    """an image for each pair of folders"""
    out: Path | None = None
    """a JSON file of the numbers"""
    count: Annotated[int, Range(low=20)] = 3000
    """real images of the training split"""
    space: str = "efficientnet_lite0"
    """features of Frechet distances"""

    def __post_init__(self):
        super().__post_init__()
        if len(self.plain) != len(self.guided):
            raise ConfigError(f"--guided: {len(self.guided)} folders; --plain has {len(self.plain)}")
        if self.references and len(self.references) != len(self.plain):
            raise ConfigError(f"--references: {len(self.references)} images for {len(self.plain)} pairs of folders")


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The images of a folder, with what they were drawn for."""

    images: UInt8[np.ndarray, "n i j 3"]
    prompts: tuple[str, ...]
    seeds: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path, size: int) -> Drawn:
        """Errors: `ConfigError` for a folder without images, or with some that do not say their prompt and seed."""
        paths = images_in(folder)
        said = [read_png_text(path) for path in paths]
        for path, about in zip(paths, said, strict=True):
            if "prompt" not in about or "seed" not in about:
                raise ConfigError(f"{path} does not say its prompt and seed: images of `t2i sample` do")
        images = np.stack([square_of(path, size) for path in paths])
        return cls(images, tuple(a["prompt"] for a in said), tuple(a["seed"] for a in said))


@typed
def layout(
    images: UInt8[np.ndarray, "n i j 3"], reference: UInt8[np.ndarray, "i j 3"], cells: int = CELLS
) -> Float[np.ndarray, " n"]:
    """Mean absolute difference of the means of cells x cells squares, of pixels in [0, 1]."""
    n, i, j, _ = images.shape
    cells = min(cells, i, j)
    if i % cells or j % cells:
        raise ValueError(f"images of {i}x{j} cannot be cut into {cells}x{cells} squares")
    away = (images.astype(np.float64) - reference) / 255
    means = away.reshape(n, cells, i // cells, cells, j // cells, 3).mean((2, 4))
    return np.abs(means).mean((1, 2, 3))


@typed
def difference(plain: Float[np.ndarray, " n"], guided: Float[np.ndarray, " n"]) -> dict[str, object]:
    """Both means, and the mean of the paired differences with its interval of 95 % (normal, from their variance).

    Errors: ValueError for fewer than two pairs.
    """
    if len(plain) < 2:
        raise ValueError("an interval needs at least two pairs of images")
    gain = guided - plain
    middle, half = float(gain.mean()), 1.96 * float(gain.std(ddof=1)) / len(gain) ** 0.5
    rounded = lambda *x: [round(float(v), 4) for v in x]
    return {
        **dict(zip(("plain", "guided", "gain"), rounded(plain.mean(), guided.mean(), middle), strict=True)),
        "interval": rounded(middle - half, middle + half),
    }


def measured(
    judge: Matching, plain: Sequence[Drawn], guided: Sequence[Drawn], references: Sequence[np.ndarray] = ()
) -> dict[str, object]:
    """Gains over all pairs: `text`, the cosine of an image with its prompt, where it has one; with references, uint8
    (i, j, 3), `image`, the cosine with the reference, and `layout`, the difference from it, which is to fall."""
    before, after = (np.concatenate([d.images for d in several]) for several in (plain, guided))
    codes = [unit(judge.codes(images)) for images in (before, after)]
    prompts = [prompt for d in plain for prompt in d.prompts]
    report: dict[str, object] = {"images": len(before)}
    if any(prompts):
        own = unit(judge.sentences(prompts))
        has = np.asarray([bool(p) for p in prompts])
        report["text"] = difference(*(np.sum(c * own, 1)[has].astype(np.float64) for c in codes))
    if references:
        counts = [len(d.images) for d in plain]
        wanted = np.repeat(unit(judge.codes(np.stack(references))), counts, 0)
        report["image"] = difference(*(np.sum(c * wanted, 1).astype(np.float64) for c in codes))
        report["layout"] = difference(
            *(
                np.concatenate([layout(d.images, r) for d, r in zip(several, references, strict=True)])
                for several in (plain, guided)
            )
        )
    return report


def main(arguments: Sequence[str]) -> None:
    args, rest = parse_some(AgreementArguments, list(arguments), "python -m t2i_jax.evaluation.agreement")
    if args.out:
        check_free(local(args.out))
    data = load_experiment(args.config, rest).data.with_shapes()
    size = data.image_size
    plain, guided = ([Drawn.read(folder, size) for folder in some] for some in (args.plain, args.guided))
    for folders, a, b in zip(zip(args.plain, args.guided, strict=True), plain, guided, strict=True):
        if (a.prompts, a.seeds) != (b.prompts, b.seeds):
            raise ConfigError(f"{folders[0]} and {folders[1]} are not of the same prompts and seeds")
    references = [square_of(path, size) for path in args.references]
    train, test = (images_of(records_of(data, split, args.count)) for split in ("train", "test"))
    space = space_of(args.space).load()
    real, spanning = space(test), space(train)

    def distance(several: Sequence[Drawn]) -> float:
        return compare(space(np.concatenate([d.images for d in several])), real, spanning)["frechet"].value

    report: Mapping[str, object] = measured(Matching.load(args.by), plain, guided, references)
    frechet = {"plain": round(distance(plain), 2), "guided": round(distance(guided), 2)}
    frechet["ratio"] = round(frechet["guided"] / frechet["plain"], 3)
    report = {"by": args.by, **report, "frechet": {"space": space.name, "real": len(real), **frechet}}
    if args.out:
        write_json(args.out, report)
    stdout().print_json(data=report)


if __name__ == "__main__":
    as_program(main)
