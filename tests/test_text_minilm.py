"""WordPiece and MiniLM against the originals."""

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from t2i_jax.interop import minilm as published
from t2i_jax.interop.names import to_theirs
from t2i_jax.text.minilm import MiniLM
from t2i_jax.text.wordpiece import WordPiece

CAPTIONS = [
    "a red apple on the table",
    "Grinning face with smiling eyes",
    "Crème brûlée à l'École!",
    "日本の国旗 ひらがな カタカナ",
    "привет мир, как дела?",
    "👨‍👩‍👧 family: man 🇯🇵",
    "pseudounhyphenatedantidisestablishment",
    "a" * 100 + " " + "b" * 101,
    "a\tb\nc\u200dd\u00a0e\u2028f\x00g\x85h\ufeff",
    "ΟΔΥΣΣΕΥΣ İstanbul ǅ ß ﬁ Å",
    "$5+3=8 `code` ^_~ <a|b> ¿qué? «oui» “q” …",
    "한국어 ไทย हिन्दी عربي עברית",
    "word\u0301s e\u0301 soft\u00adhyphen",
    "",
    "   ",
]


@pytest.fixture(scope="module")
def folder():
    try:
        return published.folder()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def encoder(folder):
    return MiniLM().load()


@pytest.fixture(scope="module")
def tokenizer(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def test_pieces_are_those_of_the_original(folder, tokenizer):
    ours = WordPiece(folder / "vocab.txt")
    for caption in CAPTIONS:
        assert ours(caption) == tokenizer.encode(caption, add_special_tokens=False).ids, caption


def test_characters_are_treated_as_in_the_original(folder, tokenizer):
    ours = WordPiece(folder / "vocab.txt")
    for n in [*range(0x250), *range(0x370, 0x500), *range(0x2000, 0x2200), *range(0x3000, 0x3100), 0x4E00, 0x1F600]:
        text = f"a{chr(n)}b"
        assert ours(text) == tokenizer.encode(text, add_special_tokens=False).ids, hex(n)


def test_words_are_bare_and_in_lower_case(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ca", "va", "?", "国", "旗", "ok"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    found = WordPiece(tmp_path / "vocab.txt")
    assert found("Ça va?  国旗ok \ud83d") == [4, 5, 6, 7, 8, 9]


def test_the_longest_piece_wins_and_the_unknown_is_whole(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "una", "##ble", "##able", "[", "]", "sep"])
    )
    ours = WordPiece(vocabulary)
    assert ours("unable unaable unx [SEP]") == [5, 6, 5, 7, 1, 8, 10, 9]
    vocabulary.write_text("a\nb")
    with pytest.raises(ValueError, match=r"vocab.txt: .*\[PAD\]"):
        WordPiece(vocabulary)


def test_captions_are_framed_cut_and_padded(folder):
    ids, mask = MiniLM(10)(["red apple", "x " * 5000, "", " \u200d "])
    assert ids.shape == (4, 10) and ids.dtype == np.int32
    assert ids[0, :4].tolist()[::3] == [101, 102] and mask[0].sum() == 4 and not ids[0, 4:].any()
    assert mask[1].all() and ids[1, -1] == 102
    assert not mask[2:].any() and not ids[2:].any()
    with pytest.raises(ValueError, match=r"MiniLM\.length 513"):
        MiniLM(513)


def test_features_are_those_of_the_original(folder, encoder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    original = transformers.BertModel.from_pretrained(str(folder), add_pooling_layer=False).eval()
    text = MiniLM(24)
    ids, mask = text([c for c in CAPTIONS if c.strip()])
    with torch.no_grad():
        expected = original(
            torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()
        ).last_hidden_state.numpy()
    found = np.asarray(jax.jit(text.features)(encoder, ids, mask))
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-5)

    mean = (expected * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    sentence = jax.jit(text.sentence)(encoder, ids, mask)
    np.testing.assert_allclose(sentence, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)


def test_meaning_is_near_meaning(encoder):
    text = MiniLM(16)
    sentence = jax.jit(text.sentence)
    a, b, c, empty = sentence(encoder, *text(["a small dog", "a little puppy", "the stock market fell", ""]))
    assert a @ b > 0.6 > 0.3 > a @ c
    assert not empty.any()


def test_padding_does_not_change_features(encoder):
    short, long = (MiniLM(n) for n in (8, 16))
    found = [jax.jit(t.sentence)(encoder, *t(["a red apple"])) for t in (short, long)]
    np.testing.assert_allclose(*found, atol=1e-6)


def test_published_names_there_and_back(folder, encoder):
    file = pytest.importorskip("safetensors.numpy").load_file(folder / "model.safetensors")
    theirs = to_theirs(encoder, published.table(32))
    assert set(file) - set(theirs) == {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    for name, value in theirs.items():
        np.testing.assert_array_equal(value, file[name])
