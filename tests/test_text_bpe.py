"""CLIP's byte pairs against the original program, which is in the package that brings the vocabulary."""

import importlib.util
import random
import re
import unicodedata

import numpy as np
import pytest

from t2i_jax.text import bpe

CAPTIONS = [
    "a red apple on the table",
    "Crème brûlée à l'École, it's John's; they'll've I'd we're I'm DON'T",
    "日本の国旗 ひらがな カタカナ ﾊﾝｶｸ 한국어 ไทย हिन्दी עברית عربي",
    "привет мир, как дела? ЁЖ",
    "👨‍👩‍👧 family 🇯🇵 ☃️ ❤️‍🔥 1️⃣",
    "&lt;b&gt; &amp;amp; &quot;x&quot; &eacute; &#233; &#x1F600; &bogus; & co &Eacute",
    "<b>bold</b> & <i>html</i> &amp; entities",
    "  a\tb\nc\r\nd\u00a0e\u2028f\x00g\x85h\ufeff  ",
    "1234 3.14 x² H₂O ½ Ⅷ ٣٤ 一二三 a1b2 ①",
    "“curly” ‘quotes’ „low“ «guillemets» … – — ﬁ ﬂ ĳ ŉ ﬅ",
    "ΟΔΥΣΣΕΥΣ İstanbul ǅ ß Å ſ's o'ſ",
    "word\u0301s e\u0301 soft\u00adhyphen zero\u200bwidth",
    "$5+3=8 `code` ^_~ <a|b> snake_case __x__ ¿qué? ... !!! ''' '' 's",
    "\x1b[31mred\x1b[0m \x1b[1;2mx",
    "supercalifragilisticexpialidocious" * 3,
    "ｆｕｌｌ　ｗｉｄｔｈ！",
    "",
    "   ",
    "the " * 100,
]


def varied(count):
    """Strings of letters, marks and blanks of many alphabets."""
    rng = random.Random(0)
    ranges = [(0x20, 0x7F), (0xA1, 0x250), (0x370, 0x530), (0x2010, 0x2070), (0x2100, 0x2190), (0x2460, 0x2500)]
    ranges += [(0x3040, 0x3100), (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0xFF01, 0xFF60), (0x1F300, 0x1F650)]
    letters = lambda: "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 8)))
    return [" ".join(letters() for _ in range(rng.randrange(1, 8))) for _ in range(count)]


@pytest.fixture(scope="module")
def pairs():
    try:
        return bpe.read_pairs("")
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def original():
    for name in ("torch", "regex"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("original_bpe", bpe.vocabulary_file().parent / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def test_ids_are_those_of_the_original(pairs, original):
    captions = CAPTIONS + varied(400)
    expected = original(captions).numpy()
    found = pairs.encode(captions)
    wrong = [c for c, a, b in zip(captions, expected, found, strict=True) if not np.array_equal(a, b)]
    assert not wrong
    assert pairs.first == original.sot_token_id and pairs.last == original.eot_token_id == 49407


def test_every_character_is_treated_as_in_the_original(pairs, original):
    known = [
        n for n in (*range(0x20, 0x600), *range(0x600, 0x3100, 5)) if unicodedata.category(chr(n)) not in ("Cc", "Cn")
    ]  # by this Python
    known.remove(0x345)  # the mark of an iota subscript, which the original takes for the letter
    captions = [f"a{chr(n)}b {chr(n)}" for n in known]
    expected = original(captions, 24).numpy()
    found = pairs.encode(captions, 24)
    wrong = [hex(ord(c[1])) for c, a, b in zip(captions, expected, found, strict=True) if not np.array_equal(a, b)]
    assert not wrong


def test_start_end_cut_and_padding(pairs):
    ids = pairs.encode(["a cat", "cat " * 100, ""], 10, pad=7)
    assert ids.dtype == np.int32 and ids.shape == (3, 10)
    assert ids[0].tolist() == [49406, 320, 2368, 49407, 7, 7, 7, 7, 7, 7]
    assert ids[1, 0] == 49406 and ids[1, -1] == 49407 and set(ids[1, 1:-1]) == {2368}
    assert ids[2, :2].tolist() == [49406, 49407]


def test_words_are_letters_numbers_and_the_rest(pairs):
    parts = ["it", "'s", "4", "2", "x", "2", "y", ",", "a", "_", "b", "!"]
    words, _ = zip(*pairs.words.pre_tokenize_str("it's 42 x2y, a_b!"), strict=True)
    assert list(words) == parts
    assert pairs("it's 42 x2y, a_b!") == [pairs.ids[f"{part}</w>"] for part in parts]


def test_start_and_end_in_a_caption_are_those_of_the_original(pairs):
    """Where they begin a word; not where a run of other characters swallows their first ones."""
    assert pairs("a <|endoftext|> b")[1:2] == [pairs.last]
    assert pairs.last not in pairs("a !<|endoftext|> b")


def test_a_list_of_merges_of_ones_own(tmp_path):
    file = tmp_path / "merges.txt"
    file.write_text("#version: 0.2\nc a\nca t</w>\n")
    pairs = bpe.BytePairs(file)
    assert pairs("cat") == [513] and (pairs.first, pairs.last) == (514, 515)
    assert pairs("ca") == [pairs.ids["c"], pairs.ids["a</w>"]]
    file.write_text("header\none two three\n")
    with pytest.raises(ValueError, match="merges.txt: no list of merges"):
        bpe.BytePairs(file)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 270\n"


@pytest.mark.parametrize("content, said", [(LFS, "Git LFS pointer"), (b"<html>", "web page"), (b"", "empty file")])
def test_what_is_no_list_is_named(tmp_path, content, said):
    """A pointer has lines of two words, as a list of merges has."""
    (tmp_path / "merges.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"merges\.txt: is an? {said}.*, not a list of merges"):
        bpe.BytePairs(tmp_path / "merges.txt")


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setattr(bpe.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape("pip install --no-deps open-clip-torch")):
        bpe.vocabulary_file()
