"""Captions as SentencePiece ids (Kudo & Richardson 2018): training a vocabulary, using one."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from t2i_jax.text.cut import Limited

MOST = 1_000_000
"""Captions that a vocabulary is trained on; of more, evenly spaced ones are taken."""


def train_vocabulary(
    captions: Iterable[str], out: str | os.PathLike, size: int = 2000, model_type: str = "unigram"
) -> None:
    """Train a vocabulary of `size` pieces and write it to `out`, the same file for the same captions.

    256 of the pieces are bytes, so that no text is unknown; <unk>, <s>, </s> and <pad> are 0 to 3. A unigram vocabulary
    is smaller than `size` where the captions do not give as many pieces. model_type: `unigram` or `bpe`.
    Errors: ValueError without captions, for another model_type, and for a size that does not suit the captions.
    """
    if model_type not in ("unigram", "bpe"):
        raise ValueError(f"model_type '{model_type}': it is unigram or bpe")
    texts = [text for text in map(_tidy, captions) if text]
    if not texts:
        raise ValueError("there are no captions to train a vocabulary on")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts[:: -(-len(texts) // MOST)]),
            model_writer=model,
            vocab_size=size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="nfkc",  # the default rules also delete the joiners inside of emoji
            hard_vocab_limit=False,
            pad_id=3,
            num_threads=1,  # sums in one order
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(f"no vocabulary of size {size} from {len(texts)} captions: {error}") from error
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".part")
    temporary.write_bytes(model.getvalue())
    temporary.replace(out)


@dataclass(frozen=True)
class SentencePiece(Limited):
    """Captions as ids of a SentencePiece vocabulary, one trained with `t2i data vocab` or any other."""

    path: str
    """the vocabulary, a .model file"""
    length: int = 32
    """ids of a caption, beginning and end included; longer captions are cut"""

    def __post_init__(self):
        if self.length < 3:
            raise ValueError(f"SentencePiece.length {self.length}: it is at least 3")

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (n, s) and the mask bool (n, s) of those that are not padding; an empty caption is all padding.

        Errors: FileNotFoundError without the vocabulary, ValueError where it cannot be read.
        """
        pieces, room = self._pieces, self.room
        first, last = pieces.bos_id(), pieces.eos_id()
        pad = next((n for n in (pieces.pad_id(), last) if n >= 0), 0)
        ids = np.full((len(captions), self.length), pad, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, filled, text in zip(ids, mask, self.tokens(captions), strict=True):
            if text:
                text = [n for n in (first, *text[:room], last) if n >= 0]
                row[: len(text)], filled[: len(text)] = text, True
        return ids, mask

    @property
    def room(self) -> int:
        return self.length - (self._pieces.bos_id() >= 0) - (self._pieces.eos_id() >= 0)

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        return self._pieces.encode([_tidy(c) for c in captions], out_type=int, num_threads=1)

    def decode(self, ids: np.ndarray) -> list[str]:
        """The text of ids (n, s), without what is no text: n strings."""
        pieces = self._pieces
        return pieces.decode([[n for n in row if not pieces.is_control(n)] for row in np.asarray(ids).tolist()])

    @property
    def pieces(self) -> int:
        """How many ids there are."""
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
    """The vocabulary of a file; one read serves all, until the file changes."""
    try:
        pieces = SentencePieceProcessor()
        pieces.load_from_serialized_proto(Path(path).read_bytes())
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is no SentencePiece vocabulary, or a damaged one: {error}") from error
    return pieces
