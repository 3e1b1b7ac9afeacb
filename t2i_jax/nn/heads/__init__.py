"""Heads: from what a network says of a position, z, to a distribution of its code, p(x | z); see `TokenHead`."""

from t2i_jax.core.specs import SampleSpec
from t2i_jax.nn.heads.diffusion import Diffusion
from t2i_jax.nn.heads.draws import Draws, ImageKeys
from t2i_jax.nn.heads.flow import Flow
from t2i_jax.nn.heads.head import TokenHead
from t2i_jax.nn.heads.mixture import Mixture
from t2i_jax.nn.heads.softmax import Softmax

Head = Softmax | Diffusion | Flow | Mixture
"""What a config may hold; `TokenHead` is what models ask of it."""

__all__ = ["Diffusion", "Draws", "Flow", "Head", "ImageKeys", "Mixture", "Softmax", "TokenHead", "sample_spec"]


def sample_spec(head: TokenHead, grid: tuple[int, int], patch: int) -> SampleSpec:
    """The codes of an image for a grid of tokens, each a square of `patch` x `patch` codes.

    Errors: `ConfigError` where a code of the head is not made of so many.
    """
    return SampleSpec((grid[0] * patch, grid[1] * patch), head.code.of_position(patch), patch)
