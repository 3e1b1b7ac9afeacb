"""A VQGAN in eager PyTorch: channels first, nearest-neighbour doubling before convolutions, distances to every code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jax import Array

from benchmarks.pytorch import pytorch, tensor
from t2i_jax.codecs.autoencoder import Decoder
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN

Layer = Callable[[Any], Any]


class Codec:
    """Encoder, codebook and decoder with the weights of `model`. Errors: those of this package."""

    def __init__(self, config: object, model: Any):
        torch = pytorch()
        if not isinstance(config, VQGAN) or not isinstance(config.quantizer, QuantizerConfig):
            raise ValueError("the comparison in PyTorch is of a VQGAN whose codes are the nearest rows")
        if config.quantizer.cosine:
            raise ValueError("the comparison in PyTorch is of codes that are not found by angle: not quantizer.cosine")
        if config.dtype != "float32":
            raise ValueError("the comparison in PyTorch is of float32: not dtype")
        part, self.torch, self.f = model.autoencoder, torch, torch.nn.functional
        self.normalize, self.patch = config.quantizer.normalize, config.autoencoder.patch
        self.rows = tensor(part.quantizer.rows())
        self.encoder = [*self._way(part.encoder), self._conv(part.to_code)]
        self.decoder = [self._conv(part.from_code), *self._way(part.decoder)]

    def encode(self, images: Array) -> Any:
        """Images (b, i, j, 3) -> codes (b, h, w), a tensor."""
        with self.torch.inference_mode():
            p, x = self.patch, tensor(images)
            x = x.unflatten(1, (-1, p)).unflatten(3, (-1, p)).permute(0, 2, 4, 5, 1, 3).flatten(1, 3).contiguous()
            for layer in self.encoder:
                x = layer(x)
            z = x.permute(0, 2, 3, 1)
            z = self.f.normalize(z, dim=-1) if self.normalize else z
            flat = z.flatten(0, 2)
            apart = flat.pow(2).sum(1, keepdim=True) + self.rows.pow(2).sum(1) - 2 * flat @ self.rows.T
            return apart.argmin(1).view(z.shape[:3])

    def decode(self, codes: Array) -> Any:
        """Codes (b, h, w) -> images (b, 3, i, j), a tensor."""
        with self.torch.inference_mode():
            x = self.rows[self.torch.from_numpy(np.array(codes)).long()].permute(0, 3, 1, 2).contiguous()
            for layer in self.decoder:
                x = layer(x)
            p = self.patch
            return x.unflatten(1, (p, p, 3)).permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)

    # -- our modules as layers of PyTorch

    def _way(self, m: Any) -> list[Layer]:
        """Of an encoder or a decoder."""
        middle = [self._block(m.middle.block1), *self._attentions([m.middle.attention]), self._block(m.middle.block2)]
        levels: list[Layer] = []
        for level in m.levels:
            for n, block in enumerate(level.blocks):
                levels += [self._block(block), *self._attentions(list(level.attention)[n : n + 1])]
            levels += self._resample(level.resample)
        parts = [*middle, *levels] if isinstance(m, Decoder) else [*levels, *middle]
        return [self._conv(m.stem), *parts, self._act(m.norm), self._conv(m.out)]

    def _conv(self, m: Any, padding: int | None = None) -> Layer:
        w, b = tensor(m.w[...]).permute(3, 2, 0, 1).contiguous(), tensor(m.b[...])
        padding = w.shape[-1] // 2 if padding is None else padding
        return lambda x: self.f.conv2d(x, w, b, m.stride, padding)

    def _norm(self, m: Any) -> Layer:
        w, b = tensor(m.w[...]), tensor(m.b[...])
        return lambda x: self.f.group_norm(x, m.groups, w, b, m.eps)

    def _act(self, m: Any) -> Layer:
        norm = self._norm(m)

        def act(x: Any) -> Any:
            y = norm(x)
            return y * self.torch.sigmoid(y)

        return act

    def _block(self, m: Any) -> Layer:
        acts, convs = (self._act(m.norm1), self._act(m.norm2)), (self._conv(m.conv1), self._conv(m.conv2))
        short = self._conv(m.shortcut) if m.shortcut is not None else lambda x: x
        return lambda x: short(x) + convs[1](acts[1](convs[0](acts[0](x))))

    def _attentions(self, modules: list[Any]) -> list[Layer]:
        return [self._attention(m) for m in modules if m is not None]

    def _attention(self, m: Any) -> Layer:
        norm, (q, k, v, out) = self._norm(m.norm), (self._conv(part) for part in (m.q, m.k, m.v, m.out))

        def attend(x: Any) -> Any:
            h = norm(x)
            rows, columns, values = (part(h).flatten(2) for part in (q, k, v))
            share = (rows.transpose(1, 2) @ columns * x.shape[1] ** -0.5).softmax(-1)
            return x + out((values @ share.transpose(1, 2)).view(x.shape))

        return attend

    def _resample(self, m: Any) -> list[Layer]:
        if m is None:
            return []
        if m.conv.stride == 2:
            conv = self._conv(m.conv, padding=0)
            return [lambda x: conv(self.f.pad(x, (0, 1, 0, 1)))]
        conv = self._conv(m.conv)
        return [lambda x: conv(self.f.interpolate(x, scale_factor=2.0, mode="nearest"))]
