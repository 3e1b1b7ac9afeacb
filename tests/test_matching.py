"""Word-region matching against the equations as loops, and what it makes of empty captions and of classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.nn.matching import matching_accuracy, matching_losses, matching_scores, word_region_scores

LENGTHS = (5, 3, 1, 4)


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    mask = jnp.arange(5) < jnp.array(LENGTHS)[:, None]
    return {"words": draw(4, 5, 6), "mask": mask, "sentence": draw(4, 6), "regions": draw(4, 7, 6), "code": draw(4, 6)}


SCORES, LOSSES = jax.jit(word_region_scores), jax.jit(matching_losses)


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def by_loops(words, regions, n, gamma1, gamma2):
    words, regions = np.asarray(words[:n], np.float64), np.asarray(regions, np.float64)
    attention = softmax(gamma1 * softmax(regions @ words.T, 1).T, 1)  # over words, then over regions
    seen = attention @ regions
    cosine = (seen * words).sum(1) / np.linalg.norm(seen, axis=1) / np.linalg.norm(words, axis=1)
    return np.log(np.exp(gamma2 * cosine).sum()), attention


def test_scores_are_those_of_the_equations(pairs):
    scores, attention = SCORES(pairs["words"], pairs["mask"], pairs["regions"], 3.0, 6.0)
    for c, n in enumerate(LENGTHS):
        for i in range(4):
            score, weights = by_loops(pairs["words"][c], pairs["regions"][i], n, 3.0, 6.0)
            np.testing.assert_allclose(scores[i, c], score, rtol=1e-5)
            if i == c:
                np.testing.assert_allclose(attention[c, :n], weights, rtol=1e-5)
                assert not attention[c, n:].any()


def test_losses_are_cross_entropies_both_ways(pairs):
    classes, gamma3 = jnp.array([0, 1, 0, 2]), 7.0
    losses = LOSSES(**pairs, classes=classes, gamma3=gamma3)
    words = SCORES(pairs["words"], pairs["mask"], pairs["regions"])[0]
    unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)
    for name, logits in (("words", words), ("sentence", unit(pairs["code"]) @ unit(pairs["sentence"]).T)):
        logits = gamma3 * np.array(logits)
        logits[0, 2] = logits[2, 0] = -np.inf
        for way, rows in (("image_to_text", logits), ("text_to_image", logits.T)):
            np.testing.assert_allclose(losses[f"{name}/{way}"], -np.log(np.diag(softmax(rows, 1))).mean(), rtol=1e-5)


def test_a_caption_without_words_counts_in_no_loss(pairs):
    without = {k: v[:3] for k, v in pairs.items()}
    emptied = pairs | {"mask": pairs["mask"] & (jnp.arange(4) < 3)[:, None]}
    loss = lambda words, sentence: sum(matching_losses(**(emptied | {"words": words, "sentence": sentence})).values())
    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(pairs["words"], jnp.zeros((4, 6)))
    assert all(jnp.isfinite(g).all() for g in grads)
    kept = without | {"sentence": jnp.zeros((3, 6))}
    np.testing.assert_allclose(value, sum(LOSSES(**kept).values()), rtol=1e-6)


def test_accuracy_counts_images_whose_own_caption_is_best(pairs):
    code = jnp.eye(4, 6)
    scores = matching_scores(**(pairs | {"code": code, "sentence": code[jnp.array([1, 0, 2, 3])] + 0.1 * code}))
    assert matching_accuracy(scores)["sentence_accuracy"] == 0.5
    assert matching_accuracy(scores, jnp.array([0, 0, 1, 2]))["sentence_accuracy"] == 1.0
