"""CLIP's networks: a text tower and an image tower with a common embedding space (Radford et al. 2021)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Bool, Float, Int, Num, typed
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import Checked, Count, Size
from t2i_jax.core.sharding import shard
from t2i_jax.core.types import Compute
from t2i_jax.nn.attention import Causal
from t2i_jax.nn.layers import Conv, Embedding, LayerNorm, Linear, at_least_fp32, normal, param, position_table, unit
from t2i_jax.nn.transformer import Attention, Block, Transformer, scan_stack, stack

MEAN, STD = np.array([(0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)], np.float32)
"""Of each channel of images in [0, 1]."""


@dataclasses.dataclass(frozen=True)
class CLIPTowers(Checked):
    """Sizes of both towers; the defaults are those of ViT-B/32."""

    text: Transformer = Transformer(512, 12, 8, norm="layer", activation="quick_gelu", bias=True)
    image: Transformer = Transformer(768, 12, 12, norm="layer", activation="quick_gelu", bias=True)
    dim: Count = 512
    """size k of an embedding; 0: a text tower without a projection"""
    vocabulary: Size = 49408
    length: Size = 77
    """ids per caption"""
    end: int | None = None
    """id whose first position is the output of a caption; None: the position of the largest id, which is the end token
    of released vocabularies"""
    last: bool = False
    """the output of a caption is that of its last token by the mask, of any id"""
    size: Size = 224
    """side of an image"""
    patch: Size = 32
    channels: Size = 3
    times: Count = 0
    """noise levels of images: the first token is another one for each; 0: images are clean, or their noise unknown"""

    def __post_init__(self):
        super().__post_init__()
        for tower, name in ((self.text, "text"), (self.image, "image")):
            if not tower.depth:
                raise ConfigError(f"towers.{name}.depth 0: at least one block is needed")

    def init(self, key: Array) -> CLIPNetwork:
        return CLIPNetwork(self, key)


class TextTower(nnx.Module):
    """A causal Transformer over ids, one of whose tokens represents the caption."""

    def __init__(self, config: CLIPTowers, key: Array, compute: Compute = Compute()):
        keys = jax.random.split(key, 4)
        d = config.text.width
        self.words = Embedding(config.vocabulary, d, keys[0])
        self.positions = position_table(normal(keys[1], (config.length, d), 0.01))
        self.blocks = _as_published(stack(config.text, keys[2], compute.attention), config.text)
        self.norm = LayerNorm(d, config.text.eps)
        self.out = Linear(d, config.dim, keys[3], bias=False, std=d**-0.5, axes=("embed", None)) if config.dim else None
        self.end, self.last, self.compute = config.end, config.last, compute

    def __call__(self, ids: Array, key: Array | None = None) -> Array:
        """ids int (b, s) -> (b, s, d), after the last norm; padding needs no mask, since it follows the text.

        No dropout without a key.
        """
        return self.norm(self._after(self.blocks, ids, key))

    def before(self, ids: Array) -> Array:
        """ids int (b, s) -> (b, s, d), the input of the last block."""
        return self._after(jax.tree.map(lambda w: w[:-1], self.blocks), ids)

    def _after(self, blocks: Block, ids: Array, key: Array | None = None) -> Array:
        x = shard(self.words(ids) + self.positions[: ids.shape[1]], "batch", "length", None)
        x = x.astype(self.compute.dtype)
        return scan_stack(blocks, x, mask=Causal(), key=key, remat=self.compute.remat)

    def embed(self, ids: Array, mask: Array | None = None, key: Array | None = None) -> Array:
        """ids int (b, s), and the mask bool (b, s) of those that are no padding -> embeddings (b, k), not normalised.

        Only a tower whose output is that of the `last` token needs the mask.
        """
        return self.summarise(self(ids, key), ids, mask)

    @typed
    def summarise(
        self, x: Float[Array, "b s d"], ids: Int[Array, "b s"], mask: Bool[Array, "b s"] | None = None
    ) -> Float[Array, "b k"]:
        """The embeddings (b, k) in fp32, not normalised, of captions whose tokens are x (b, s, d)."""
        if not self.last:
            at = jnp.argmax(ids if self.end is None else ids == self.end, -1)
        elif mask is None:
            raise ValueError("CLIPTowers.last: the mask of the captions is needed")
        else:
            at = jnp.maximum(mask.sum(1) - 1, 0)
        if self.out is None:
            raise ConfigError("a text tower without a projection gives no embedding of a caption")
        return at_least_fp32(self.out(jnp.take_along_axis(x, at[:, None, None], 1)[:, 0]))


class ImageTower(nnx.Module):
    """A vision Transformer (Dosovitskiy et al. 2021), whose first token represents the image."""

    def __init__(self, config: CLIPTowers, key: Array, compute: Compute = Compute()):
        keys = jax.random.split(key, 5)
        d, grid, times = config.image.width, config.size // config.patch, (config.times,) * (config.times > 0)
        stride = {"kernel": config.patch, "stride": config.patch, "padding": "VALID", "bias": False}
        self.patches = Conv(config.channels, d, keys[0], **stride)
        self.first = param(normal(keys[1], (*times, d), d**-0.5), *(None,) * len(times), "embed")
        self.positions = position_table(normal(keys[2], (grid**2 + 1, d), d**-0.5), (grid, grid), prefix=1)
        self.before = LayerNorm(d, config.image.eps)
        self.blocks = _as_published(stack(config.image, keys[3], compute.attention), config.image)
        self.norm = LayerNorm(d, config.image.eps)
        self.out = Linear(d, config.dim, keys[4], bias=False, std=d**-0.5, axes=("embed", None))
        self.timed, self.compute = config.times > 0, compute

    def __call__(self, x: Array, t: Array | None = None, key: Array | None = None) -> Array:
        """Images (b, i, j, c) with standardised colours -> (b, 1 + patches, d), before the last norm.

        t: noise levels (b,) of a tower with `times`. No dropout without a key. Errors: ValueError without t, where it
        is needed.
        """
        return scan_stack(self.blocks, self._tokens(x, t), key=key, remat=self.compute.remat)

    def _tokens(self, x: Array, t: Array | None) -> Array:
        """Images, at noise levels, as the input of the first block: (b, 1 + patches, d)."""
        x = rearrange(self.patches(x), "b i j d -> b (i j) d")
        first = self.first[...]
        if self.timed:
            if t is None:
                raise ValueError("CLIPTowers.times: the noise levels of the images are needed")
            first = first[jnp.asarray(t, jnp.int32)][:, None]
        first = jnp.broadcast_to(first, (x.shape[0], 1, x.shape[2])).astype(x.dtype)
        x = jnp.concatenate([first, x], 1) + self.positions[...]
        return shard(self.before(x), "batch", "length", None).astype(self.compute.dtype)

    @typed
    def embed(
        self, x: Float[Array, "b i j c"], t: Num[Array, " b"] | None = None, key: Array | None = None
    ) -> Float[Array, "b k"]:
        """Images (b, i, j, c) -> embeddings (b, k) in fp32, not normalised; arguments as of the tower."""
        return self._summarise(self(x, t, key))

    @typed
    def embed_with_map(
        self, x: Float[Array, "b i j c"], t: Num[Array, " b"] | None = None
    ) -> tuple[Float[Array, "b k"], Float[Array, "b p d"]]:
        """The embeddings of images, and their feature maps (b, patches, d) in fp32, without dropout.

        A map is the input of the last block. Behind it only the first token is read, so that training moves no patch.
        """
        before, last = jax.tree.map(lambda w: w[:-1], self.blocks), jax.tree.map(lambda w: w[-1:], self.blocks)
        x = scan_stack(before, self._tokens(x, t), remat=self.compute.remat)
        return self._summarise(scan_stack(last, x, remat=self.compute.remat)), at_least_fp32(x[:, 1:])

    def _summarise(self, x: Array) -> Array:
        """The embeddings (b, k) of the tokens (b, 1 + patches, d) behind the last block."""
        return at_least_fp32(self.out(self.norm(x[:, 0])))


class CLIPNetwork(nnx.Module):
    """Both towers, the logarithm of the scale of cosines, and what is added to them.

    scale: at first; None: it is no parameter. bias: at first (Zhai et al. 2023, SigLIP); None: there is none.
    """

    def __init__(
        self,
        config: CLIPTowers,
        key: Array,
        compute: Compute = Compute(),
        scale: float | None = 1 / 0.07,
        bias: float | None = None,
    ):
        keys = jax.random.split(key)
        self.config = config
        self.text, self.image = TextTower(config, keys[0], compute), ImageTower(config, keys[1], compute)
        self.logit_scale = None if scale is None else param(jnp.asarray(math.log(scale), jnp.float32))
        self.logit_bias = None if bias is None else param(jnp.asarray(bias, jnp.float32))

    def logits(self, images: Array, ids: Array) -> Array:
        """Images (b, i, j, c), ids int (n, s) -> scaled cosines (b, n) (Radford et al. 2021, figure 3)."""
        scale = 1.0 if self.logit_scale is None else jnp.exp(self.logit_scale[...])
        return scale * unit(self.image.embed(images)) @ unit(self.text.embed(ids)).T

    @typed
    def texts(self, text: Int[Array, "b s"], mask: Bool[Array, "b s"], key: Array | None = None) -> Float[Array, "b k"]:
        """Captions, ids and mask (b, s) -> unit vectors (b, k) in fp32."""
        return unit(self.text.embed(text, mask, key))

    @typed
    def images(
        self, x: Float[Array, "b i j c"], t: Num[Array, " b"] | None = None, key: Array | None = None
    ) -> Float[Array, "b k"]:
        """Images (b, i, j, c), in [-1, 1] when clean, at noise levels t (b,) -> unit vectors (b, k) in fp32."""
        return unit(self.image.embed(standardised(x), t, key))

    @typed
    def images_with_maps(
        self, x: Float[Array, "b i j c"], t: Num[Array, " b"] | None = None
    ) -> tuple[Float[Array, "b k"], Float[Array, "b p d"]]:
        """`images`, and the feature maps of `ImageTower.embed_with_map`."""
        embedding, patches = self.image.embed_with_map(standardised(x), t)
        return unit(embedding), patches


@typed
def standardised(x: Float[Array, "b i j c"]) -> Float[Array, "b i j c"]:
    """Images in [-1, 1] with the colours that towers read."""
    return (x / 2 + 0.5 - MEAN) / STD


def _as_published(blocks: Block, config: Transformer) -> Block:
    """New blocks with weights of the published variances: d^-1 into attention, (2 d)^-1 into the MLP, and out of both
    d^-1 over twice the depth."""
    d = config.width
    out = (2 * d * config.depth) ** -0.5
    mlp, attention = blocks.mlp, blocks.attention
    assert isinstance(attention, Attention)
    for linear, std in ((attention.qkv, d**-0.5), (attention.out, out), (mlp.into, (2 * d) ** -0.5), (mlp.out, out)):
        linear.w = param(linear.w[...] * (std / 0.02), *linear.w.axes)
    return blocks
