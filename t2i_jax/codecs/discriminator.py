"""PatchGAN: one logit for each of the overlapping patches of an image (Isola et al. 2017, arXiv:1611.07004)."""

import dataclasses
from itertools import pairwise
from typing import Annotated, Literal

import jax
from flax import nnx
from jax import Array

from t2i_jax.core.fields import DEEPEST, Checked, Range, Size
from t2i_jax.nn.batch_norm import BatchNorm
from t2i_jax.nn.layers import Conv, GroupNorm, replace


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig(Checked):
    """Sizes of a PatchGAN; by default a logit has a receptive field of 70 x 70 pixels."""

    width: Size = 64
    """channels after the first convolution; doubled by each further one, up to eightfold"""
    layers: Annotated[int, Range(0, DEEPEST)] = 3
    """convolutions of stride 2; two more have stride 1"""
    norm: Literal["batch", "group", "none"] = "batch"
    """normalisation between them"""

    def init(self, key: Array) -> "Discriminator":
        return Discriminator(self, key)


class Discriminator(nnx.Module):
    """Images (b, i, j, 3) in [-1, 1] -> logits (b, i', j', 1), high for real."""

    def __init__(self, config: DiscriminatorConfig, key: Array):
        widths = [config.width * min(2**n, 8) for n in range(config.layers + 1)]
        keys = jax.random.split(key, 2 * len(widths) + 1)
        # 4x4, padded by one; a bias before a normalisation has no effect.
        conv = lambda c, f, key, stride, bias: Conv(
            c, f, key, kernel=4, stride=stride, padding=((1, 1), (1, 1)), bias=bias, std=0.02
        )
        self.stem = conv(3, widths[0], keys[0], 2, True)
        self.convs = nnx.List(
            [
                conv(c, f, keys[2 * n + 1], 2 if n < config.layers - 1 else 1, config.norm == "none")
                for n, (c, f) in enumerate(pairwise(widths))
            ]
        )
        self.norms = nnx.List([self._norm(config.norm, f, keys[2 * n + 2]) for n, f in enumerate(widths[1:])])
        self.out = conv(widths[-1], 1, keys[-1], 1, True)

    @staticmethod
    def _norm(kind: str, c: int, key: Array) -> nnx.Module | None:
        if kind == "batch":
            return BatchNorm(c, key)
        return GroupNorm(c, min(32, c), 1e-5) if kind == "group" else None

    def __call__(self, images: Array, train: bool = True) -> tuple[Array, "Discriminator"]:
        """Logits, and the discriminator with updated running statistics."""
        x = jax.nn.leaky_relu(self.stem(images), 0.2)
        norms = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(x)
            if isinstance(norm, BatchNorm):
                x, norm = norm(x, train)
            elif norm is not None:
                x = norm(x)
            norms.append(norm)
            x = jax.nn.leaky_relu(x, 0.2)
        return self.out(x), replace(self, norms=nnx.List(norms))
