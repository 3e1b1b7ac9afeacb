"""How well a model of images and captions matches them: R-precision (Xu et al. 2018, AttnGAN), retrieval both ways,
and zero-shot classification (Radford et al. 2021, CLIP)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax import Array

from t2i_jax.core.errors import ConfigError
from t2i_jax.core.narrow import text_encoder
from t2i_jax.evaluation.alignment import classify, retrieve_captions, retrieve_pairs, unit
from t2i_jax.evaluation.features import batches
from t2i_jax.evaluation.report import Number
from t2i_jax.networks.damsm import DAMSMNetwork
from t2i_jax.storage.artifacts import is_stored, open_artifact
from t2i_jax.text.clip import ClipEmbedding
from t2i_jax.text.damsm import DamsmText, load_image_encoder

CHOICES = 100
RECALLS = (1, 5, 10)
WORDINGS = ("{}", "a picture of {}", "an image of {}", "a drawing of {}", "an icon of {}")
"""Captions of a class by its name, whose mean vector is that of the class."""


@dataclasses.dataclass(frozen=True)
class Matching:
    """Both encoders of a DAMSM or a CLIP."""

    codes: Callable[[np.ndarray], np.ndarray]
    """images uint8 (n, i, j, 3) -> codes (n, k)"""
    sentences: Callable[[Sequence[str]], np.ndarray]
    """n captions -> sentences (n, k)"""

    @classmethod
    def load(cls, path: str | Path, batch_size: int = 50) -> Matching:
        """The DAMSM or the CLIP of a run or a released model, or a published CLIP. Errors: those of `DamsmText`,
        `load_image_encoder` and `ClipEmbedding`."""
        artifact = open_artifact(path).artifact if is_stored(path) else None
        if artifact is not None and not artifact.config.capabilities.image_text:
            kind = type(artifact.config).__name__
            raise ConfigError(f"{path} holds a {kind}; a DAMSM or a CLIP of clean images is wanted")
        if artifact is not None and isinstance(artifact.model, DAMSMNetwork):
            text = DamsmText(str(path))
            captions, images = text.load(), load_image_encoder(path)
            look = jax.jit(lambda model, x: model(signed(x))[1])
        else:
            text = ClipEmbedding(str(path))
            captions = images = text.load()
            look = jax.jit(lambda model, x: text.embed_images(model, signed(x)))
        encoder = text_encoder(text)
        read = jax.jit(lambda model, ids, mask: encoder.features(model, ids, mask)[:, 0])

        def batched(step: Callable[..., Array], *arrays: np.ndarray) -> np.ndarray:
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

    def retrieval(self, pictures: np.ndarray, captions: Sequence[str]) -> dict[str, Number]:
        """Recall at 1, 5 and 10 of n pairs, images uint8 (n, i, j, 3) and their captions: `image_to_text/r@1`, the
        share of images whose own caption is the most similar of all, and `text_to_image/r@1`, ...; pairs with the same
        caption are no wrong answers."""
        codes, sentences = self.codes(pictures), self.sentences(captions)
        numbers = {}
        for name, both in {"image_to_text": (codes, sentences), "text_to_image": (sentences, codes)}.items():
            found = retrieve_pairs(*both, captions)
            for k in RECALLS:
                known = {"chance": found.chance(k), "pairs": float(len(codes))}
                numbers[f"{name}/r@{k}"] = Number(found.top(k), "higher", known)
        return numbers

    def zero_shot(self, pictures: np.ndarray, names: Sequence[str]) -> dict[str, Number]:
        """Zero-shot classification of images uint8 (n, i, j, 3) of classes `names` (n,), among all classes of them:
        `zero_shot/top1` and `zero_shot/top5`. A class is the mean of its name in several `WORDINGS`."""
        classes = list(dict.fromkeys(names))
        said = [wording.format(name) for name in classes for wording in WORDINGS]
        own = np.arange(len(said)).reshape(len(classes), -1)
        truth = np.array([classes.index(name) for name in names])
        found = classify(self.codes(pictures), self.sentences(said), list(own), truth)
        known = lambda k: {"chance": found.chance(k), "classes": float(len(classes)), "images": float(len(names))}
        return {f"zero_shot/top{k}": Number(found.top(k), "higher", known(k)) for k in (1, 5)}


def signed(x: Array) -> Array:
    """Bytes as floats in [-1, 1]."""
    return x.astype(np.float32) / 127.5 - 1
