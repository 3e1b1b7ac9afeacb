"""The part of a caption that a text side does not read: the tokens beyond its length."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from typing import Annotated, Protocol, cast

import numpy as np

from t2i_jax.core.arrays import Bool, Int, typed
from t2i_jax.core.conditions import TextSpec, Tokenizer
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import ENCODER, Checked
from t2i_jax.core.specs import BatchSpec

log = logging.getLogger(__name__)

NAMED = 3
"""Number of captions in a warning."""
SHOWN = 40
"""Characters shown of each."""


@typed
def padded(
    rows: Sequence[Sequence[int]], length: int, pad: int = 0
) -> tuple[Int[np.ndarray, "n {length}"], Bool[np.ndarray, "n {length}"]]:
    """Ids int32 (n, length) of rows that are no longer, filled up with `pad`, and the mask bool (n, length) of the
    others."""
    ids, mask = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), bool)
    for n, row in enumerate(rows):
        ids[n, : len(row)], mask[n, : len(row)] = row, True
    return ids, mask


class Limited(Tokenizer, Protocol):
    """Base of tokenizers that read a limited number of tokens of a caption and cut the rest."""

    @property
    def spec(self) -> TextSpec:
        return TextSpec(limited=True)

    @property
    @abstractmethod
    def room(self) -> int:
        """Tokens of a caption that are read, without special ones."""
        ...

    @abstractmethod
    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """All ids of each caption, without special ones and without a limit."""
        ...

    @property
    def pieces(self) -> int:
        """Number of ids, if a model embeds them itself; 0 if the text side has its own encoder."""
        return 0

    def cut(self, captions: Sequence[str]) -> list[int]:
        """Number of unread tokens of each caption."""
        return [max(0, len(ids) - self.room) for ids in self.tokens(captions)]

    def full(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Which rows bool (n,) have no padding: captions that fill the length, and may be longer."""
        return np.all(mask, axis=-1)


class LimitedEncoder(Limited, Protocol):
    """The same, with a frozen encoder."""

    @property
    def spec(self) -> TextSpec:
        return TextSpec(features=True, limited=True)


@dataclasses.dataclass(frozen=True)
class FolderEncoder(Checked, LimitedEncoder):
    """The same, with files in a folder in Hugging Face's layout."""

    folder: Annotated[str, ENCODER]
    """in the layout of Hugging Face; of CLIP also that of open_clip, a file with OpenAI's names, or a run"""


def limited(text: Tokenizer | None) -> Limited | None:
    """The tokenizer as a `Limited` if it declares that it counts unread tokens; None for others."""
    return cast(Limited, text) if text is not None and text.spec.limited else None


def own_tokenizer(text: Tokenizer | None, path: object, wanted: str = "") -> Tokenizer:
    """The tokenizer `text` that belongs to the model at `path`. Errors: `ConfigError` where there is none, and how one
    is `wanted`, or where it is none that gives ids."""
    if text is None:
        raise ConfigError(f"{path}: no tokenizer belongs to it{wanted}")
    if text.spec.features:
        raise ConfigError(f"{path}: {type(text).__name__} has an encoder of its own; ids are wanted")
    return text


def room_of(text: Tokenizer) -> int:
    """Tokens of a caption that a tokenizer reads."""
    return counting.room if (counting := limited(text)) else text([""])[0].shape[1]


def tokens_of(text: Tokenizer, captions: Sequence[str]) -> list[list[int]]:
    """The ids of each caption; of a tokenizer that is `limited`, without special ones and without a limit."""
    if counting := limited(text):
        return counting.tokens(captions)
    return [ids[mask].tolist() for ids, mask in zip(*text(captions), strict=True)]


def check_vocabulary(text: Tokenizer | None, spec: BatchSpec) -> None:
    """Errors: `ConfigError` if a text side has ids beyond the model's table."""
    pieces = counting.pieces if (counting := limited(text)) else 0
    high = spec["text"].high if "text" in spec else None
    if high is not None and pieces > high + 1:
        raise ConfigError(
            f"text: the vocabulary has {pieces} ids, and the model's table {high + 1}: set the vocabulary of its "
            f"condition to {pieces}, or name the vocabulary that it was trained with"
        )


def unread(text: Limited, captions: Sequence[str]) -> str:
    """One line on the captions longer than the limit: which, how many tokens are cut, and from where on.

    Empty if there are none.
    """
    captions = list(dict.fromkeys(captions))
    long = [(caption, count) for caption, count in zip(captions, text.cut(captions), strict=True) if count]
    if not long:
        return ""
    parts = [f"{shown(c)} by {n}, not read from {shown(c[end(text, c) :].lstrip())} on" for c, n in long[:NAMED]]
    more = [f"and {len(long) - NAMED} more"] if len(long) > NAMED else []
    return f"{type(text).__name__} reads {text.room} tokens; longer are {'; '.join(parts + more)}"


def end(text: Limited, caption: str) -> int:
    """Number of characters of a caption that are read: up to the end of a word, if it has words."""

    def longest(ends: Sequence[int]) -> int:
        """The longest of these prefixes that is read whole, or 0; of long captions only the beginning is tried."""
        lost = lambda n: text.cut([caption[:n]])[0]
        most = 1
        while most < len(ends) and not lost(ends[most - 1]):
            most *= 2
        found = bisect_left(ends[:most], 1, key=lost)
        return ends[found - 1] if found else 0

    return longest([m.end() for m in re.finditer(r"\S+", caption)]) or longest(range(1, len(caption) + 1))


def shown(caption: str) -> str:
    """The start of a caption, quoted."""
    caption = " ".join(caption[: 4 * SHOWN].split())
    return repr(caption if len(caption) <= SHOWN else caption[:SHOWN] + "…")


def noticing(text: Tokenizer | None) -> Tokenizer | None:
    """A tokenizer of training data that logs the first caption it cuts; tokenizers without a limit are returned
    unchanged."""
    return _Noticing(counting) if (counting := limited(text)) else text


class _Noticing:
    def __init__(self, text: Limited):
        self.text, self.warned = text, False

    @property
    def spec(self) -> TextSpec:
        return self.text.spec

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = self.text(captions)
        if not self.warned:
            long = list(itertools.compress(captions, self.text.full(ids, mask)))
            if cut := unread(self.text, long):
                log.warning(f"captions are cut: {cut}; further ones are not named")
                self.warned = True
        return ids, mask
