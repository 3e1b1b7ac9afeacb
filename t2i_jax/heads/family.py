"""Families whose head samples each token of a grid, in any order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.conditions import Batch
from t2i_jax.core.family import BaseFamily
from t2i_jax.core.fields import Grid, Size
from t2i_jax.core.specs import BatchSpec, SampleSpec
from t2i_jax.core.types import Capabilities
from t2i_jax.heads.draws import ImageKeys
from t2i_jax.heads.head import TokenHead
from t2i_jax.networks.condition import Conditioning, check_vectors
from t2i_jax.nn.tokens import from_tokens, to_tokens
from t2i_jax.nn.transformer import REMATS, Transformer
from t2i_jax.sampling.guidance import Branches, is_guided
from t2i_jax.sampling.inpainting import known_and_keep
from t2i_jax.sampling.options import ARSampler
from t2i_jax.sampling.orders import Order, orders_of
from t2i_jax.sampling.progress import Progress

A = TypeVar("A", bound=ARSampler)


class HeadFamily(BaseFamily[A]):
    """The members of a family whose head samples each token of a grid, in the order of the config."""

    grid: Grid
    """rows and columns of tokens"""
    patch: Size
    """side of the square of codes that makes up a token"""
    head: TokenHead
    order: Order
    transformer: Transformer
    conditioning: Conditioning
    draw: Callable[..., Array]
    """(model, condition, x, keep, orders, draws, options, both, progress) -> tokens (b, L, *code): those of x where
    `keep` bool (b, L), the others sampled; traced. both: the `Branches`; the rest as in `sample`"""

    def __post_init__(self):
        super().__post_init__()
        _ = self.sample_spec()  # rejects a patch that no token can be made of
        self.conditioning.route(type(self).__name__, *self.routes)
        check_vectors(self.conditioning.what, self.transformer.width)

    @property
    def routes(self) -> tuple[str, ...]:
        """How the network may read the condition (`Conditioning.via`), the default first."""
        return ("prefix",)

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        return Capabilities(
            family=True,
            unconditional=self.conditioning.dropout > 0,
            guidance=True,
            inpaint=True,
            negative=True,
            super_resolution=self.reads_low_codes,
            token_head=True,
            remat=REMATS,
            attention=True,
        )

    def sample_spec(self) -> SampleSpec:
        """Shape and dtype of a sample. Errors: `ConfigError` if a token of the head cannot be split into codes."""
        rows, columns = self.grid
        return SampleSpec((rows * self.patch, columns * self.patch), self.head.code.of_position(self.patch), self.patch)

    def condition_spec(self) -> BatchSpec:
        """Batch fields that `sample` reads."""
        return self.conditioning.what.batch_spec()

    def sample(
        self,
        model: nnx.Module,
        condition: Batch,
        keys: Array,
        options: ARSampler | None = None,
        *,
        known: Array | None = None,
        keep: Array | None = None,
        guided: bool | None = None,
        negative: Batch | None = None,
        orders: Array | None = None,
        draws: ImageKeys | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Codes int32 (b, h, w) or float (b, h, w, k), one image per row of the condition and per key of `keys` (b,).

        An image depends only on its own key and condition, not on its batch. Guidance runs both branches as one batch
        of 2b. All options are traced: new values do not recompile, nor do other numbers of steps.

        known, keep: codes, and a bool (b, rows, columns) of tokens to copy from them, for inpainting or outpainting. A
            causal model in raster order sees only those that come before; else known tokens are read first.
        guided: False skips the unconditional branch, whatever the options say, which halves the cost. None skips it if
            `conditioning.dropout` is 0, since no unconditional branch was trained.
        negative: a condition to guide away from, in the place of the unconditional branch.
        orders: int (b, L), each a permutation read from its end; replaces those that `order` samples.
        draws: source of the head's random numbers; replaces `heads.ImageKeys`.
        progress: its listener is called with (steps done, all steps, codes).
        """
        known, keep = known_and_keep(self.capabilities, self.sample_spec(), len(keys), known, keep)
        options, guided = (options or self.options()).arrays(), is_guided(self.capabilities, guided, negative)
        return _sample(self, model, condition, keys, known, keep, negative, orders, draws, options, guided, progress)


@partial(jax.jit, static_argnames=("config", "guided"))
def _sample(
    config: HeadFamily,
    model: nnx.Module,
    condition: Batch,
    keys: Array,
    known: Array,
    keep: Array,
    negative: Batch | None,
    orders: Array | None,
    draws: ImageKeys | None,
    options: ARSampler,
    guided: bool,
    progress: Progress | None,
) -> Array:
    own = jax.vmap(jax.random.split)(keys)
    orders = orders_of(config.order, own[:, 0], config.length) if orders is None else orders
    draws = ImageKeys(own[:, 1]) if draws is None else draws
    x, keep = to_tokens(known, config.patch), rearrange(keep, "b h w -> b (h w)")
    x = config.draw(model, condition, x, keep, orders, draws, options, Branches(guided, negative), progress)
    return from_tokens(x, config.grid, config.patch)
