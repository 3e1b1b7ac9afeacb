"""Encoders that make one vector of a record: of its image or of its caption, by a text side or a feature space."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from t2i_jax.convert.folders import text_side
from t2i_jax.core.conditions import TextEncoder, Tokenizer
from t2i_jax.core.config import refused
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.narrow import embeds_images, gives_features, image_text_encoder, learns_from_images, text_encoder
from t2i_jax.core.sharding import batch_sharding, put_on_mesh, shardings
from t2i_jax.data.records import Record, title
from t2i_jax.evaluation.features import SIZES, FeatureNetwork, batches, images_of, space_of
from t2i_jax.networks.clip import CLIPNetwork
from t2i_jax.storage.artifacts import on_host
from t2i_jax.text.clip import ClipEmbedding
from t2i_jax.text.index import weights_digest
from t2i_jax.text.minilm import MiniLM
from t2i_jax.text.retrieval import NeighbourPairs, Neighbours, mean_vector

Of = Literal["images", "captions"]


@dataclasses.dataclass(frozen=True)
class Embedder:
    """A loaded encoder."""

    name: str
    digest: str
    """of its weights, as of `weights_digest`"""
    of: Of
    batch: int
    embed: Callable[[Sequence[Record]], Array]
    """a batch of records -> float (batch, k), not normalised"""

    def __call__(self, records: Sequence[Record]) -> np.ndarray:
        """Vectors fp32 (n, k) of records, by which none depends on others."""
        parts = [
            np.asarray(self.embed([records[int(i)] for i in rows]), np.float32)[:count]
            for rows, count in batches(len(records), self.batch)
        ]
        return np.concatenate(parts)

    def numbered(self, records: Iterable[tuple[int, Record]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers (n,) and vectors (n, k) of a stream of records, a batch at a time."""
        records = iter(records)
        while some := list(islice(records, self.batch)):
            yield np.asarray([i for i, _ in some], np.int64), self([record for _, record in some])


def load_embedder(words: str, text: Tokenizer | None, of: Of, mesh: Mesh, batch_size: int) -> Embedder:
    """The encoder that `words` name: a feature space (`efficientnet_lite0`, `pixels`, `inception:FILE`), `minilm`, a
    text side as of `text_side`, or with none that of a config, `text`, and of one that retrieves its encoder.

    Errors: `ConfigError` for other words, and for an encoder that does not read images or captions, as `of` says.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = -(-batch_size // shards) * shards
    if words.partition(":")[0] in SIZES:
        if of == "captions":
            raise ConfigError(f"--encoder {words}: embeds images alone; captions need a text encoder")
        with refused("--encoder"):
            return _of_space(space_of(words), batch_size)
    chosen = MiniLM(pooled=True) if words == "minilm" else text_side(words, "--encoder") if words else text
    chosen = chosen.clip if isinstance(chosen, Neighbours) else chosen
    chosen = chosen.text if isinstance(chosen, NeighbourPairs) else chosen
    sees = learns_from_images(chosen) or embeds_images(chosen)
    if not gives_features(chosen) or (of == "images" and not sees):
        kind = "no text" if chosen is None else f"a {type(chosen).__name__}"
        hint = "--encoder clip:FOLDER or efficientnet_lite0" if of == "images" else "--encoder clip:FOLDER or minilm"
        raise ConfigError(f"--encoder: {kind} embeds no {of}; name another: {hint}")
    encoder = text_encoder(chosen)
    with refused("--encoder"), on_host():
        model = encoder.load()
    name, digest = f"{type(encoder).__name__}", weights_digest(model)
    model = put_on_mesh(model, shardings(model, mesh))

    def on_mesh(function: Callable[..., Array], *arrays: np.ndarray) -> Array:
        with jax.set_mesh(mesh):
            return jax.device_get(function(model, *put_on_mesh(arrays, batch_sharding(mesh))))

    if of == "images":
        look = jax.jit(lambda model, images: _of_images(encoder, model, images.astype(jnp.float32) / 127.5 - 1))
        embed = lambda records: on_mesh(look, images_of(records))
    else:
        read = jax.jit(lambda model, ids, mask: _of_captions(encoder, model, ids, mask))
        embed = lambda records: on_mesh(read, *encoder([title(record) for record in records]))
    return Embedder(name, digest, of, batch_size, embed)


def _of_space(space: FeatureNetwork, batch_size: int) -> Embedder:
    """Features of images by a network that has no weights here to tell apart: its name does."""
    loaded = dataclasses.replace(space, batch=batch_size).load()
    digest = hashlib.sha256(loaded.name.encode()).hexdigest()[:16]
    return Embedder(loaded.name, digest, "images", batch_size, lambda records: loaded.apply(images_of(records)))


def _of_images(text: TextEncoder, model: nnx.Module, images: Array) -> Array:
    if isinstance(text, ClipEmbedding):
        return text.embed_images(cast(CLIPNetwork, model), images)  # not normalised, as models of neighbours read them
    found = image_text_encoder(text).image_features(model, images)
    return found if found.ndim == 2 else found.mean(1)


def _of_captions(text: TextEncoder, model: nnx.Module, ids: Array, mask: Array) -> Array:
    """The vector of a caption, or the mean of those of its tokens."""
    if isinstance(text, ClipEmbedding):
        return text.embed_captions(cast(CLIPNetwork, model), ids)
    return mean_vector(text.features(model, ids, mask), mask)
