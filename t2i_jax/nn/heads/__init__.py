"""Heads: from what a network says of a position, z, to a distribution of its code, p(x | z).

A head is a frozen dataclass with

    init(key, width) -> module
    entrance(key, width) -> module               codes (..., ) or (..., k) -> (..., d), for the network's input
    empty(b, t) -> codes                         of positions that are not known yet
    loss(module, z, x, key, train) -> (b, t)     what each position costs, fp32; train is static
    sample(module, z, null, draws, guidance, options) -> codes, score

`sample` takes z (b, m, d), that of the unconditional branch or None, `draws` with a row for each of the m positions, a
guidance scale (b,), and traced options of `nn.draw`. Its score (b, m) is log p(x | z) where the head knows it, else
None. Every head works with every order; an order that goes by confidence needs a score.
"""

from t2i_jax.core.specs import CodeSpec, SampleSpec
from t2i_jax.nn.heads.diffusion import Diffusion
from t2i_jax.nn.heads.draws import Draws, ImageKeys
from t2i_jax.nn.heads.flow import Flow
from t2i_jax.nn.heads.mixture import Mixture
from t2i_jax.nn.heads.softmax import Softmax

Head = Softmax | Diffusion | Flow | Mixture

__all__ = ["Diffusion", "Draws", "Flow", "Head", "ImageKeys", "Mixture", "Softmax", "sample_spec"]


def sample_spec(head: Head, grid: tuple[int, int], patch: int) -> SampleSpec:
    """The codes of an image for a grid of tokens, each a square of `patch` x `patch` codes."""
    if isinstance(head, Softmax):
        code = CodeSpec("int32", sizes=(head.vocabulary,))
    else:
        code = CodeSpec("float32", (head.dim // patch**2,))
    return SampleSpec((grid[0] * patch, grid[1] * patch), code, patch)
