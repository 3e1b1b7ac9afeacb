"""Frozen networks that give features of regions of an image and of the whole, for heads that are trained on them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t2i_jax.features.classifiers import EfficientNetLite0, InceptionLayers
from t2i_jax.nn.conv import patchify
from t2i_jax.nn.resize import aligned_bilinear


class EfficientNetTrunk(nnx.Module):
    """EfficientNet-Lite0: images (b, i, j, 3) in [-1, 1] -> regions (b, size/16, size/16, 112) and the whole (b, 1280).

    size: side that images are resized to, bicubic. pixels: what is joined to both.
    """

    def __init__(self, network: EfficientNetLite0, size: int, pixels: PixelTrunk | None = None):
        self.network, self.size, self.pixels = network, size, pixels

    def __call__(self, images: Array) -> tuple[Array, Array]:
        found = self.network.maps((images + 1) * 127.5, self.size)
        if self.pixels is None:
            return found
        regions, whole = (jnp.concatenate(pair, -1) for pair in zip(found, self.pixels(images), strict=True))
        return regions, whole


class InceptionTrunk(nnx.Module):
    """Inception-v3 of torchvision: images (b, i, j, 3) in [-1, 1] -> regions (b, 17, 17, 768) and the whole (b, 2048).

    Images are resized to 299 x 299, bilinear without antialiasing, and not normalised further. align_corners: whether
    corners are mapped to corners, as AttnGAN and DM-GAN have it, or edges to edges, as SSA-GAN.
    """

    def __init__(self, network: InceptionLayers, align_corners: bool, size: int = 299):
        self.network, self.align_corners, self.size = network, align_corners, size

    def __call__(self, images: Array) -> tuple[Array, Array]:
        size = (self.size, self.size)
        if self.align_corners:
            return self.network.maps(aligned_bilinear(images, size))
        return self.network.maps(jax.image.resize(images, (len(images), *size, 3), "linear", antialias=False))


class PixelTrunk(nnx.Module):
    """No network: images (b, i, j, 3) in [-1, 1], averaged down to side x side, as regions of `patch` x `patch` pixels
    (b, side/patch, side/patch, 3 patch**2), and as a whole (b, 3 side**2)."""

    def __init__(self, side: int, patch: int):
        self.side, self.patch = side, patch

    def __call__(self, images: Array) -> tuple[Array, Array]:
        x = jax.image.resize(images, (len(images), self.side, self.side, 3), "linear", antialias=True)
        return patchify(x, self.patch), jnp.reshape(x, (len(x), -1))
