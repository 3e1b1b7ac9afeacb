"""The trained judge finds held-out pairs of a world it can learn, and is at chance where there is nothing to learn."""

import numpy as np
import pytest

from t2i_jax.evaluation.judge import JudgeConfig, RetrievalJudge

CONFIG = JudgeConfig(width=16, hidden=64, epochs=25, batch=100)
rng = np.random.default_rng(0)
# A world of 6 properties: "pictures" and "captions" are two noisy linear views of them.
WORLD = rng.normal(size=(700, 6)).astype(np.float32)
PICTURES = WORLD @ rng.normal(size=(6, 40)).astype(np.float32) + 0.05 * rng.normal(size=(700, 40)).astype(np.float32)
TEXTS = WORLD @ rng.normal(size=(6, 20)).astype(np.float32)
CAPTIONS = [str(i) for i in range(700)]
see, read = lambda rows: PICTURES[rows], lambda captions: TEXTS[[int(c) for c in captions]]
TRAIN, TEST = np.arange(600), np.arange(600, 700)


def test_learns_and_is_fair():
    judge = RetrievalJudge.train(see, read, TRAIN, CAPTIONS[:600], CONFIG)
    numbers = judge.evaluate(rng.permutation(TEST), CAPTIONS[600:], TEST)
    assert numbers["judge/top1"].baselines["real"] > 0.5 and numbers["judge/top1"].baselines["chance"] == 0.01
    assert numbers["judge/top5"].value < 0.2  # right pictures under wrong captions
    assert numbers["judge/cosine"].value < 0.3 < numbers["judge/cosine"].baselines["real"]
    again = RetrievalJudge.train(see, read, TRAIN, CAPTIONS[:600], CONFIG)
    np.testing.assert_array_equal(judge.similarity(TEST[:3], CAPTIONS[:5]), again.similarity(TEST[:3], CAPTIONS[:5]))


def test_pairs_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="600 images with 3 captions"):
        RetrievalJudge.train(see, read, TRAIN, CAPTIONS[:3], CONFIG)
