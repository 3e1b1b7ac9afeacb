"""A grid of codes as a sequence of tokens, and back."""

from einops import rearrange
from jax import Array

from t2i_jax.core.arrays import Shaped, typed


@typed
def to_tokens(codes: Shaped[Array, "b i j *k"], patch: int = 1) -> Shaped[Array, "b t *m"]:
    """Codes (b, i, j) -> (b, t), or (b, i, j, k) -> (b, t, k p p) with squares of `patch` a side as tokens.

    Within a token channels come first, then rows, then columns, as in MAR. Errors: ValueError if `patch` does not
    divide the sides.
    """
    if codes.ndim == 3:
        return rearrange(codes, "b h w -> b (h w)")
    if codes.shape[1] % patch or codes.shape[2] % patch:
        raise ValueError(f"codes of {codes.shape[1:3]}: patch {patch} does not divide both sides")
    return rearrange(codes, "b (h p) (w q) k -> b (h w) (k p q)", p=patch, q=patch)


@typed
def from_tokens(tokens: Shaped[Array, "b t *m"], grid: tuple[int, int], patch: int = 1) -> Shaped[Array, "b i j *k"]:
    """The inverse of `to_tokens`; `grid`: rows and columns of tokens."""
    if tokens.ndim == 2:
        return rearrange(tokens, "b (h w) -> b h w", h=grid[0])
    return rearrange(tokens, "b (h w) (k p q) -> b (h p) (w q) k", h=grid[0], p=patch, q=patch)
