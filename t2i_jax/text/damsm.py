"""DAMSM's text encoder, frozen: a sentence and its words, as GANs read them; and its image encoder for their losses."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from t2i_jax.core.conditions import Tokenizer
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import ENCODER, VOCABULARY, Checked, Size
from t2i_jax.core.types import UsesFrozenNetworks
from t2i_jax.features.trunks import InceptionTrunk
from t2i_jax.interop import damsm as published
from t2i_jax.interop.inception import trunk_from
from t2i_jax.interop.names import to_ours
from t2i_jax.networks.damsm import DAMSMNetwork, ImageEncoder, ImageHeads, Trunk, WordEncoder
from t2i_jax.storage.artifacts import Artifact, load_artifact, on_host, open_artifact
from t2i_jax.text.cut import Limited, LimitedEncoder, limited, own_tokenizer, padded, room_of, tokens_of


@dataclasses.dataclass(frozen=True)
class CaptionWords(Checked, Limited):
    """Captions as words of the dictionary of a published DAMSM, `captions.pickle`.

    A caption is lower-cased and split into runs of letters, digits and underscores, of which only ASCII is kept; words
    that the dictionary lacks are dropped. Of a longer caption the first `length` words are read. In their training
    AttnGAN, DM-GAN, DF-GAN and SSA-GAN read a random subset of its words in their order instead, and in sampling the
    first ones, as here.
    """

    path: Annotated[str, VOCABULARY]
    """the dictionary"""
    length: Size = 18
    """words per caption: 18 for birds; 15 for COCO, 12 in DM-GAN"""

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (n, s), 0 after the end, and the mask bool (n, s) of words.

        Errors: FileNotFoundError without the dictionary, ValueError if it cannot be read.
        """
        return padded([words[: self.length] for words in self.tokens(captions)], self.length)

    @property
    def room(self) -> int:
        return self.length

    @property
    def pieces(self) -> int:
        """Number of ids."""
        return len(published.captions_ids(self.path))

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        known = published.captions_ids(self.path)
        return [[known[word] for word in words(caption) if word in known] for caption in captions]


def words(caption: str) -> list[str]:
    """The words of a caption as published programs split it."""
    found = re.findall(r"\w+", caption.replace("\ufffd\ufffd", " ").lower())
    return [word for word in (w.encode("ascii", "ignore").decode() for w in found) if word]


@dataclasses.dataclass(frozen=True)
class DamsmText(Checked, LimitedEncoder):
    """Captions as a sentence and its words, by the text encoder of a DAMSM (`models.damsm`).

    For `networks.condition.SentenceAndWords(dim, words)` with `feature_shape` = (1 + words, dim).
    """

    path: Annotated[str, ENCODER]
    """a run or a released DAMSM, or a published `text_encoder*.pth`"""
    words: Tokenizer | None = None
    """tokenizer of its ids; None: that with which it was trained. A published file needs its `CaptionWords`"""

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (n, s) and the mask bool (n, s) of words. Errors: those of the tokenizer and of `load`."""
        return self.tokenizer(captions)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its ids. Errors: `ConfigError` where there is none, or none that gives ids."""
        text = self.words if self.words is not None or _is_file(self.path) else open_artifact(self.path).artifact.text
        return own_tokenizer(text, self.path, "; name one: DamsmText(path, CaptionWords(FILE))")

    @property
    def feature_shape(self) -> tuple[int, int]:
        return self.length, self.dim

    @property
    def length(self) -> int:
        """Vectors per caption, the sentence included."""
        return 1 + self.tokenizer([""])[0].shape[1]

    @property
    def room(self) -> int:
        return room_of(self.tokenizer)

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        return tokens_of(self.tokenizer, captions)

    def load(self) -> WordEncoder:
        """The encoder with its weights, on the host. Errors: FileNotFoundError, `ConfigError`, ValueError."""
        if _is_file(self.path):
            encoder = _published_text(self.path)
        else:
            encoder = _text_of(load_artifact(self.path, host=True), self.path)
        if (counting := limited(self.tokenizer)) and counting.pieces > (known := encoder.table.w.shape[0]):
            raise ConfigError(f"{self.path}: has {known} words, and its tokenizer {counting.pieces} ids: not its own")
        return encoder

    def features(self, model: WordEncoder, ids: Array, mask: Array) -> Array:
        """The sentence, then one vector per word, zeros after the end: (b, s) ids and mask -> (b, 1 + s, k) fp32."""
        return model.features(ids, mask)

    @functools.cached_property
    def dim(self) -> int:
        """Size k of a feature vector. Errors: as `load`."""
        if _is_file(self.path):
            return published.describe(published.read(self.path))["dim"]
        return 2 * _text_of(open_artifact(self.path).artifact, self.path).rnn.hidden


def load_image_encoder(path: str | Path, align_corners: bool = True) -> ImageEncoder:
    """The image encoder of a DAMSM, on the host: images (b, i, j, 3) in [-1, 1] -> regions (b, r, k), code (b, k).

    path: a run, a released model, or a published `image_encoder*.pth`, whose images are resized corner to corner
    (AttnGAN, DM-GAN) or, if `align_corners` is False, edge to edge (SSA-GAN). Errors: FileNotFoundError; `ConfigError`
    and ValueError name what is missing.
    """
    if not _is_file(path):
        artifact = load_artifact(path, host=True)
        if (heads := _network(artifact, path).image) is None:
            raise ConfigError(f"{path}: holds the text encoder of a DAMSM alone")
        with on_host():
            # The config of a DAMSMNetwork is a `models.damsm.DAMSM`, whose trunk may be without weights.
            return ImageEncoder(cast(Trunk, cast(UsesFrozenNetworks, artifact.config).frozen()), heads)
    with on_host():
        tensors = dict(published.read(path))
        found = published.describe(tensors)
        if found["widths"] is None:
            raise ConfigError(f"{path}: holds the text encoder of a DAMSM alone")
        regions, whole = found["widths"]
        heads = jax.eval_shape(lambda key: ImageHeads(regions, whole, found["dim"], key), jax.random.key(0))
        heads = to_ours(heads, tensors, published.image_table(), published.TRUNK, str(path))
        trunk = InceptionTrunk(trunk_from(tensors, str(path)), align_corners)
        return jax.tree.map(jnp.asarray, ImageEncoder(trunk, heads))


def _published_text(path: str) -> WordEncoder:
    tensors = dict(published.read(path))
    found = published.describe(tensors)
    if not found["vocabulary"]:
        raise ConfigError(f"{path}: holds the image encoder of a DAMSM alone")
    build = lambda key: WordEncoder(found["vocabulary"], found["embed"], found["dim"], key, found["cell"])
    with on_host():
        encoder = to_ours(jax.eval_shape(build, jax.random.key(0)), tensors, published.text_table(), file=path)
        return jax.tree.map(jnp.asarray, encoder)


def _is_file(path: str | Path) -> bool:
    return "://" not in str(path) and Path(path).is_file()


def _network(artifact: Artifact, path: str | Path) -> DAMSMNetwork:
    """Errors: `ConfigError` where a folder holds another model."""
    if not isinstance(artifact.model, DAMSMNetwork):
        raise ConfigError(f"{path} holds a {type(artifact.config).__name__}; a DAMSM is wanted")
    return artifact.model


def _text_of(artifact: Artifact, path: str | Path) -> WordEncoder:
    """Errors: `ConfigError` where a folder holds another model, or a DAMSM without its text encoder."""
    if (encoder := _network(artifact, path).text) is None:
        raise ConfigError(f"{path}: holds the image encoder of a DAMSM alone")
    return encoder
