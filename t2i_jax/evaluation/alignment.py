"""Does an image show its prompt? Retrieval of the true concept or caption among others."""

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np

from t2i_jax.core.arrays import Float, Int, typed
from t2i_jax.evaluation.metrics import check_features


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Ranks (n,) of the truth, 1 being the best, among `choices`."""

    ranks: np.ndarray
    choices: int
    fewer: np.ndarray | None = None
    """choices (n,) of each query, where some have fewer"""

    def top(self, k: int) -> float:
        """Share of queries whose truth is among the first k."""
        return float((self.ranks <= k).mean())

    def interval(self, k: int) -> tuple[float, float]:
        """The interval of 95 % of `top(k)`, as of other queries of the same kind."""
        return wilson(int((self.ranks <= k).sum()), len(self.ranks))

    @property
    def median(self) -> float:
        return float(np.median(self.ranks))

    def chance(self, k: int) -> float:
        """`top(k)` of uninformative queries."""
        return float(np.minimum(k / (self.choices if self.fewer is None else self.fewer), 1.0).mean())

    @property
    def median_by_chance(self) -> float:
        return (self.choices + 1) / 2


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share (Wilson 1927), of 95 % unless z says otherwise."""
    share, extra = hits / count, z * z / count
    middle = (share + extra / 2) / (1 + extra)
    reach = z / (1 + extra) * math.sqrt(share * (1 - share) / count + extra / (4 * count))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def retrieve(
    queries: np.ndarray,
    gallery: np.ndarray,
    query_concepts: Sequence | None = None,
    gallery_concepts: Sequence | None = None,
) -> Retrieval:
    """Rank of each query's concept by cosine of centred features.

    Queries (n, d) are generated images, the gallery (m, d) real ones, with a concept each (a caption, or the index
    in the list where none is given). A concept scores as its most similar image; ties count against the query, so
    that images without content do not find everything. Both are centred by the gallery's mean alone: the rank of one
    generated image does not depend on the others.

    Errors: `ValueError` for a query whose concept has no image in the gallery.
    """
    wanted = list(range(len(queries)) if query_concepts is None else query_concepts)
    shown = list(range(len(gallery)) if gallery_concepts is None else gallery_concepts)
    if len(wanted) != len(queries) or len(shown) != len(gallery):
        raise ValueError(
            f"{len(queries)} queries with {len(wanted)} concepts, {len(gallery)} images with {len(shown)} concepts"
        )
    place = {concept: i for i, concept in enumerate(dict.fromkeys(shown))}
    missing = [concept for concept in wanted if concept not in place]
    if missing:
        raise ValueError(f"no real image of {missing[0]!r}" + (f" and {len(missing) - 1} more" * (len(missing) > 1)))
    for features in (queries, gallery):
        check_features(features, 1)
    mean = gallery.mean(0, keepdims=True)
    similarity = unit(queries - mean) @ unit(gallery - mean).T
    scores = np.full((len(queries), len(place)), -np.inf, similarity.dtype)
    np.maximum.at(scores.T, [place[concept] for concept in shown], similarity.T)
    return rank(scores, np.array([place[concept] for concept in wanted]))


@typed
def retrieve_captions(
    codes: Float[np.ndarray, "n d"],
    sentences: Float[np.ndarray, "n d"],
    classes: Sequence[Hashable],
    others: Float[np.ndarray, "m d"],
    other_classes: Sequence[Hashable],
    choices: int = 100,
    seed: int = 0,
) -> Retrieval:
    """Rank of each image's own caption by cosine, among `choices` captions of which all others are of other classes.

    `top(1)` is R-precision (Xu et al. 2018, AttnGAN, section 4). Codes and sentences (n, d) are of images and of their
    own captions, others (m, d) of the captions from which the rest are drawn; classes may be labels or the captions
    themselves. There are fewer choices where a class leaves fewer.

    Errors: `ValueError` where a class leaves none.
    """
    kinds = {kind: n for n, kind in enumerate(dict.fromkeys([*classes, *other_classes]))}
    own, theirs = (np.array([kinds[kind] for kind in some]) for some in (classes, other_classes))
    apart = [np.flatnonzero(theirs != kind) for kind in own]
    choices = min(choices, 1 + min(map(len, apart)))
    if choices < 2:
        raise ValueError("R-precision: all captions are of one class, and there are no others to compare with")
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.choice(some, choices - 1, replace=False) for some in apart])
    codes, sentences, others = unit(codes), unit(sentences), unit(others)
    scores = [np.sum(codes * sentences, 1, keepdims=True), np.einsum("nd,ncd->nc", codes, others[drawn])]
    return rank(np.concatenate(scores, 1), np.zeros(len(codes), int))


@typed
def retrieve_pairs(
    queries: Float[np.ndarray, "n d"], gallery: Float[np.ndarray, "n d"], kinds: Sequence[Hashable]
) -> Retrieval:
    """Rank by cosine of the own entry of each query among all entries of the gallery, the other side of n pairs, but
    for entries of the same kind (an equal caption), which are no wrong answers.
    """
    order = {kind: n for n, kind in enumerate(dict.fromkeys(kinds))}
    numbers = np.array([order[kind] for kind in kinds])
    scores = unit(queries) @ unit(gallery).T
    scores[(numbers[:, None] == numbers) & ~np.eye(len(scores), dtype=bool)] = -np.inf
    found = rank(scores, np.arange(len(scores)))
    return dataclasses.replace(found, fewer=np.isfinite(scores).sum(1))


@typed
def classify(
    codes: Float[np.ndarray, "n d"],
    sentences: Float[np.ndarray, "m d"],
    own: Sequence[Int[np.ndarray, " _"]],
    truth: Int[np.ndarray, " n"],
) -> Retrieval:
    """Zero-shot classification: rank of the class `truth` (n,) of each image, by cosine of its code and the class'
    vector, the mean of the unit vectors of its captions (Radford et al. 2021, 3.1.4); own: which of the m sentences are
    captions of each class."""
    sentences = unit(sentences)
    classes = unit(np.stack([sentences[rows].mean(0) for rows in own]))
    return rank(unit(codes) @ classes.T, truth)


@typed
def rank(scores: Float[np.ndarray, "n m"], truth: Int[np.ndarray, " n"]) -> Retrieval:
    """Ranks of the choices `truth` (n,) in scores (n, choices); ties count against them."""
    own = np.take_along_axis(scores, truth[:, None], 1)
    return Retrieval((scores >= own).sum(1), scores.shape[1])


@typed
def unit(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows scaled to length 1; zeros stay zero."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
