"""Which kind of image a model draws, and whether it copies: a linear probe on frozen features of real images.

    python -m t2i_jax.evaluation.probe configs/rarm.py --field style --images samples/a samples/b --out probe.json

The probe is trained on images of the training split and tried on those of the splits that are held out; then it says
how often each folder's images are of each kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from t2i_jax.core.arrays import Float, typed
from t2i_jax.core.config import ConfigError, parse_some
from t2i_jax.core.console import stdout
from t2i_jax.core.fields import Checked, Range
from t2i_jax.core.outputs import check_free, local, write_json
from t2i_jax.evaluation.alignment import wilson
from t2i_jax.evaluation.features import Space, images_of, space_of
from t2i_jax.evaluation.metrics import blocks, distances
from t2i_jax.evaluation.neighbours import images_in, square_of
from t2i_jax.evaluation.program import as_program
from t2i_jax.evaluation.run import records_of
from t2i_jax.training.experiment import load_experiment


@dataclasses.dataclass(frozen=True)
class Probe:
    """The classifier argmax(W (x - mean) / std + b): ridge regression to the classes' indicators."""

    classes: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    weights: np.ndarray
    """(d + 1, classes), the last row the bias"""

    @classmethod
    def fit(cls, features: np.ndarray, labels: Sequence[str], ridge: float = 0.1) -> Probe:
        """The probe of features (n, d): min |X W - Y|^2 + ridge n |W|^2, each feature of variance 1.

        Errors: ValueError for fewer than two classes.
        """
        classes = tuple(sorted(set(labels)))
        if len(classes) < 2:
            raise ValueError(f"a probe tells several classes apart, there is {', '.join(classes) or 'none'}")
        x = features.astype(np.float64)
        mean, std = x.mean(0), x.std(0) + 1e-6
        x = np.concatenate([(x - mean) / std, np.ones((len(x), 1))], 1)
        y = np.asarray([[label == c for c in classes] for label in labels], np.float64)
        penalty = ridge * len(x) * np.eye(x.shape[1])
        penalty[-1, -1] = 0
        return cls(classes, mean, std, np.linalg.solve(x.T @ x + penalty, x.T @ y))

    def __call__(self, features: np.ndarray) -> list[str]:
        """The class of each row (n, d)."""
        scores = (features - self.mean) / self.std @ self.weights[:-1] + self.weights[-1]
        return [self.classes[i] for i in scores.argmax(1)]


@typed
def nearest_distances(images: Float[np.ndarray, "n d"], known: Float[np.ndarray, "m d"]) -> Float[np.ndarray, " n"]:
    """The distance of each row to the nearest of the known ones."""
    return np.concatenate([distances(rows, known).min(1) for rows in blocks(images)])


@dataclasses.dataclass(frozen=True)
class ProbeArguments(Checked):
    """Which kind of image folders hold, by a linear probe that is trained on real images of a config, and how near
    they are to training images."""

    config: tyro.conf.Positional[Path]
    images: tuple[Path, ...]
    """folders of images, as of `t2i sample`"""
    field: str = "style"
    """text field of the records that says the kind of an image"""
    out: Path | None = None
    """a JSON file of the numbers"""
    count: Annotated[int, Range(low=20)] = 3000
    """training images that the probe learns from"""
    held_out: Annotated[int, Range(low=20)] = 500
    """images that it is tried on"""
    split: str = "test"
    space: str = "efficientnet_lite0"


def main(arguments: Sequence[str]) -> None:
    args, rest = parse_some(ProbeArguments, list(arguments), "python -m t2i_jax.evaluation.probe")
    if args.out:
        check_free(local(args.out))
    files = {str(folder): images_in(folder) for folder in args.images}
    data = load_experiment(args.config, rest).data.with_shapes()
    size = data.image_size
    train, test = (records_of(data, *wanted) for wanted in (("train", args.count), (args.split, args.held_out)))
    for record in (*train, *test):
        if not isinstance(record.get(args.field), str):
            raise ConfigError(f"--field {args.field}: record {record.get('key')} has no such text")
    if not test:
        raise ConfigError(f"--split {args.split}: there is no such image")
    space = space_of(args.space).load()
    known, others = space(images_of(train)), space(images_of(test))
    probe = Probe.fit(known, [record[args.field] for record in train])
    right = sum(a == r[args.field] for a, r in zip(probe(others), test, strict=True))
    reference = nearest_distances(others, known)
    report: dict[str, object] = {
        "probe": {"field": args.field, "space": space.name, "trained on": len(train), "held out": len(test)},
        "accuracy on held-out images": _share(right, len(test)),
        "held out": _near(reference, reference),
    }
    for folder, paths in files.items():
        images = np.stack([square_of(path, size) for path in paths])
        report[folder] = measured(space, probe, images, known, reference)
    if args.out:
        write_json(args.out, report)
    stdout().print_json(data=report)


def measured(
    space: Space, probe: Probe, images: np.ndarray, known: np.ndarray, reference: np.ndarray
) -> dict[str, object]:
    """How often images uint8 (n, i, j, 3) are of each class, and how near they are to the known features (m, d);
    reference: the same distances of held-out images."""
    features = space(images)
    found = probe(features)
    shares = {c: _share(found.count(c), len(found)) for c in probe.classes}
    return {"images": len(found), "shares": shares, **_near(nearest_distances(features, known), reference)}


def _share(hits: int, count: int) -> Mapping[str, object]:
    low, high = wilson(hits, count)
    return {"share": round(hits / count, 4), "interval": [round(low, 4), round(high, 4)]}


def _near(found: np.ndarray, reference: np.ndarray) -> dict[str, object]:
    """The median distance to the nearest training image, and how many are nearer than all but one in a hundred
    held-out images are."""
    bound = float(np.quantile(reference, 0.01))
    return {
        "median distance to the nearest training image": round(float(np.median(found)), 3),
        "nearer than the nearest 1 % of held-out images": int((found < bound).sum()),
    }


if __name__ == "__main__":
    as_program(main)
