"""CLIP's tokenizer: byte-pair encoding of bytes (Sennrich et al. 2016; Radford et al. 2021)."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from tokenizers import Regex, models, pre_tokenizers

from t2i_jax.core.fields import VOCABULARY, Checked, Size
from t2i_jax.core.sniff import sniff_file
from t2i_jax.text.clean import tidy
from t2i_jax.text.cut import Limited, padded

PACKAGE, FILE = "open_clip", "bpe_simple_vocab_16e6.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2
"""Number of the file's merges in the vocabulary; the file lists more."""

WORD = rf"{re.escape(START)}|{re.escape(END)}|(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"
"""The words of a tidy text: letters, single numerals, endings like 's, and runs of any other characters."""


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
        pairs = [line.split() for line in lines if line.strip()]
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"{path}: no list of merges: each line but the first has two pieces")
        merges = [(pair[0], pair[1]) for pair in pairs]
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # each byte as a character, in the order of the ids
        pieces = [*letters, *(c + "</w>" for c in letters), *map("".join, merges), START, END]
        self.ids = {piece: n for n, piece in enumerate(pieces)}
        self.first, self.last = self.ids[START], self.ids[END]
        try:
            self.model = models.BPE(self.ids, merges, end_of_word_suffix="</w>")
        except Exception as error:  # the library has no class of its own for a merge of unknown pieces
            raise ValueError(f"{path}: no list of merges: {error}") from error
        self.words = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORD), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self.word = functools.lru_cache(1 << 16)(self._word)

    def __call__(self, caption: str) -> list[int]:
        """The ids of a caption of any length, without start and end."""
        words = (word for word, _ in self.words.pre_tokenize_str(tidy(caption)))
        return [n for word in words for n in (self.word if len(word) < 100 else self._word)(word)]

    def encode(self, captions: Sequence[str], length: int = 77, pad: int = 0) -> np.ndarray:
        """Ids int32 (n, length): start, the caption, end, then `pad`; a long caption is cut before the end."""
        return padded([[self.first, *self(c)[: length - 2], self.last] for c in captions], length, pad)[0]

    def _word(self, word: str) -> tuple[int, ...]:
        """The ids of a word of `words`; start and end are no text to merge."""
        return (self.ids[word],) if word in (START, END) else tuple(token.id for token in self.model.tokenize(word))


@functools.lru_cache(4)
def read_pairs(path: str) -> BytePairs:
    """The list of merges at `path`, or that of the package if empty; read once."""
    return BytePairs(path or vocabulary_file())


@dataclasses.dataclass(frozen=True)
class ClipIds(Checked, Limited):
    """Captions as CLIP's ids, start and end included, for a model that embeds them itself (`models.clip`)."""

    path: Annotated[str, VOCABULARY] = ""
    """list of merges; empty: the one in the package open-clip-torch"""
    length: Size = 77
    """ids per caption"""

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (n, s), 0 behind the end, and the mask bool (n, s) from start to end.

        Errors: ImportError if the vocabulary is missing; ValueError where it is none.
        """
        ids = self.pairs.encode(captions, self.length)
        return ids, np.arange(self.length) <= np.argmax(ids == self.pairs.last, 1)[:, None]

    @property
    def pairs(self) -> BytePairs:
        return read_pairs(self.path)

    @property
    def room(self) -> int:
        return self.length - 2

    @property
    def pieces(self) -> int:
        return len(self.pairs.ids)

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        return [self.pairs(caption) for caption in captions]
