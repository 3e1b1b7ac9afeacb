"""CLIP's tokenizer: byte-pair encoding of bytes (Sennrich et al. 2016; Radford et al. 2021)."""

from __future__ import annotations

import functools
import gzip
import heapq
import importlib.util
import itertools
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from t2i_jax.core.sniff import sniff_file
from t2i_jax.text.clean import tidy

PACKAGE, FILE = "open_clip", "bpe_simple_vocab_16e6.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2
"""Number of the file's merges in the vocabulary; the file lists more."""

# Letters and numbers as Python defines them; `words` separates letters from numbers like ² and Ⅷ.
WORD = re.compile(rf"{re.escape(START)}|{re.escape(END)}|'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\w\s]|_)+", re.I)


def vocabulary_file() -> Path:
    """CLIP's list of merges in the package open-clip-torch, found without importing it. Errors: ImportError."""
    spec = importlib.util.find_spec(PACKAGE)
    file = Path(spec.submodule_search_locations[0]) / FILE if spec and spec.submodule_search_locations else None
    if file is None or not file.is_file():
        raise ImportError(
            "CLIP's vocabulary is read from a package: pip install --no-deps open-clip-torch==3.3.0; "
            f"or name a {FILE} or merges.txt of your own"
        )
    return file


class BytePairs:
    """Captions to ids by a list of merges: `bpe_simple_vocab_16e6.txt.gz`, or the `merges.txt` of a folder.

    The ids are: 256 bytes, the same at the end of a word, the merges in order, start, end. Errors: ValueError naming
    the file if it is no such list.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        if (what := sniff_file(path)) not in ("", "a text file", "a gzip file"):
            raise ValueError(f"{path}: is {what}, not a list of merges")
        try:
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            lines = content.decode("utf-8").split("\n")[1 : MERGES + 1]  # the first line is a header
        except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: no list of merges, or a damaged one: {error}") from error
        merges = [tuple(line.split()) for line in lines if line.strip()]
        if not merges or any(len(pair) != 2 for pair in merges):
            raise ValueError(f"{path}: no list of merges: each line but the first has two pieces")
        self.letters = byte_letters()
        letters = list(self.letters.values())
        pieces = [*letters, *(c + "</w>" for c in letters), *map("".join, merges), START, END]
        self.ids = {piece: n for n, piece in enumerate(pieces)}
        self.ranks = {pair: n for n, pair in enumerate(merges)}
        self.first, self.last = self.ids[START], self.ids[END]
        self.word = functools.lru_cache(1 << 16)(self._word)

    def __call__(self, caption: str) -> list[int]:
        """The ids of a caption of any length, without start and end."""
        return [n for word in words(tidy(caption)) for n in (self.word if len(word) < 100 else self._word)(word)]

    def encode(self, captions: Sequence[str], length: int = 77, pad: int = 0) -> np.ndarray:
        """Ids int32 (n, length): start, the caption, end, then `pad`; a long caption is cut before the end."""
        rows = np.full((len(captions), length), pad, np.int32)
        for row, caption in zip(rows, captions, strict=True):
            ids = [self.first, *self(caption)[: length - 2], self.last]
            row[: len(ids)] = ids
        return rows

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without start and end."""
        pieces, byte = list(self.ids), {c: n for n, c in self.letters.items()}
        text = "".join(pieces[n] for n in ids if n not in (self.first, self.last)).replace("</w>", " ")
        return b"".join(b" " if c == " " else bytes([byte[c]]) for c in text).decode("utf-8", "replace").strip()

    def _word(self, word: str) -> tuple[int, ...]:
        if word in (START, END):
            return (self.ids[word],)
        pieces = [self.letters[byte] for byte in word.encode("utf-8")]
        pieces[-1] += "</w>"
        after = [*range(1, len(pieces)), -1]
        before = list(range(-1, len(pieces) - 1))
        waiting: list[tuple[int, int]] = []

        def wait(i: int) -> None:
            """Queue the pair that begins at i by its rank and position."""
            if i >= 0 and after[i] >= 0 and (rank := self.ranks.get((pieces[i], pieces[after[i]]))) is not None:
                heapq.heappush(waiting, (rank, i))

        for i in range(len(pieces)):
            wait(i)
        while waiting:
            # Merge all pairs of the best rank, from the left, before the pairs that result from them.
            best, changed = waiting[0][0], []
            while waiting and waiting[0][0] == best:
                _, i = heapq.heappop(waiting)
                j = after[i]
                if j < 0 or not pieces[i] or self.ranks.get((pieces[i], pieces[j])) != best:
                    continue  # already merged with another
                pieces[i], pieces[j], after[i] = pieces[i] + pieces[j], "", after[j]
                if after[j] >= 0:
                    before[after[j]] = i
                changed.append(i)
            for i in changed:
                wait(i)
                wait(before[i])
        return tuple(self.ids[piece] for piece in pieces if piece)


def words(text: str) -> list[str]:
    """The words of a tidy text: letters, single numerals, endings like 's, and runs of any other non-blank
    characters."""
    parts = []
    for word in WORD.findall(text):
        if word[0].isalnum() and not word.isascii():
            runs = [(k, list(g)) for k, g in itertools.groupby(word, lambda c: unicodedata.category(c)[0] == "N")]
            parts += [part for number, run in runs for part in (run if number else ["".join(run)])]
        else:
            parts.append(word)
    return parts


def byte_letters() -> dict[int, str]:
    """A printable character for each byte, itself if it is printable; in the order of the ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [n for n in range(256) if n not in printable]
    return {n: chr(n) for n in printable} | {n: chr(256 + i) for i, n in enumerate(rest)}


@functools.lru_cache(4)
def read_pairs(path: str) -> BytePairs:
    """The list of merges at `path`, or that of the package if empty; read once."""
    return BytePairs(path or vocabulary_file())
