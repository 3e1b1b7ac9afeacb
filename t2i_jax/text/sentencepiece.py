"""SentencePiece (Kudo & Richardson 2018): train a vocabulary, tokenize captions with one."""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from t2i_jax.core.errors import ConfigError, DataError
from t2i_jax.core.fields import LARGEST, VOCABULARY, Checked, Range
from t2i_jax.core.outputs import check_parent, whole_file
from t2i_jax.core.sniff import HEAD, sniff
from t2i_jax.text.cut import Limited, padded

MOST = 1_000_000
"""Maximum number of captions to train a vocabulary on; of more, evenly spaced ones are used."""
OWN = 260
"""Pieces in every vocabulary: 256 bytes, <unk>, <s>, </s> and <pad>."""


def train_vocabulary(
    captions: Iterable[str], out: str | os.PathLike, size: int = 2000, model_type: str = "unigram"
) -> int:
    """Train a vocabulary of `size` pieces and write it to `out`, the same file for the same captions; returns its size.

    256 of the pieces are bytes, so that no text is unknown; <unk>, <s>, </s> and <pad> are 0 to 3. A vocabulary is
    smaller than `size` if the captions do not yield as many pieces. model_type: `unigram` or `bpe`. Errors:
    `ConfigError` for another model_type and for a size that is too small for the captions, `DataError` without captions
    and for one that is not a string.
    """
    if model_type not in ("unigram", "bpe"):
        raise ConfigError(f"model_type '{model_type}': it is unigram or bpe")
    texts = []
    for caption in captions:
        if not isinstance(caption, str):
            raise DataError(f"a caption is a string, not {type(caption).__name__}: {str(caption)[:60]}")
        texts += [text] if (text := _tidy(caption)) else []
    if not texts:
        raise DataError("there are no captions to train a vocabulary on")
    refused = f"no vocabulary of size {size} from {len(texts)} captions"
    if not OWN < size < 2**31:
        raise ConfigError(f"{refused}: {OWN} pieces are bytes and marks, and the characters of the captions are more")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts[:: -(-len(texts) // MOST)]),
            model_writer=model,
            vocab_size=size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="nfkc",  # the default rules also delete the joiners inside emoji
            hard_vocab_limit=False,
            pad_id=3,
            num_threads=1,  # fixes the order of sums
            max_sentence_length=1 << 20,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if needs := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise ConfigError(f"{refused}: their characters need at least {needs[1]}") from error
        raise ConfigError(f"{refused}: {error}") from error
    out = Path(out)
    check_vocabulary_file(out)
    if out.exists() and out.read_bytes() != model.getvalue():
        raise ConfigError(f"{out}: holds another vocabulary, which models may read; remove it or choose another name")
    with whole_file(out) as temporary:
        temporary.write_bytes(model.getvalue())
    return _load_bytes(model.getvalue()).get_piece_size()


def check_vocabulary_file(path: Path) -> None:
    """Errors: `ConfigError` if the path of a new vocabulary holds anything but a vocabulary."""
    check_parent(path)
    if os.path.lexists(path):
        try:
            _load_bytes(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"{path}: is there, and is no vocabulary; choose another name") from error


@dataclass(frozen=True)
class SentencePiece(Checked, Limited):
    """Captions as ids of a SentencePiece vocabulary, trained with `t2i data vocab` or any other."""

    path: Annotated[str, VOCABULARY]
    """the vocabulary, a .model file"""
    length: Annotated[int, Range(3, LARGEST)] = 32
    """ids per caption, including beginning and end; longer captions are cut"""

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (n, s) and the mask bool (n, s) of non-padding; an empty caption is all padding.

        Errors: FileNotFoundError without the vocabulary, ValueError if it cannot be read.
        """
        pieces, room = self._pieces, self.room
        first, last = pieces.bos_id(), pieces.eos_id()
        pad = next((n for n in (pieces.pad_id(), last) if n >= 0), 0)
        rows = [[n for n in (first, *text[:room], last) if n >= 0] if text else [] for text in self.tokens(captions)]
        return padded(rows, self.length, pad)

    @property
    def room(self) -> int:
        return self.length - (self._pieces.bos_id() >= 0) - (self._pieces.eos_id() >= 0)

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        return self._pieces.encode([_tidy(c) for c in captions], out_type=int, num_threads=1)

    def decode(self, ids: np.ndarray) -> list[str]:
        """The text of ids (n, s), without control ids: n strings."""
        pieces = self._pieces
        return pieces.decode([[n for n in row if not pieces.is_control(n)] for row in np.asarray(ids).tolist()])

    @property
    def pieces(self) -> int:
        """Number of ids."""
        return self._pieces.get_piece_size()

    @property
    def _pieces(self) -> SentencePieceProcessor:
        path = Path(self.path)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no vocabulary {path}: `t2i data vocab CONFIG --out {path}` trains one on captions"
            )
        about = path.stat()
        return _load(str(path), about.st_mtime_ns, about.st_size)


def _tidy(caption: str) -> str:
    return " ".join(caption.split())


@functools.lru_cache(8)
def _load(path: str, changed: int, size: int) -> SentencePieceProcessor:
    """The vocabulary of a file; cached until the file changes."""
    data = Path(path).read_bytes()
    try:
        return _load_bytes(data)
    except RuntimeError as error:
        kind = sniff(data[:HEAD])
        about = f"it is {kind}" if kind else error
        raise DataError(f"{path} is no SentencePiece vocabulary, or a damaged one: {about}") from error


def _load_bytes(data: bytes) -> SentencePieceProcessor:
    pieces = SentencePieceProcessor()
    pieces.load_from_serialized_proto(data)
    return pieces
