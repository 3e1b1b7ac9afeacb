"""The other task of CogLM (Ding et al. 2022, arXiv:2204.14217, 3.1): a caption after its image, and codes in patches.

The image comes first: its codes outside of random patches are seen by all tokens, those inside by later ones inside
alone. The caption, after a start token, sees the whole image and the tokens before. Predicted are the caption, and the
codes of a patch but for its first column, each from the token on its left.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from t2i_jax.core.arrays import Bool, Float, Int, typed
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import Checked, Count, Share, Size


class Patches(NamedTuple):
    """Patches of images."""

    inside: Bool[Array, "b l"]
    """codes in a patch"""
    predicts: Bool[Array, "b l"]
    """codes in a patch, but for the last column of each: the code on the right is predicted from them"""


@dataclasses.dataclass(frozen=True)
class Understanding(Checked):
    """How often, and for which part of an image."""

    start: Count
    """id of the token before the caption"""
    share: Share = 0.3
    """of the examples of a batch"""
    patch: Size = 4
    """side of a patch, in codes"""
    area: Share = 0.8
    """area of all patches, which may overlap, over that of the image"""

    def corners(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns in which patches may begin; as in the published program none has the last row or column.

        Errors: `ConfigError` for images that are not larger than a patch.
        """
        rows, columns = (n - self.patch for n in grid)
        if min(rows, columns) < 1:
            raise ConfigError(f"Understanding.patch {self.patch}: less than the rows and columns of grid {grid}")
        return rows, columns

    @typed
    def draw(self, key: Array, b: int, grid: tuple[int, int]) -> Patches:
        """Patches of b images, with corners drawn without replacement."""
        rows, columns = self.corners(grid)
        count = min(int(self.area * grid[0] * grid[1] / self.patch**2), rows * columns)
        chosen = jnp.argsort(jax.random.uniform(key, (b, rows * columns)), 1)[:, :count]
        down, right = (
            jnp.arange(grid[n])[None, None] - corner[:, :, None] for n, corner in enumerate(jnp.divmod(chosen, columns))
        )
        within = lambda n, size: (n >= 0) & (n < size)
        area = lambda width: jnp.any(within(down, self.patch)[..., None] & within(right, width)[:, :, None], 1)
        return Patches(*(area(width).reshape(b, -1) for width in (self.patch, self.patch - 1)))


@typed
def sees(inside: Bool[Array, "b l"], text: int) -> Bool[Array, "b 1 t t"]:
    """What tokens see: `text` of a caption with its start token, which come first here, and codes, `inside` of patches
    or not."""
    place = jnp.arange(text + inside.shape[1])
    before, is_text = place[:, None] >= place, place < text
    within = jnp.pad(inside, ((0, 0), (text, 0)))
    of_text = (before & is_text) | ~is_text
    of_code = ~is_text & (~within[:, None] | (within[:, :, None] & before))
    return jnp.where(is_text[:, None], of_text, of_code)[:, None]


@typed
def targets(text: Int[Array, "b s"], codes: Int[Array, "b l"], vocabulary: int) -> Int[Array, "b n"]:
    """What each of s + 1 tokens before the codes, and of the codes, predicts in either task, codes first: the caption,
    then the codes, and at last nothing."""
    return jnp.concatenate([text + vocabulary, codes, jnp.zeros_like(codes[:, :1])], 1)


@typed
def weights(other: Bool[Array, " b"], real: Bool[Array, "b s"], patches: Patches) -> Float[Array, "b n"]:
    """Which of them count, 0 or 1: all codes, or for `other` rows `real` text and the codes of `patches`."""
    (b, s), length = real.shape, patches.inside.shape[1]
    generated = (jnp.arange(s + 1 + length) >= s) & (jnp.arange(s + 1 + length) < s + length)
    understood = jnp.concatenate([real, jnp.zeros((b, 1), bool), patches.predicts], 1)
    return jnp.where(other[:, None], understood, generated).astype(jnp.float32)
