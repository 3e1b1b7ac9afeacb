"""Captions of any kind and length are cleaned and cut into tokens in time linear in their length."""

import random
import time
from itertools import pairwise

import pytest
from PIL import ImageFont

from t2i_jax.core.image_files import load_font, wrap
from t2i_jax.data.transforms import may_flip
from t2i_jax.text import bpe, wordpiece
from t2i_jax.text.clean import clean_twice, fix_text, tidy
from t2i_jax.text.cut import unread
from t2i_jax.text.sentencepiece import SentencePiece, train_vocabulary

REPEATED = [
    "<",
    "&",
    "(",
    "[",
    "{",
    "http://",
    "https://www.a",
    "www.",
    "@",
    "@a",
    " ",
    "\n",
    "\t",
    "x",
    "a b ",
    "1",
    "1.",
]
REPEATED += [
    "12 ",
    "a.",
    "a-",
    "-",
    "_",
    "'",
    '"',
    ".",
    ". ",
    " . ",
    "\\n",
    "\\",
    "#",
    "#1",
    "&amp;",
    "&#",
    "&#1;",
    "a/",
    "/",
]
REPEATED += [
    "<a",
    "<a ",
    "<a b=",
    "<a href='",
    "<!--",
    "<!-- x -->",
    "<!--a>",
    "<![CDATA[",
    "<?",
    "</",
    "</a",
    "<b>x</b>",
]
REPEATED += [
    "<script>",
    "</script",
    "a1",
    "1a",
    "a1b2",
    "1x1",
    "1x1.",
    "x×",
    ".com",
    "a.com",
    "-com.",
    ".png",
    "a.png ",
]
REPEATED += ["free ", "worldwide ", "click for ", "page ", "%20", "+", ":", " : ", "1:11 ", "漢", "ひ", "é", "e\u0301"]
REPEATED += ["\u0301", "\u200d", "Ã©", "â€", "\ud83d\ude00", "\ud83d", "\x1b[", "\x00", "\u2028", "ﬁ", "²", "１", "’"]
GROWING = {
    "entities in entities": lambda n: "&" + "amp;" * (n // 4),
    "numbers in numbers": lambda n: "&#" * (n // 5) + "5" + "3;" * (n // 5),
    "a long number": lambda n: "&#" + "1" * n + ";",
    "digits between letters": lambda n: "a1a" + "1" * n + "_",
    "a long size": lambda n: "1" * n + "x" + "1" * n + "_",
    "blanks within": lambda n: "x" + " " * n + "x",
    "blanks after a time": lambda n: "1:11" + " " * n + "x",
    "blanks after words": lambda n: "page" + " " * n + "worldwide" + " " * n,
    "a tag of many attributes": lambda n: "<a" + " b" * n,
    "a tag of open quotes": lambda n: "<a " + "b=' c=\"" * (n // 7),
    "a few open tags": lambda n: "<a b " * 16 + "x " * n,
    "a long comment": lambda n: "<!--" + "-" * n,
    "one word of letters": lambda n: drawn("abcdefghijklmnopqrstuvwxyz", n),
    "one word of base 64": lambda n: drawn("ABCDEFabcdef0123456789+/", n),
    "letters of the world": lambda n: drawn("éüößñabc漢ひ١²", n),
    "noise": lambda n: drawn("abc <>&;#'\".,-_/\\()@:1 2x%+\n", n),
    "no width": lambda n: "w" * 8 + "\u200d" * n + "www" * 20,
}
INPUTS = {repr(unit): lambda n, unit=unit: (unit * (n // len(unit) + 1))[:n] for unit in REPEATED} | GROWING


def drawn(letters, n):
    return "".join(random.Random(0).choices(letters, k=n))


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """What reads captions, by name."""
    room = tmp_path_factory.mktemp("vocabularies")
    (room / "merges.txt").write_text(merges())
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "##b", "x", "##x", "1", "é"]
    (room / "vocab.txt").write_text("\n".join(pieces))
    train_vocabulary(["a red apple on the table", "two dogs"], room / "v.model", 290)
    sentencepiece = SentencePiece(str(room / "v.model"), 16)
    pairs, pieces = bpe.BytePairs(room / "merges.txt"), wordpiece.WordPiece(room / "vocab.txt")
    font: ImageFont.ImageFont = load_font(12, "é")
    plain = lambda text: text.encode("utf-8", "replace").decode()
    return {
        "fix_text": fix_text,
        "tidy": tidy,
        "clean_twice": clean_twice,
        "byte pairs": lambda text: pairs(text),
        "word pieces": lambda text: pieces(text),
        "sentencepiece": lambda text: sentencepiece([plain(text)]),
        "what is cut": lambda text: unread(sentencepiece, [plain(text)]),
        "may_flip": lambda text: may_flip([text], ("left", "map")),
        "wrap": lambda text: wrap(text, font, 128),
    }


def merges():
    """All pairs of letters, then pairs of those: long words are merged in many steps."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    first = [(a, b) for a in letters for b in letters]
    second = random.Random(0).sample([(a + b, c + d) for a, b in first for c, d in first[::7]], 4000)
    return "\n".join(["#version", *(f"{a} {b}" for a, b in first + second)])


def seconds(call, text):
    began = time.process_time()
    call(text)
    return time.process_time() - began


READERS = ["fix_text", "tidy", "clean_twice", "byte pairs", "word pieces", "sentencepiece", "what is cut", "may_flip"]


@pytest.mark.parametrize("name", [*READERS, "wrap"])
@pytest.mark.parametrize("n", [4000, pytest.param(25_000, marks=pytest.mark.slow)])
def test_four_times_the_length_takes_about_four_times_as_long(readers, name, n):
    """Sixteen times is what a quadratic one takes; 20 ms are left to the clock."""
    slow = []
    for about, make in INPUTS.items():
        short, long = make(n), make(4 * n)
        for _ in range(3):  # others use the machine too
            times = seconds(readers[name], short), seconds(readers[name], long)
            if times[1] < 8 * times[0] + 0.02:
                break
        else:
            slow.append((about, *times))
        if len(slow) == 3 or times[1] > 20:
            break
    assert not slow


def test_merges_are_those_of_the_plain_algorithm(tmp_path):
    """All pairs of the best rank, from the left, then again, with any list that training can give."""
    rng = random.Random(0)
    for n in range(200):
        pieces, found = list("abc") + [f"{c}</w>" for c in "abc"], []
        for _ in range(rng.randrange(1, 40)):
            pair = rng.choice(pieces), rng.choice(pieces)
            if "</w>" not in pair[0] and pair not in found and "".join(pair) not in pieces:
                found.append(pair)
                pieces.append("".join(pair))
        (tmp_path / f"{n}.txt").write_text("#version\n" + "\n".join(map(" ".join, found or [("a", "b")])))
        pairs = bpe.BytePairs(tmp_path / f"{n}.txt")
        for _ in range(40):
            word = "".join(rng.choices("abc", k=rng.randrange(1, 30)))
            assert pairs.word(word) == tuple(plain_merges(pairs.ids, found or [("a", "b")], word))


def plain_merges(ids, merges, word):
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    while ranked := [(merges.index(pair), pair) for pair in pairwise(pieces) if pair in merges]:
        best, merged = min(ranked)[1], []
        while pieces:
            both = tuple(pieces[:2]) == best
            merged.append("".join(pieces[: 1 + both]))
            pieces = pieces[1 + both :]
        pieces = merged
    return [ids[piece] for piece in pieces]
