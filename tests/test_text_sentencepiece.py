"""SentencePiece: nothing is lost on the way there and back, and wrong files say what they are."""

import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest

from t2i_jax.storage.artifacts import resolve_files
from t2i_jax.text.sentencepiece import SentencePiece, train_vocabulary

THINGS = ("apple on a table", "dog runs", "house with a roof", "cat 🐈", "りんご", "дом", "face with tears of joy 😂")
CAPTIONS = [
    f"{a} {c} {n}" for a in ("small", "shiny", "old") for c in ("red", "blue", "тёмный", "青い") for n in THINGS
]
TEXTS = [
    "a small red apple",
    "日本の国旗、ひらがな",
    "привет, мир",
    "👨‍👩‍👧 family 🇯🇵",  # joiners inside
    "Zażółć gęślą jaźń",  # letters the captions lack
    "<s> </s> <pad> <unk> <0x41>",  # not the special pieces
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "new" / "captions.model"
    assert train_vocabulary(CAPTIONS, path, 400) == SentencePiece(str(path)).pieces
    return str(path)


def test_there_and_back(vocabulary):
    text = SentencePiece(vocabulary, 80)
    ids, mask = text(TEXTS)
    assert text.decode(ids) == TEXTS
    assert ids.shape == mask.shape == (len(TEXTS), 80)
    assert ids.dtype == np.int32 and mask.dtype == bool
    assert ids.min() >= 0 and ids.max() < text.pieces <= 400
    assert 0 not in ids[mask]  # bytes stand in for what is unknown


def test_beginning_end_and_padding(vocabulary):
    ids, mask = SentencePiece(vocabulary, 20)(["dog runs", "a house with a roof"])
    lengths = mask.sum(1)
    np.testing.assert_array_equal(mask, np.arange(20) < lengths[:, None])
    assert (ids[:, 0] == 1).all() and (ids[np.arange(2), lengths - 1] == 2).all() and (ids[~mask] == 3).all()


def test_long_captions_are_cut_and_closed(vocabulary):
    text = SentencePiece(vocabulary, 16)
    ids, mask = text(["dog " * 2500, "猫" * 10_000])
    assert mask.all() and (ids[:, 0] == 1).all() and (ids[:, -1] == 2).all()
    np.testing.assert_array_equal(ids[0, :15], SentencePiece(vocabulary, 40)(["dog " * 2500])[0][0, :15])


def test_an_empty_caption_is_all_padding(vocabulary):
    ids, mask = SentencePiece(vocabulary, 8)(["", "  \n\t", "dog"])
    np.testing.assert_array_equal(mask.any(1), [False, False, True])
    assert (ids[:2] == 3).all()
    assert SentencePiece(vocabulary, 8)([])[0].shape == (0, 8)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_same_captions_give_the_same_file(kind, tmp_path):
    files = [tmp_path / name for name in "ab"]
    for file in files:
        train_vocabulary(iter(CAPTIONS), file, 350, kind)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == files  # and nothing else


def test_workers_get_the_path_only(vocabulary):
    text = SentencePiece(vocabulary, 8)
    text(["dog"])
    assert len(pickle.dumps(text)) < 1000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(text))(["dog"])[0], text(["dog"])[0])


def test_a_retrained_vocabulary_is_read_anew(tmp_path):
    path = tmp_path / "v.model"
    train_vocabulary(CAPTIONS, path, 400)
    before = SentencePiece(str(path)).pieces
    path.unlink()  # it is not written over
    train_vocabulary(CAPTIONS, path, 303)
    assert SentencePiece(str(path)).pieces < before


def test_a_missing_vocabulary_says_how_to_get_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.model.*t2i data vocab"):
        SentencePiece(str(tmp_path / "none.model"))(["dog"])


def test_a_vocabulary_that_is_gone_is_named_in_its_folder(tmp_path):
    path = lambda name: resolve_files(SentencePiece(name), tmp_path).path
    assert path("vocabulary.model") == str(tmp_path / "vocabulary.model")
    assert path("else/where.model") == "else/where.model"


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"no model " * 100])
def test_a_damaged_vocabulary_is_named(vocabulary, damage, tmp_path):
    path = tmp_path / "damaged.model"
    path.write_bytes(damage(Path(vocabulary).read_bytes()))
    with pytest.raises(ValueError, match=r"damaged\.model is no SentencePiece vocabulary"):
        SentencePiece(str(path))(["dog"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(captions=CAPTIONS, size=100), "no vocabulary of size 100 from 84 captions"),
        (
            dict(captions=CAPTIONS, size=270),
            r"no vocabulary of size 270 from 84 captions: their characters need at least \d+",
        ),
        (dict(captions=CAPTIONS, size=2**40), "no vocabulary of size 1099511627776"),
        (dict(captions=["", " "]), "no captions"),
        (dict(captions=["a dog", 7]), "a caption is a string, not int: 7"),
        (dict(captions=CAPTIONS, model_type="words"), "it is unigram or bpe"),
    ],
)
def test_trainings_that_cannot_be(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_vocabulary(out=tmp_path / "v.model", **arguments)
    assert not list(tmp_path.iterdir())


def test_lengths_without_room_for_text_are_refused(vocabulary):
    with pytest.raises(ValueError, match=r"SentencePiece\.length 2"):
        SentencePiece(vocabulary, 2)


def test_a_vocabulary_of_a_package():
    spec = importlib.util.find_spec("mistral_common")
    if spec is None:
        pytest.skip("mistral-common is not installed")
    text = SentencePiece(str(Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"), 80)
    ids, _ = text(TEXTS)
    assert text.pieces == 32_000 and text.decode(ids) == TEXTS
    assert ids.min() >= 0 and (ids[:, 0] == 1).all()  # it has no padding of its own
    assert not text([""])[1].any()
