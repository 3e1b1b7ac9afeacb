"""Heads: the distribution p(x | z) of a token's code, given the network's output z at its position; see `TokenHead`."""

from t2i_jax.core.specs import SampleSpec
from t2i_jax.heads.diffusion import DiffusionHead
from t2i_jax.heads.draws import ImageKeys, PositionKeys
from t2i_jax.heads.flow import FlowHead
from t2i_jax.heads.head import TokenHead
from t2i_jax.heads.mixture import MixtureHead
from t2i_jax.heads.softmax import SoftmaxHead

__all__ = [
    "DiffusionHead",
    "FlowHead",
    "ImageKeys",
    "MixtureHead",
    "PositionKeys",
    "SoftmaxHead",
    "TokenHead",
    "sample_spec",
]


def sample_spec(head: TokenHead, grid: tuple[int, int], patch: int) -> SampleSpec:
    """The codes of an image for a grid of tokens, each a square of `patch` x `patch` codes.

    Errors: `ConfigError` if a token of the head cannot be split into that many codes.
    """
    return SampleSpec((grid[0] * patch, grid[1] * patch), head.code.of_position(patch), patch)
