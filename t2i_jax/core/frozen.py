"""What frozen parts add to a batch: features of captions and images, codes of the small image."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax import Array

from t2i_jax.core.conditions import Tokenizer
from t2i_jax.core.narrow import (
    embeds_images,
    gives_features,
    image_text_encoder,
    learns_from_images,
    neighbour_retriever,
    retrieves_neighbours,
    text_encoder,
)
from t2i_jax.core.specs import BatchSpec
from t2i_jax.core.types import Codec

Frozen = Mapping[str, object]
"""modules that nothing trains: `codec`, `text`, and `loss`, which only losses read; and `base`, the parameters by name
that adapters leave as they are"""


def with_low_codes(spec: BatchSpec, codec: Codec | None, frozen: Frozen, batch: dict[str, Array]) -> dict[str, Array]:
    """A batch with the codes of the small image, `low_codes` int (b, h, w), if the model reads them and the batch has
    none: of its `low_res` float (b, i, j, 3) in [-1, 1], or of its `image`, scaled to as many pixels as `low_codes` of
    the spec has codes for."""
    small = batch.get("low_res", batch.get("image"))
    if "low_codes" not in spec or "low_codes" in batch or codec is None or small is None:
        return batch
    rows, columns = (n * codec.spec.factor for n in spec["low_codes"].shape if n is not None)
    small = jax.image.resize(small, (len(small), rows, columns, 3), "linear")
    return batch | {"low_codes": codec.encode(frozen["codec"], small)}


def with_features(text: Tokenizer | None, frozen: Frozen, batch: dict[str, Array]) -> dict[str, Array]:
    """A batch with features of its images or captions, if the text encoder computes them and the batch has none."""
    if embeds_images(text) and "image" in batch and "image_features" not in batch:
        embedding = image_text_encoder(text).image_features(frozen["text"], batch["image"])
        batch = batch | {"image_features": embedding}
    if not gives_features(text):
        return batch
    if "features" in batch:
        return with_neighbours(text, frozen, batch)
    if "image" in batch and learns_from_images(text):
        features = image_text_encoder(text).image_features(frozen["text"], batch["image"])
    elif "text" in batch:
        features = text_encoder(text).features(frozen["text"], batch["text"], batch["text_mask"])
    else:
        return batch
    return with_neighbours(text, frozen, batch | {"features": features})


def with_neighbours(text: Tokenizer | None, frozen: Frozen, batch: dict[str, Array]) -> dict[str, Array]:
    """A batch with features of captions and with the neighbours of these, if the text retrieves them and the batch has
    none. `record` of the batch, if any, numbers the records that are not their own neighbours."""
    if not retrieves_neighbours(text) or "neighbour_image" in batch or "text_mask" not in batch:
        return batch
    own = batch["features"], batch["text_mask"], batch.get("record")
    return batch | neighbour_retriever(text).neighbours_of(frozen["text"], *own)
