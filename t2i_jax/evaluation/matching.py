"""How well a DAMSM finds the caption of an image: R-precision (Xu et al. 2018, AttnGAN)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import jax
import numpy as np

from t2i_jax.evaluation.alignment import retrieve_captions, unit
from t2i_jax.evaluation.features import batches
from t2i_jax.evaluation.report import Number
from t2i_jax.text.damsm import DamsmText, load_image_encoder

CHOICES = 100


@dataclasses.dataclass(frozen=True)
class Matching:
    """Both encoders of a DAMSM."""

    codes: Callable[[np.ndarray], np.ndarray]
    """images uint8 (n, i, j, 3) -> codes (n, k)"""
    sentences: Callable[[Sequence[str]], np.ndarray]
    """n captions -> sentences (n, k)"""

    @classmethod
    def load(cls, path: str | Path, batch_size: int = 50) -> Matching:
        """The DAMSM of a run or a released model. Errors: those of `DamsmText` and `load_image_encoder`."""
        text = DamsmText(str(path))
        captions, images = text.load(), load_image_encoder(path)
        read = jax.jit(lambda model, ids, mask: text.features(model, ids, mask)[:, 0])
        look = jax.jit(lambda model, x: model(x.astype(np.float32) / 127.5 - 1)[1])

        def batched(step: Callable[..., jax.Array], *arrays: np.ndarray) -> np.ndarray:
            rows = batches(len(arrays[0]), batch_size)
            return np.concatenate([np.asarray(step(*(x[some] for x in arrays)))[:count] for some, count in rows])

        return cls(
            lambda samples: batched(lambda x: look(images, x), samples),
            lambda texts: batched(lambda *x: read(captions, *x), *text(list(texts))),
        )

    def evaluate(
        self,
        samples: np.ndarray,
        real: np.ndarray | None,
        captions: Sequence[str],
        classes: Sequence[Hashable],
        others: Sequence[str],
        other_classes: Sequence[Hashable],
    ) -> dict[str, Number]:
        """R-precision of images uint8 (n, i, j, 3) for their captions, among 99 captions of other classes.

        real: images of the same captions, for a baseline. others: captions to choose from too, where `captions`, which
        are worded alike, do not have 99 of other classes. Keys: `matching/r_precision`, and `matching/cosine`, that of
        images with their own captions.
        """
        fewest = len(classes) - max(Counter(classes).values())
        pool, kinds = list(captions), list(classes)
        if fewest < CHOICES - 1:
            pool, kinds = [*pool, *others], [*kinds, *other_classes]
        sentences = self.sentences(pool)
        own = sentences[: len(captions)]
        numbers: dict[str, tuple[float, float]] = {}
        chance = 0.0
        for name, images in (("", samples), *([("real", real)] if real is not None else [])):
            codes = self.codes(images)
            found = retrieve_captions(codes, own, classes, sentences, kinds, CHOICES)
            numbers[name] = found.top(1), float(np.sum(unit(codes) * unit(own), 1).mean())
            chance = found.chance(1)
        baselines = lambda i: {name: value[i] for name, value in numbers.items() if name}
        return {
            "matching/r_precision": Number(numbers[""][0], "higher", baselines(0) | {"chance": chance}),
            "matching/cosine": Number(numbers[""][1], "higher", baselines(1)),
        }
