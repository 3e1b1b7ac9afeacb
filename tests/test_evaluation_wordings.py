"""What a text encoder makes of new wordings: counted on vectors that are known."""

import numpy as np
import pytest

from t2i_jax.core.errors import ConfigError
from t2i_jax.evaluation.wordings import known, main

WORDS = ("red", "blue", "disc", "box")


def bag(records):
    """Each word its own direction; what is not known says nothing."""
    return np.asarray([[w in record["captions"][0].split() for w in WORDS] for record in records], np.float32)


def records(*wordings):
    captions = ("red disc", "blue disc", "red box")
    return [
        {"captions": [c, "a disc"], "unseen_caption": new, "concept": c.split()[1]}
        for c, new in zip(captions, wordings, strict=True)
    ]


def test_the_nearest_first_caption_is_counted():
    right = records("drawn disc red", "drawn disc blue", "drawn box red")
    assert known(right, bag, 3) == {"same image": 1, "same concept": 1}
    swapped = records("drawn disc blue", "drawn disc red", "drawn box red")
    assert known(swapped, bag, 3) == pytest.approx({"same image": 1 / 3, "same concept": 1})
    assert known(records("disc red", "box", "blue disc"), bag, 2) == {"same image": 0.5, "same concept": 0.5}


def test_data_without_new_wordings_and_text_without_features_are_refused():
    with pytest.raises(ConfigError, match="no record has an 'unseen_caption'"):
        known([{"captions": ["red disc"]}] * 2, bag, 2)
    with pytest.raises(ConfigError, match="--encoder: a SentencePiece embeds no captions"):
        main(["configs/glyphs_damsm.py"])
