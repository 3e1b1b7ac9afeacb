"""A small judge of image and caption: two heads on frozen encoders, trained like CLIP on the training pairs alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Float, Int, typed
from t2i_jax.core.keys import seed_key
from t2i_jax.evaluation.alignment import rank
from t2i_jax.evaluation.features import batches
from t2i_jax.evaluation.report import Number, aligned
from t2i_jax.nn.layers import Linear
from t2i_jax.nn.transformer import drop


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Sizes and training of the two heads."""

    width: int = 256
    """dimensions of the shared space"""
    hidden: int = 512
    """hidden units of each head"""
    epochs: int = 40
    """passes over the training pairs"""
    batch: int = 512
    """pairs of a batch"""
    rate: float = 1e-3
    """learning rate of AdamW"""
    decay: float = 0.05
    """weight decay of AdamW"""
    dropout: float = 0.3
    """share of inputs and hidden units left out in training"""


class Heads(nnx.Module):
    """Image features (b, d) and caption features (b, k) to unit vectors (b, width) of one space."""

    def __init__(self, config: JudgeConfig, d: int, k: int, key: Array):
        keys = jax.random.split(key, 4)
        linear = lambda a, b, key: Linear(a, b, key, std=None)
        self.image = nnx.List([linear(d, config.hidden, keys[0]), linear(config.hidden, config.width, keys[1])])
        self.text = nnx.List([linear(k, config.hidden, keys[2]), linear(config.hidden, config.width, keys[3])])
        self.scale = nnx.Param(jnp.log(14.0))

    def __call__(self, images: Array, texts: Array, dropout: float = 0.0, key: Array | None = None) -> tuple:
        keys = [None] * 4 if key is None else list(jax.random.split(key, 4))
        return head(self.image, images, dropout, keys[:2]), head(self.text, texts, dropout, keys[2:])


@typed
def head(
    layers: Sequence[Linear], x: Float[Array, "b d"], dropout: float, keys: Sequence[Array | None]
) -> Float[Array, "b k"]:
    """Unit vectors (b, width) of features (b, d), by two layers with GELU between."""
    first, second = layers
    y = second(drop(jax.nn.gelu(first(drop(x, dropout, keys[0]))), dropout, keys[1]))
    return y / jnp.linalg.norm(y, axis=-1, keepdims=True)


@typed
def contrast(
    heads: Heads,
    images: Float[Array, "b d"],
    texts: Float[Array, "b k"],
    concepts: Int[Array, " b"],
    dropout: float,
    key: Array,
) -> Float[Array, ""]:
    """Symmetric cross-entropy of the similarities (Radford et al. 2021, figure 3); equal captions share the target."""
    a, b = heads(images, texts, dropout, key)
    logits = jnp.exp(heads.scale[...]) * a @ b.T
    same = (concepts[:, None] == concepts[None]).astype(jnp.float32)
    target = same / same.sum(1, keepdims=True)
    return optax.softmax_cross_entropy(jnp.stack([logits, logits.T]), target).mean()


@functools.partial(jax.jit, static_argnames="config")
@typed
def fit(
    images: Float[Array, "n d"], texts: Float[Array, "n k"], concepts: Int[Array, " n"], config: JudgeConfig, key: Array
) -> Heads:
    """Heads trained on features (n, d) and (n, k); pairs of equal `concepts` (n,) count as each other's match."""
    init_key, order_key, drop_key = jax.random.split(key, 3)
    n, batch = len(images), min(config.batch, len(images))
    heads: Any = Heads(config, images.shape[1], texts.shape[1], init_key)
    optimizer = optax.adamw(config.rate, weight_decay=config.decay)
    orders = jax.vmap(lambda k: jax.random.permutation(k, n))(jax.random.split(order_key, config.epochs))
    batches = orders[:, : n // batch * batch].reshape(-1, batch)

    def step(carry: tuple, item: tuple) -> tuple:
        heads, state = carry
        rows, key = item
        grads = jax.grad(contrast)(heads, images[rows], texts[rows], concepts[rows], config.dropout, key)
        updates, state = optimizer.update(grads, state, heads)
        return (optax.apply_updates(heads, updates), state), None

    items = (batches, jax.random.split(drop_key, len(batches)))
    return jax.lax.scan(step, (heads, optimizer.init(heads)), items)[0][0]


@dataclasses.dataclass(frozen=True)
class RetrievalJudge:
    """How well an image goes with a caption, as learned from the training pairs."""

    images: Callable[[np.ndarray], np.ndarray]
    """images uint8 (n, i, j, 3) -> features (n, d): a loaded `Space`"""
    texts: Callable[[Sequence[str]], np.ndarray]
    """captions -> features (n, k), of MiniLM say"""
    heads: Heads
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def train(
        cls,
        images: Callable[[np.ndarray], np.ndarray],
        texts: Callable[[Sequence[str]], np.ndarray],
        samples: np.ndarray,
        captions: Sequence[str],
        config: JudgeConfig = JudgeConfig(),
        seed: int = 0,
    ) -> RetrievalJudge:
        """The judge that learned from the training images uint8 (n, i, j, 3) and their n captions."""
        if len(samples) != len(captions) or len(captions) < 2:
            raise ValueError(f"a judge learns from pairs: {len(samples)} images with {len(captions)} captions")
        features, concepts = images(samples), np.unique(np.asarray(captions), return_inverse=True)[1]
        mean, std = features.mean(0), np.maximum(features.std(0), 1e-3)
        heads = fit((features - mean) / std, texts(captions), concepts, config, seed_key(seed))
        return cls(images, texts, heads, mean, std)

    def similarity(self, samples: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Cosine (n, m) of images uint8 (n, i, j, 3) and m captions."""
        features = (self.images(samples) - self.mean) / self.std
        a, b = self.heads(jnp.asarray(features), jnp.asarray(self.texts(captions)))
        return np.asarray(a @ b.T)

    def evaluate(self, generated: np.ndarray, captions: Sequence[str], real: np.ndarray) -> dict[str, Number]:
        """Rank of an image's own caption among all prompts, with that of the real images as baseline.

        `generated` and `real` are uint8 (n, i, j, 3), one per caption, and none of them was trained on. Keys:
        `judge/top1`, `judge/top5`, `judge/median_rank`, `judge/cosine` (that of images with their own captions).
        """
        choices, truth = np.unique(np.asarray(captions), return_inverse=True)
        ours, theirs = (self.similarity(x, choices.tolist()) for x in (generated, real))
        numbers = aligned(rank(ours, truth), real=rank(theirs, truth))
        own = lambda s: float(np.take_along_axis(s, truth[:, None], 1).mean())
        numbers["cosine"] = Number(own(ours), "higher", {"real": own(theirs), "chance": float(ours.mean())})
        return {f"judge/{name}": number for name, number in numbers.items()}


def minilm_texts(length: int = 32, batch: int = 64) -> Callable[[Sequence[str]], np.ndarray]:
    """Captions -> one MiniLM vector each, float32 (n, 384)."""
    from t2i_jax.text.minilm import MiniLM

    text = MiniLM(length)
    model = text.load()
    sentence = jax.jit(text.sentence)

    def features(captions: Sequence[str]) -> np.ndarray:
        parts = []
        for rows, count in batches(len(captions), batch):
            parts.append(np.asarray(sentence(model, *text([captions[int(i)] for i in rows])))[:count])
        return np.concatenate(parts)

    return features
