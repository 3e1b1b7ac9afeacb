"""A Transformer of image tokens that see their neighbours alone, and text and the tokens of a smaller image.

CogView2's super-resolution (Ding et al. 2022, arXiv:2204.14217): the sequence is [text][coarse tokens][fine tokens].
Text and coarse tokens have ordinary attention among themselves. A fine token sees a window of fine tokens around it
and, in the same softmax, either a window of coarse tokens around its place or the text. The tokens of a row of the
image see the same rows of keys, so that attention is a matrix product for each row, masked to the window's columns.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Bool, Float, Int, typed
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import Checked, Count, Range, Size
from t2i_jax.core.sharding import shard
from t2i_jax.core.types import Compute
from t2i_jax.nn.attention import MaskSpec, Rotary, attend
from t2i_jax.nn.layers import Embedding, matmul, normal, position_table, transposed
from t2i_jax.nn.transformer import Attention, Cache, Transformer, drop, scale_residuals, scan_stack, stack


@dataclasses.dataclass(frozen=True)
class LocalTransformer(Checked):
    """The blocks of such a network, and what its fine tokens see. The defaults are small ones of CogView2's kind."""

    transformer: Transformer = Transformer(
        256, 6, 4, norm="layer", activation="gelu_tanh", bias=True, sandwich_norm=True
    )
    sees: Literal["coarse", "text"] = "coarse"
    """what a fine token sees besides fine ones: a window of the coarse ones, or all text; with "text" there are no
    coarse tokens"""
    text: Size = 96
    """leading tokens of the caption that are read"""
    window: Annotated[int, Range(1, 1023)] = 5
    """columns of the window of fine tokens, which has 2 window - 1 rows, and sides of that of coarse ones; odd"""
    hidden: Count = 0
    """id, among those of text, of the token that replaces a hidden code; that of padding, which no token sees, is
    free"""
    own_attention: bool = False
    """fine tokens have queries, keys, values and an output matrix of their own"""
    places: Count = 0
    """rows of the table of positions of text and coarse tokens; 0: as many as tokens"""
    coarse_place: Count = 0
    """row of the first coarse token; 0: after the text"""

    def __post_init__(self):
        super().__post_init__()
        if self.window % 2 == 0:
            raise ConfigError(f"LocalTransformer.window {self.window}: an odd number, as it is around a token")
        fields = ("post_norm", "qk_norm", "rope_values", "layer_scale", "pb_relax")
        self.transformer.check_plain("LocalTransformer", *fields)

    def init(
        self, key: Array, words: int, codes: int, coarse: tuple[int, int], fine: tuple[int, int], compute: Compute
    ) -> LocalNetwork:
        """A network of `words` ids of text and `codes` of images, on grids of coarse and fine tokens.

        Errors: `ConfigError` for a table of positions that is too short.
        """
        return LocalNetwork(self, key, words, codes, coarse, fine, compute)


