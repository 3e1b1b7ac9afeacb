"""Several CLIPs as one text encoder, in Stable unCLIP: those of a prior and of a decoder, and that of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from t2i_jax.core.conditions import TextSpec
from t2i_jax.core.narrow import text_encoder
from t2i_jax.networks.clip import CLIPNetwork, ImageTower, TextTower
from t2i_jax.text.clip import ClipCaption, ClipImages, ClipText
from t2i_jax.text.cut import LimitedEncoder


@dataclasses.dataclass(frozen=True)
class ClipPair(LimitedEncoder):
    """Captions as the vectors of `prior`, then those of `decoder`, padded with zeros to the wider of both."""

    prior: ClipCaption
    decoder: ClipText

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (n, s) of both, concatenated, and the mask of the prior's. Errors: those of both."""
        (ids, mask), (others, _) = (text(captions) for text in (self.prior, self.decoder))
        return np.concatenate([ids, others], 1), mask

    @property
    def room(self) -> int:
        return self.prior.room

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """Ids of the prior, without special ones and without a limit."""
        return self.prior.tokens(captions)

    def cut(self, captions: Sequence[str]) -> list[int]:
        """Number of tokens of each caption that neither reads."""
        return [min(counts) for counts in zip(self.prior.cut(captions), self.decoder.cut(captions), strict=True)]

    @property
    def feature_shape(self) -> tuple[int, int]:
        shapes = self.prior.feature_shape, self.decoder.feature_shape
        return sum(length for length, _ in shapes), max(dim for _, dim in shapes)

    def load(self) -> ClipPairEncoders:
        """Both with their weights, on the host. Errors: those of both."""
        return ClipPairEncoders(self.prior.load(), self.decoder.load())

    def features(self, model: ClipPairEncoders, ids: Array, mask: Array) -> Array:
        """(b, s) ids -> (b, t + u, k) fp32: t vectors of the prior, u of the decoder."""
        n, dim = mask.shape[1], self.feature_shape[1]
        first = self.prior.features(model.prior, ids[:, :n], mask)
        second = self.decoder.features(model.decoder, ids[:, n:], mask)
        wide = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, dim - x.shape[-1])))
        return jnp.concatenate([wide(first), wide(second)], 1)


class ClipPairEncoders(nnx.Module):
    """The parameters of a `ClipPair`."""

    def __init__(self, prior: CLIPNetwork | TextTower, decoder: TextTower):
        self.prior, self.decoder = prior, decoder


@dataclasses.dataclass(frozen=True)
class CaptionsAndImages(LimitedEncoder):
    """Captions by an encoder that reads no images, and images by a tower of their own."""

    captions: ClipText | ClipPair
    images: ClipImages

    @property
    def spec(self) -> TextSpec:
        return TextSpec(features=True, image_embedding=True, limited=True)

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (n, s) and a mask. Errors: those of `captions`."""
        return self.captions(captions)

    @property
    def room(self) -> int:
        return self.captions.room

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        return self.captions.tokens(captions)

    def cut(self, captions: Sequence[str]) -> list[int]:
        return self.captions.cut(captions)

    def full(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return self.captions.full(ids, mask)

    @property
    def feature_shape(self) -> tuple[int, int]:
        return self.captions.feature_shape

    def load(self) -> CaptionAndImageEncoders:
        """All with their weights, on the host. Errors: those of both."""
        return CaptionAndImageEncoders(self.captions.load(), self.images.load())

    def features(self, model: CaptionAndImageEncoders, ids: Array, mask: Array) -> Array:
        """(b, s) ids -> features of captions."""
        return text_encoder(self.captions).features(model.captions, ids, mask)

    def image_features(self, model: CaptionAndImageEncoders, images: Array) -> Array:
        """The embedding of each image, not normalised: (b, i, j, c) in [-1, 1] -> (b, k) fp32."""
        return self.images.embed(model.images, images)


class CaptionAndImageEncoders(nnx.Module):
    """The parameters of a `CaptionsAndImages`."""

    def __init__(self, captions: TextTower | ClipPairEncoders, images: ImageTower):
        self.captions, self.images = captions, images
