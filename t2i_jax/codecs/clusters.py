"""Colours as codes: each pixel becomes the nearest of a few hundred clusters of colours.

Chen et al. 2020 (Image GPT, 3.1) reduce the 24 bits of a pixel to 9, by k-means with 512 clusters.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t2i_jax.codecs import losses
from t2i_jax.codecs.quantize import Quantizer, QuantizerConfig, usage
from t2i_jax.core.arrays import Float, Int, typed
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import BaseCodec
from t2i_jax.core.fields import values
from t2i_jax.core.specs import CodecSpec, CodeSpec
from t2i_jax.core.types import Compute, LossOutput, Objective
from t2i_jax.nn.layers import replace

COLORS = 3
UNREAD = ("commitment", "codebook", "entropy", "temperature")
"""Settings of losses that move an encoder or a codebook; here pixels are as they are, and a cluster is their mean."""


@dataclasses.dataclass(frozen=True)
class ColorClusters(BaseCodec["ColorTable"]):
    """The codec and its training settings. The defaults make k-means of batches: clusters are running means of the
    colours nearest to them, begin at colours of the first batch, and are restarted where nothing is near."""

    quantizer: QuantizerConfig = QuantizerConfig(512, COLORS, normalize=False, decay=0.99, revive=0.05)
    compute: Compute = Compute()
    """distances are fp32 whatever the dtype"""

    def __post_init__(self):
        super().__post_init__()
        if self.quantizer.dim != COLORS or self.quantizer.normalize:
            raise ConfigError("quantizer: clusters of colours have dim=3 and normalize=False")
        given, plain = values(self.quantizer), values(QuantizerConfig())
        if odd := [name for name in UNREAD if given[name] != plain[name]]:
            raise ConfigError(f"quantizer.{odd[0]} {given[odd[0]]}: clusters of colours have no such loss")

    @property
    def vocabulary(self) -> int:
        """Number of codes; codes are below it."""
        return self.quantizer.codes

    @property
    def factor(self) -> int:
        """Pixels per code along a side."""
        return 1

    @property
    def spec(self) -> CodecSpec:
        """Shape and dtype of the codes of an image."""
        return CodecSpec(1, CodeSpec("int32", sizes=(self.vocabulary,)))

    def with_compute(self, compute: Compute) -> ColorClusters:
        """The same codec with other settings of the computation."""
        compute.check(self.capabilities)
        return dataclasses.replace(self, compute=compute)

    def init(self, key: Array) -> ColorTable:
        return ColorTable(self, key)

    @typed
    def encode(
        self, model: ColorTable, images: Float[Array, "b i j 3"], key: Array | None = None
    ) -> Int[Array, "b i j"]:
        """The cluster of each pixel of images in [-1, 1], int32 below `vocabulary`: least squared distance.

        Deterministic; the key is ignored.
        """
        return model.quantizer.codes(images)

    @typed
    def decode(self, model: ColorTable, codes: Int[Array, "b i j"]) -> Float[Array, "b i j 3"]:
        """Images fp32, about [-1, 1], of codes."""
        return model.quantizer.vectors(codes).astype(jnp.float32)

    def objectives(self) -> dict[str, Objective]:
        return {"codec": Objective(self.loss)}

    def loss(
        self, model: ColorTable, batch: dict[str, Array], key: Array, step: Array | int = 0, train: bool = True
    ) -> LossOutput:
        """Mean squared distance of pixels to their clusters; the returned state holds the moved clusters.

        batch: `image` float (b, i, j, 3) in [-1, 1].
        """
        images = batch["image"]
        codes = jax.lax.stop_gradient(self.encode(model, images))
        decoded = self.decode(model, codes)
        distance = losses.reconstruction(images, decoded, "l2")
        metrics = {"l2": distance, "psnr": losses.psnr(images, decoded), **usage(codes, self.vocabulary)}
        moved = replace(model, quantizer=model.quantizer.ema_update(images, codes, key)) if train else model
        return LossOutput(distance, metrics, moved)


class ColorTable(nnx.Module):
    """The clusters, fp32 (codes, 3) in [-1, 1]."""

    def __init__(self, config: ColorClusters, key: Array):
        self.quantizer = Quantizer(config.quantizer, key)
