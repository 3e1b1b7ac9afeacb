"""The networks of DAMSM: captions as words and a sentence, images as regions and a code (Xu et al. 2018, AttnGAN)."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.errors import ConfigError
from t2i_jax.networks.condition import Context
from t2i_jax.nn.layers import Embedding, Linear
from t2i_jax.nn.matching import matching_losses
from t2i_jax.nn.recurrent import Bidirectional, Cell
from t2i_jax.nn.transformer import drop


class Trunk(Protocol):
    """A frozen network of images, one of `features.trunks`."""

    def __call__(self, images: Array) -> tuple[Array, Array]:
        """Images (b, i, j, 3) in [-1, 1] -> features of regions (b, y, x, c) and of the whole (b, d)."""
        ...


class WordEncoder(nnx.Module):
    """Embedded words read in both directions; each half of a feature vector is one direction's output."""

    def __init__(self, vocabulary: int, embed: int, dim: int, key: Array, cell: Cell):
        keys = jax.random.split(key)
        self.table = Embedding(vocabulary, embed, keys[0], std=0.1)
        self.rnn = Bidirectional(embed, dim // 2, keys[1], cell)

    def __call__(self, text: Array, mask: Array, dropout: float = 0.0, key: Array | None = None) -> tuple[Array, Array]:
        """Ids and mask (b, s), True for the first n words of a row -> words (b, s, k), zeros after the end, and the
        sentence (b, k). dropout: of the embeddings, with a key."""
        return self.rnn(drop(self.table(text), dropout, key), mask)

    def features(self, text: Array, mask: Array) -> Array:
        """The sentence, then the words: (b, 1 + s, k)."""
        words, sentence = self(text, mask)
        return jnp.concatenate([sentence[:, None], words], 1)


class ImageHeads(nnx.Module):
    """Projections of the features of a trunk, c numbers a region and d the whole, to the space of words."""

    def __init__(self, c: int, d: int, dim: int, key: Array):
        keys = jax.random.split(key)
        self.regions = Linear(c, dim, keys[0], std=None, bias=False, axes=("embed", None))
        self.code = Linear(d, dim, keys[1], std=None, axes=("embed", None))

    def __call__(self, regions: Array, whole: Array) -> tuple[Array, Array]:
        """(b, y, x, c) and (b, d) -> regions (b, y x, k) in raster order, and the code (b, k)."""
        return self.regions(rearrange(regions, "b y x c -> b (y x) c")), self.code(whole)


class DAMSMNetwork(nnx.Module):
    """The parameters of a `DAMSM`; a part is None where a published file has the other one alone."""

    def __init__(self, text: WordEncoder | None, image: ImageHeads | None):
        self.text, self.image = text, image


class ImageEncoder(nnx.Module):
    """The whole image side: images (b, i, j, 3) in [-1, 1] -> regions (b, r, k) and code (b, k)."""

    def __init__(self, trunk: Trunk, heads: ImageHeads):
        self.trunk, self.heads = trunk, heads

    def __call__(self, images: Array) -> tuple[Array, Array]:
        return self.heads(*self.trunk(images))


def caption_losses(
    encoder: ImageEncoder,
    context: Context,
    images: Array,
    weight: Array,
    classes: Array | None,
    gammas: tuple[float, float, float],
) -> dict[str, Array]:
    """The four losses of `nn.matching.matching_losses` of images (b, i, j, 3) and the captions that they were made for,
    among the examples of weight (b,) not 0; the gradient is by the images alone.

    Errors: `ConfigError` for an encoder of another space than the words.
    """
    regions, code = encoder(images)
    words, sentence = map(jax.lax.stop_gradient, (context.tokens, context.pooled))
    if regions.shape[-1] != words.shape[-1]:
        sizes = f"its regions have {regions.shape[-1]} numbers, the words {words.shape[-1]}"
        raise ConfigError(f"matching: {sizes}; the condition is to be of the same DAMSM")
    return matching_losses(words, context.mask & (weight > 0)[:, None], sentence, regions, code, classes, *gammas)
