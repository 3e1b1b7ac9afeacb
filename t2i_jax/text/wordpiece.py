"""BERT's tokenizer: lower case without accents, split at spaces and punctuation, words into known pieces."""

from __future__ import annotations

import functools
import string
import unicodedata
from pathlib import Path

LONGEST = 100  # characters of a word; longer ones are unknown


class WordPiece:
    """The ids of the pieces of a text, greedily the longest first (Devlin et al. 2019; Wu et al. 2016).

    path: a file with one piece per line, those inside a word with the prefix ##. A text cannot contain the special
    pieces: "[SEP]" is four pieces of ordinary text.
    """

    def __init__(self, path: str | Path):
        self.pieces = Path(path).read_text("utf-8").splitlines()
        self.index = {piece: n for n, piece in enumerate(self.pieces)}
        missing = [special for special in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if special not in self.index]
        if missing:
            raise ValueError(f"{path}: a WordPiece vocabulary has a line {' and one '.join(missing)}")
        self.pad, self.unknown, self.first, self.last = (self.index[f"[{s}]"] for s in ("PAD", "UNK", "CLS", "SEP"))
        self.word = functools.lru_cache(1 << 16)(self._word)

    def __call__(self, text: str) -> list[int]:
        """Ids without [CLS] and [SEP]."""
        return [n for word in words(text) for n in self.word(word)]

    def _word(self, word: str) -> list[int]:
        if len(word) > LONGEST:
            return [self.unknown]
        ids, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if prefix + word[start:e] in self.index), None)
            if end is None:
                return [self.unknown]
            ids.append(self.index[prefix + word[start:end]])
            start = end
        return ids


def words(text: str) -> list[str]:
    """Words, punctuation marks and Chinese characters of a text, in lower case, without accents and control
    characters."""
    return "".join(map(_spaced, _plain("".join(map(_clean, text))))).split()


def _clean(c: str) -> str:
    if c in "\t\n\r" or unicodedata.category(c) in ("Zs", "Zl", "Zp"):
        return " "
    if c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs"):
        return ""
    return c


def _plain(text: str) -> str:
    bare = (c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    return "".join(c.lower() for c in bare)  # by character: the end of a word does not change a sigma


def _spaced(c: str) -> str:
    apart = c in string.punctuation or unicodedata.category(c).startswith("P") or _chinese(ord(c))
    return f" {c} " if apart else c


def _chinese(n: int) -> bool:
    """Whether a character is a Chinese ideograph, a word of its own; Japanese syllables and Korean blocks are not."""
    return (
        0x4E00 <= n <= 0x9FFF
        or 0x3400 <= n <= 0x4DBF
        or 0x20000 <= n <= 0x2CEAF
        or 0xF900 <= n <= 0xFAFF
        or 0x2F800 <= n <= 0x2FA1F
    )
