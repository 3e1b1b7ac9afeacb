"""Matching of captions and images: words attend to regions, and each pair is compared with all others of the batch.

This is the deep attentional multimodal similarity of AttnGAN (Xu et al. 2018, arXiv:1711.10485, section 3.2).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from t2i_jax.core.arrays import Bool, Float, Int, typed
from t2i_jax.nn.contrastive import against_others, mean_of_known
from t2i_jax.nn.layers import at_least_fp32


@typed
def word_region_scores(
    words: Float[Array, "b s k"],
    mask: Bool[Array, "b s"],
    regions: Float[Array, "b r k"],
    gamma1: float = 4.0,
    gamma2: float = 5.0,
) -> tuple[Float[Array, "b b"], Float[Array, "b s r"]]:
    """Scores (image, caption) of all pairs, and each caption's attention to the regions of its own image, both fp32.

    Attention of a word is softmax over regions of gamma1 times the softmax over words of <word, region>; c is the sum
    of the regions under it; a score is log sum over words of exp(gamma2 cos(c, word)) (equations 7 to 10). Words whose
    mask is False do not count, and their attention is 0; the score of a caption without words is 0.
    """
    words, regions = at_least_fp32(words), at_least_fp32(regions)
    attention = _attention(jnp.einsum("csk,irk->icsr", words, regions), mask, gamma1)
    seen = jnp.einsum("icsr,irk->icsk", attention, regions)
    cosine = jnp.einsum("icsk,csk->ics", seen, words) / (_norm(seen) * _norm(words))
    scores = jax.nn.logsumexp(gamma2 * cosine, -1, where=mask)
    own = _attention(jnp.einsum("bsk,brk->bsr", words, regions), mask, gamma1)
    return jnp.where(mask.any(1), scores, 0), jnp.where(mask[..., None], own, 0)


def _attention(products: Array, mask: Array, gamma1: float) -> Array:
    """Products (..., b, s, r) of words and regions -> attention over regions, arbitrary where the mask (b, s) is
    False."""
    products = jnp.where(mask[..., None], products, -1e30)  # finite: a caption may have no words
    return jax.nn.softmax(gamma1 * jax.nn.softmax(products, -2), -1)


def _norm(x: Array) -> Array:
    """Euclidean norm over the last dimension, at least 1e-8; the gradient at 0 is 0."""
    return jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1), 1e-16))


class Scores(NamedTuple):
    """Scores (image, caption) of all pairs of a batch, in fp32."""

    words: Array
    """(b, b), gamma3 times `word_region_scores`"""
    sentence: Array
    """(b, b), gamma3 times the cosine of the image's code and the sentence"""
    known: Array
    """bool (b,): captions with at least one word; others count in no loss"""


def matching_scores(
    words: Array,
    mask: Array,
    sentence: Array,
    regions: Array,
    code: Array,
    gamma1: float = 4.0,
    gamma2: float = 5.0,
    gamma3: float = 10.0,
) -> Scores:
    """Scores of all pairs; arguments as for `matching_losses`."""
    sentence, code = at_least_fp32(sentence), at_least_fp32(code)
    cosine = code @ sentence.T / (_norm(code)[:, None] * _norm(sentence))
    return Scores(gamma3 * word_region_scores(words, mask, regions, gamma1, gamma2)[0], gamma3 * cosine, mask.any(1))


def matching_losses(
    words: Float[Array, "b s k"],
    mask: Bool[Array, "b s"],
    sentence: Float[Array, "b k"],
    regions: Float[Array, "b r k"],
    code: Float[Array, "b k"],
    classes: Int[Array, " b"] | None = None,
    gamma1: float = 4.0,
    gamma2: float = 5.0,
    gamma3: float = 10.0,
) -> dict[str, Array]:
    """The four losses of a batch of pairs, scalars in fp32; their sum trains the encoders (equation 13).

    `words/image_to_text` and `words/text_to_image`: cross-entropy of the own caption of each image among all captions,
    and of the own image of each caption, by gamma3 times the scores of words; `sentence/...`: by gamma3 times the
    cosine of code and sentence. Other pairs of the same class, where `classes` are given, are no negatives. Captions
    without words do not count.
    """
    return losses_of_scores(matching_scores(words, mask, sentence, regions, code, gamma1, gamma2, gamma3), classes)


def losses_of_scores(scores: Scores, classes: Array | None = None) -> dict[str, Array]:
    """The losses of `matching_losses` from the scores."""
    found = {}
    for name, logits in (("words", scores.words), ("sentence", scores.sentence)):
        logits = _against_others(logits, scores.known, classes)
        found[f"{name}/image_to_text"] = _cross_entropy(logits, scores.known)
        found[f"{name}/text_to_image"] = _cross_entropy(logits.T, scores.known)
    return found


def matching_accuracy(scores: Scores, classes: Array | None = None) -> dict[str, Array]:
    """Share of images whose own caption scores highest in the batch, `words_accuracy` and `sentence_accuracy`: scalars
    in fp32."""
    found = {}
    for name, logits in (("words", scores.words), ("sentence", scores.sentence)):
        best = _against_others(logits, scores.known, classes).argmax(1) == jnp.arange(len(logits))
        found[f"{name}_accuracy"] = mean_of_known(best.astype(jnp.float32), scores.known)
    return found


def _against_others(logits: Array, known: Array, classes: Array | None) -> Array:
    """Logits (b, b) with -inf for pairs that are no negatives."""
    return against_others(logits, jnp.arange(len(logits)), known, classes)


def _cross_entropy(logits: Array, known: Array) -> Array:
    return mean_of_known(-jnp.diagonal(jax.nn.log_softmax(logits)), known)