def neighbours(grid: tuple[int, int], other: tuple[int, int], window: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """For the tokens of a grid (h, w), a window of tokens of another one (i, j) around the same place of the image.

    Returns the rows that the tokens of each row see some of, int (h, m), and which of all tokens in these rows each
    token sees, bool (h, w, m j). h and w are multiples of i and j; window: rows and columns m, n, odd.
    """
    (h, w), (i, j), (m, n) = grid, other, window
    rows = np.arange(h)[:, None] // (h // i) + np.arange(m) - m // 2
    near = np.abs(np.arange(j) - np.arange(w)[:, None] // (w // j)) <= n // 2
    inside = (rows >= 0) & (rows < i)
    seen = inside[:, None, :, None] & near[None, :, None]
    return np.clip(rows, 0, i - 1), seen.reshape(h, w, m * j)


class LocalAttention(Attention):
    """Attention among the first tokens, and that of the fine ones after them."""

    def __init__(self, config: LocalTransformer, coarse: tuple[int, int] | None, fine: tuple[int, int], key: Array):
        keys = jax.random.split(key)
        super().__init__(config.transformer, keys[0])
        self.fine = Attention(config.transformer, keys[1]) if config.own_attention else None
        self.coarse_grid, self.grid, self.window = coarse, fine, config.window

    def __call__(
        self,
        x: Float[Array, "b t d"],
        rotary: Rotary | None = None,
        mask: Bool[Array, "_ _ _ s"] | MaskSpec | None = None,
        cache: Cache | None = None,
        bias: Float[Array, "_ n t s"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        """mask: bool (b, 1, s or 1, s) among the first tokens; without coarse tokens, also what fine ones see."""
        assert rotary is None and cache is None and bias is None and isinstance(mask, Array)
        (h, w), own = self.grid, self if self.fine is None else self.fine
        s, b = x.shape[1] - h * w, len(x)
        pinned = lambda parts: [shard(a, "batch", None, "heads", None) for a in parts]
        q, k, v = pinned(self.read(x[:, :s]))
        first = attend(q, k, v, mask, self.scale)

        by_row = lambda a: rearrange(a, "b (i j) n h -> b i j n h", j=w)
        queries, keys, values = map(by_row, own.read(x[:, s:]))
        near = self.rows(keys, values, self.grid, (2 * self.window - 1, self.window))
        if self.coarse_grid is None:
            every = lambda a: jnp.broadcast_to(a[:, None], (b, h, *a.shape[1:]))
            others = every(k), every(v), jnp.broadcast_to(mask, (b, h, w, s))
        else:
            i, j = self.coarse_grid
            k, v = (rearrange(a[:, s - i * j :], "b (i j) n h -> b i j n h", j=j) for a in (k, v))
            others = self.rows(k, v, self.coarse_grid, (self.window, self.window))
        k, v = (jnp.concatenate(pair, 2) for pair in zip(others[:2], near[:2], strict=True))
        seen = jnp.concatenate([jnp.broadcast_to(m, (b, h, w, m.shape[-1])) for m in (others[2], near[2])], -1)
        q, k, v = pinned(rearrange(a, "b i s n h -> (b i) s n h") for a in (queries, k, v))
        y = attend(q, k, v, rearrange(seen, "b i j s -> (b i) 1 j s"), self.scale)
        flat = lambda a: rearrange(a, "b t n h -> b t (n h)")
        fine = own.out(flat(rearrange(y, "(b i) j n h -> b (i j) n h", b=b)))
        return jnp.concatenate([self.out(flat(first)), fine], 1), None

    def rows(self, k: Array, v: Array, grid: tuple[int, int], window: tuple[int, int]) -> tuple[Array, Array, Array]:
        """Keys and values (b, i, j, n, h) of a grid that each row of fine tokens sees, (b, h, m j, n, h), and the mask
        (h, w, m j) of those that each token sees."""
        rows, seen = neighbours(self.grid, grid, window)
        take = lambda a: rearrange(a[:, rows], "b i m j n h -> b i (m j) n h")
        return take(k), take(v), jnp.asarray(seen)


class LocalNetwork(nnx.Module):
    """The Transformer of a `LocalTransformer`, from text, coarse and fine codes to the logits of fine ones."""

    def __init__(
        self,
        config: LocalTransformer,
        key: Array,
        words: int,
        codes: int,
        coarse: tuple[int, int],
        fine: tuple[int, int],
        compute: Compute,
    ):
        keys, shape = jax.random.split(key, 6), config.transformer
        self.config, self.compute = config, compute
        d, self.coarse = shape.width, coarse if config.sees == "coarse" else None
        self.first = config.coarse_place or config.text
        count = self.first + coarse[0] * coarse[1] if self.coarse else config.text
        if 0 < config.places < count or self.first < config.text:
            raise ConfigError(f"LocalTransformer.places {config.places}: {count} are needed, the first for the text")
        maps = () if self.coarse is None else (coarse,)
        self.text_tokens, self.image_tokens = Embedding(words, d, keys[0]), Embedding(codes, d, keys[1])
        if config.hidden >= words:
            raise ConfigError(f"LocalTransformer.hidden {config.hidden}: one of the {words} ids of text")
        self.places = position_table(normal(keys[2], (config.places or count, d)), *maps, prefix=self.first)
        self.fine_places = position_table(normal(keys[3], (fine[0] * fine[1], d)), fine)
        self.blocks = stack(shape, keys[4])
        layers = jax.random.split(keys[5], shape.depth)
        self.blocks.attention = jax.vmap(lambda key: LocalAttention(config, self.coarse, fine, key))(layers)
        scale_residuals(self.blocks)
        self.norm = shape.normalise()

    @typed
    def __call__(
        self,
        text: Int[Array, "b s"],
        real: Bool[Array, "b s"],
        coarse: Int[Array, "b _ _"],
        fine: Int[Array, "b h w"],
        hidden: Bool[Array, "b h w"],
        key: Array | None = None,
    ) -> Float[Array, "b h*w d"]:
        """z (b, h w, d) of the fine codes, for `logits`: each position predicts its own code.

        text: ids (b, s), of which `real` are no padding; coarse: codes (b, i, j), unused by a network that sees text.
        fine: codes (b, h, w), read where they are not `hidden`. key: for dropout.
        """
        config, keys = self.config, (None, None) if key is None else jax.random.split(key)
        text, real = text[:, : config.text], real[:, : config.text]
        first = self.text_tokens(text) + self.places[: text.shape[1]]
        if self.coarse:
            small = rearrange(coarse, "b i j -> b (i j)")
            places = self.places[self.first : self.first + small.shape[1]]
            first = jnp.concatenate([first, self.image_tokens(small) + places], 1)
        flat = lambda a: rearrange(a, "b h w -> b (h w)")
        hidden_token = self.text_tokens(jnp.asarray([config.hidden]))
        large = jnp.where(flat(hidden)[..., None], hidden_token, self.image_tokens(flat(fine)))
        x = jnp.concatenate([first, large + self.fine_places[...]], 1).astype(self.compute.dtype)
        x = scan_stack(
            self.blocks,
            shard(drop(x, config.transformer.dropout, keys[0]), "batch", "length", None),
            mask=self.mask(real),
            key=keys[1],
            remat=self.compute.remat,
        )
        return x[:, first.shape[1] :]

    @typed
    def mask(self, real: Bool[Array, "b s"]) -> Bool[Array, "b 1 _ _"]:
        """What the first tokens see, (b, 1, s + i j, s + i j), or (b, 1, 1, s) if they are all text.

        Text sees text that is no padding, and coarse tokens that and each other.
        """
        if not self.coarse:
            return real[:, None, None]
        s, n = real.shape[1], self.coarse[0] * self.coarse[1]
        is_text = jnp.arange(s + n) < s
        text = jnp.pad(real, ((0, 0), (0, n)))[:, None]
        padding = jnp.pad(~real, ((0, 0), (0, n)))[:, :, None]  # which sees all text, as it has to see something
        return (text | (padding & is_text) | ~(is_text | is_text[:, None]))[:, None]

    @typed
    def logits(self, z: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """(..., d) -> (..., v) fp32."""
        return matmul(self.norm(z), transposed(self.image_tokens.w), jnp.float32)
