"""What a text side does not read of a caption is known, and said once."""

import dataclasses
import json
import logging
import random

import jax
import numpy as np
import pytest
import tokenizers

from t2i_jax.core import config
from t2i_jax.core.conditions import TextSpec
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.narrow import gives_features, image_text_encoder, learns_from_images, text_encoder
from t2i_jax.data import ArrayRecord, Data, write_records
from t2i_jax.models.ar import AR
from t2i_jax.models.damsm import DAMSM
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import CaptionEncoder
from t2i_jax.networks.dit import DiT
from t2i_jax.noise.processes import Flow
from t2i_jax.pipeline import Pipeline
from t2i_jax.release import release
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.storage.artifacts import Artifact, load_artifact, save_artifact
from t2i_jax.text.clip import ClipEmbedding, ClipText
from t2i_jax.text.cut import end, limited, noticing, unread
from t2i_jax.text.damsm import CaptionWords, DamsmText
from t2i_jax.text.decoder_lm import DecoderLM
from t2i_jax.text.minilm import MiniLM
from t2i_jax.text.sentencepiece import SentencePiece, train_vocabulary
from t2i_jax.text.t5 import T5
from t2i_jax.text.triple import Triple
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.loop import train
from tests.fixtures.captions import dictionary
from tests.fixtures.clip_files import TEXT, letters
from tests.fixtures.families import fresh
from tests.fixtures.t5_files import SIZES, vocabulary

WORDS = [
    "a",
    "red",
    "green",
    "apple",
    "on",
    "the",
    "table",
    "two",
    "dogs",
    "and",
    "cat",
    "words",
    "that",
    "go",
    "in",
    "long",
    "tail",
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Every text side, reading few tokens."""
    room = tmp_path_factory.mktemp("texts")
    for part in ("clip", "t5", "lm"):
        (room / part).mkdir()
    fields = TEXT | {"vocab_size": 516, "eos_token_id": 515, "bos_token_id": 514, "model_type": "clip_text_model"}
    (room / "clip" / "config.json").write_text(json.dumps(fields))
    letters(room / "clip")
    (room / "t5" / "config.json").write_text(json.dumps(SIZES))
    vocabulary(room / "t5")
    train_vocabulary([" ".join(WORDS[n:]) for n in range(9)], room / "vocabulary.model", 300)
    clip, t5 = ClipText(str(room / "clip")), T5(str(room / "t5"), 24)
    found = {
        "SentencePiece": SentencePiece(str(room / "vocabulary.model"), 12),
        "T5": t5,
        "T5 clean": T5(str(room / "t5"), 16, clean=True),
        "ClipText": clip,
        "ClipText padded with its end": ClipText(str(room / "clip"), pad=515),
        "ClipEmbedding": ClipEmbedding(str(room / "clip")),
        "Triple": Triple(clip, clip, t5),
        "CaptionWords": CaptionWords(dictionary(room / "captions.pickle", ["<end>", *WORDS]), 9),
    }
    damsm = DAMSM(1 + len(WORDS), 9, embed=4, dim=4, trunk=None)
    save_artifact(Artifact(damsm, fresh(damsm), found["CaptionWords"]), room / "damsm", "# DAMSM\n")
    found["DamsmText"] = DamsmText(str(room / "damsm"))
    vocabulary_of = {word: n for n, word in enumerate(["<unk>", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary_of, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(room / "lm" / "tokenizer.json"))
    found["DecoderLM"] = DecoderLM(str(room / "lm"), 9)
    found["DecoderLM in a template"] = DecoderLM(str(room / "lm"), 9, template="the long tail {}")
    try:
        MiniLM(10)(["x"])
        found["MiniLM"], found["MiniLM pooled"] = MiniLM(10), MiniLM(10, pooled=True)
    except ImportError:
        pass
    return found


def read(text, caption):
    """What the model is given of a caption."""
    return tuple(part.tobytes() for part in text([caption]))


SIDES = ["SentencePiece", "T5", "T5 clean", "ClipText", "ClipText padded with its end", "ClipEmbedding", "Triple"]
SIDES += ["CaptionWords", "DamsmText", "DecoderLM", "DecoderLM in a template", "MiniLM", "MiniLM pooled"]


@pytest.mark.parametrize("name", SIDES)
def test_what_is_cut_is_what_changes_nothing(texts, name):
    if name not in texts:
        pytest.skip("its package is not installed")
    text, rng = texts[name], random.Random(0)
    seen = set()
    for n in [*range(30), 200]:
        caption = " ".join(rng.choice(WORDS) for _ in range(n))
        (count,) = text.cut([caption])
        (more,) = text.cut([f"{caption} {WORDS[n % 9]}"])
        assert more >= count
        if count:  # further words add to the unread part, and to nothing else
            assert more > count and read(text, f"{caption} {WORDS[n % 9]}") == read(text, caption)
        elif not more:  # all is read: another word is another condition
            assert read(text, f"{caption} {WORDS[n % 9]}") != read(text, caption)
        full = text.full(*text([caption]))
        assert full.shape == (1,) and (full[0] or not count)
        seen.add(bool(count))
        if count and not name.startswith("DecoderLM in"):
            at = end(text, caption)
            assert text.cut([caption[:at]]) == [0] and caption[at : at + 1] == " "
            assert text.cut([caption[: caption.index(" ", at + 1)] if " " in caption[at + 1 :] else caption]) != [0]
    assert seen == {True, False}
    assert text.cut([]) == [] and text.cut([""]) == [0]


@pytest.mark.parametrize("name", SIDES)
def test_the_line_names_captions_and_where_they_end(texts, name):
    if name not in texts:
        pytest.skip("its package is not installed")
    text = texts[name]
    long = [f"{word} apple" + " and red" * 40 for word in ("a", "two", "the", "long", "green")]
    said = unread(text, ["a cat", *long, long[0]])
    assert said.startswith(f"{type(text).__name__} reads {text.room} tokens; longer are 'a apple and red")
    assert "'two apple" in said and "'the apple" in said and "; and 2 more" in said and "long apple" not in said
    assert "'a cat'" not in said and "\n" not in said and len(said) < 600
    assert f" by {text.cut(long)[0]}, not read from " in said
    assert unread(text, ["a cat", ""]) == "" and unread(text, []) == ""


def test_a_single_long_word_ends_within():
    text = SentencePieceOfLetters()
    assert end(text, "x" * 50) == 4 and end(text, "ab cdefgh") == 2
    assert (
        unread(text, ["x" * 50])
        == f"SentencePieceOfLetters reads 4 tokens; longer are '{'x' * 40}…' by 46, not read from '{'x' * 40}…' on"
    )


class SentencePieceOfLetters(SentencePiece):
    """A token for each letter."""

    def __init__(self):
        super().__init__("", 4)

    room = 4

    def tokens(self, captions):
        return [[ord(c) for c in caption if c != " "] for caption in captions]


@dataclasses.dataclass(frozen=True)
class Plain:
    """The least that a tokenizer is: its ids are the lengths of words."""

    length: int = 3
    vocabulary: int = 20
    """no file, whatever its name"""

    spec = TextSpec()

    def __call__(self, captions):
        rows = [[min(len(word), self.vocabulary - 1) for word in caption.split()] for caption in captions]
        ids = np.asarray([(row + [0] * self.length)[: self.length] for row in rows], np.int32)
        return ids.reshape(-1, self.length), ids.reshape(-1, self.length) > 0


def test_a_tokenizer_of_a_user_needs_only_the_protocol(tmp_path):
    """It trains, is released with the model and read again, and samples."""
    records = [{"image": np.full((8, 8, 3), 9 * n, np.uint8), "captions": ["a red cat"]} for n in range(8)]
    write_records(tmp_path / "data", records)
    data = Data(ArrayRecord(str(tmp_path / "data")), image_size=8, batch_size=8)
    small = dict(patch=4, width=16, depth=1, heads=2, learn_variance=False)
    network = with_fields(DiT((8, 8), 3), **small, condition=CaptionEncoder(20, 3, 16, 1, 2))
    family = Diffusion(network, Flow(), "velocity", sampling=DiffusionSampler(1, guidance=2.0))
    settings = Train(2, evaluate_every=0, preview_every=0, save_every=2)
    train(Experiment(family, data, settings, text=Plain()), tmp_path / "run")
    release(tmp_path / "run", tmp_path / "out")
    assert config.load(tmp_path / "run").text == Plain() == load_artifact(tmp_path / "out").text
    drawn = [Pipeline.load(tmp_path / name).sample(["a cat"]) for name in ("run", "out")]
    assert np.array_equal(*drawn) and drawn[0].shape == (1, 8, 8, 3)
    assert config.override(Experiment(family, data, text=Plain()), ["--text.length=4"]).text == Plain(4)


@pytest.mark.parametrize("text", [5, "words.model", len, SentencePiece, CaptionEncoder()])
def test_what_is_no_tokenizer_is_one_clear_error(text):
    with pytest.raises(ConfigError, match=r"^Experiment\.text.*(is no tokenizer|: a Tokenizer)"):
        Experiment(AR(), Data(ArrayRecord("nowhere")), text=text)


@pytest.mark.parametrize("name", SIDES)
def test_a_text_can_what_it_declares(texts, name):
    if name not in texts:
        pytest.skip("its package is not installed")
    text = texts[name]
    assert limited(text) is text and gives_features(text) == (name not in ("SentencePiece", "CaptionWords"))
    for flag, narrow in {"features": text_encoder, "image_features": image_text_encoder}.items():
        if dataclasses.asdict(text.spec)[flag]:
            assert narrow(text) is text
            continue
        with pytest.raises(ConfigError, match=f"a {type(text).__name__} gives no features"):
            narrow(text)
    if gives_features(text) and not name.startswith("DecoderLM"):
        vectors = 1 if name in ("MiniLM pooled", "ClipEmbedding") else text.length
        assert text_encoder(text).feature_shape[0] == vectors
    assert learns_from_images(text) == (name == "ClipEmbedding")
    for narrow in (text_encoder, image_text_encoder):
        for other in (None, Plain()):
            with pytest.raises(ConfigError, match="gives no features"):
                narrow(other)
    assert limited(None) is None and limited(Plain()) is None


def test_what_a_text_can_is_known_without_its_files():
    none = ClipText("none")
    triple = Triple(none, none, T5("none"))
    for text in (T5("none"), none, ClipEmbedding("none"), DecoderLM("none"), triple, DamsmText("none")):
        assert text.spec.features and text.spec.limited
    assert not SentencePiece("none").spec.features


def test_training_says_it_once(texts, caplog):
    text = noticing(texts["SentencePiece"])
    short, long = ["a cat", ""], ["a red apple " * 20, "two dogs " * 20]
    for captions in (short, short + long, long):
        for found, wanted in zip(text(captions), texts["SentencePiece"](captions), strict=True):
            np.testing.assert_array_equal(found, wanted)
    (record,) = caplog.records
    assert "captions are cut: SentencePiece reads 10 tokens; longer are 'a red apple" in record.getMessage()
    assert noticing(plain := Plain()) is plain and noticing(None) is None


def test_sampling_says_it_once_a_call(texts, caplog):
    caplog.set_level(logging.WARNING, "t2i_jax")
    text = texts["SentencePiece"]
    network = with_fields(
        DiT(),
        size=(8, 8),
        channels=3,
        patch=4,
        width=16,
        depth=1,
        heads=2,
        condition=CaptionEncoder(300, 12, 16, 1, 2),
        learn_variance=False,
    )
    family = Diffusion(
        network,
        Flow(),
        predicts="velocity",
        solver="euler",
        sampling=DiffusionSampler(1, guidance=2.0),
    )

    pipeline = Pipeline.place(family, family.init(jax.random.key(0)), None, text)
    head = "a red apple on the table and two dogs and words "
    prompts = [head + "that go", head + "in a long tail", "a cat"]
    images = pipeline.sample(prompts, [1, 1, 1], batch_size=2)
    assert np.array_equal(images[0], images[1])
    (record,) = [r for r in caplog.records if r.name == "t2i_jax.sampler"]
    said = record.getMessage()
    assert prompts[0][:40] in said and prompts[2] not in said and "changes no image" in said
