"""The diffusion prior of unCLIP: a causal Transformer that predicts an image's embedding (Ramesh et al. 2022)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Float, Num, typed
from t2i_jax.core.conditions import Batch
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import Checked, Size
from t2i_jax.core.params import Named
from t2i_jax.core.sharding import shard
from t2i_jax.core.types import Compute, Remat
from t2i_jax.networks.condition import Conditioning, Context, check_vectors, read_context
from t2i_jax.networks.unclip import CaptionAndTokens
from t2i_jax.nn.attention import Causal
from t2i_jax.nn.layers import Linear, normal, param, position_table
from t2i_jax.nn.modulation import TimeEmbedding
from t2i_jax.nn.transformer import REMATS, Transformer, scan_stack, stack


@dataclasses.dataclass(frozen=True)
class EmbeddingPrior(Checked):
    """A Transformer over the caption, the time and a noised embedding, which is an image of one position. The output at
    a last, learned token is the prediction."""

    channels: Size = 768
    """Size of the embedding."""
    transformer: Transformer = Transformer(2048, 20, 32, norm="layer", activation="gelu", bias=True)
    conditioning: Conditioning = Conditioning(CaptionAndTokens())
    """Its only route is the default: the first tokens of the sequence."""
    final_norm: bool = True

    size: ClassVar[tuple[int, int]] = (1, 1)
    extra_inputs: ClassVar[tuple[str, ...]] = ()
    upscaling: ClassVar[Literal["linear", "cubic"]] = "linear"
    low_res_channels: ClassVar[int] = 0
    noise_levels: ClassVar[int] = 0
    neighbours: ClassVar[None] = None
    learn_variance: ClassVar[bool] = False
    any_size: ClassVar[bool] = False
    remats: ClassVar[tuple[Remat, ...]] = REMATS
    chooses_attention: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        self.conditioning.route("EmbeddingPrior", "prefix")
        check_vectors(self.conditioning.what, self.transformer.width)

    def sized(self, size: tuple[int, int]) -> EmbeddingPrior:
        """Itself: an embedding has one position. Errors: `ConfigError` for another size."""
        if size != self.size:
            raise ConfigError(f"size {size[0]}x{size[1]}: an embedding has one position")
        return self

    def of_grid(self) -> Named:
        """Variables that are computed from the grid: none."""
        return {}

    def init(self, key: Array, compute: Compute = Compute()) -> EmbeddingPriorNetwork:
        return EmbeddingPriorNetwork(self, key, compute)


class EmbeddingPriorNetwork(nnx.Module):
    """The parameters of an `EmbeddingPrior`."""

    def __init__(self, config: EmbeddingPrior, key: Array, compute: Compute):
        keys = jax.random.split(key, 7)
        d, k, what = config.transformer.width, config.channels, config.conditioning.what
        self.config, self.compute = config, compute
        self.condition = what.init(keys[0], d)
        self.time = TimeEmbedding(d, keys[1], frequency_dim=d)
        self.embed = Linear(k, d, keys[2], axes=(None, "embed"))
        self.last = param(normal(keys[3], (d,)), "embed")
        self.positions = position_table(normal(keys[4], (what.length + 3, d), 0.01))
        self.blocks = stack(config.transformer, keys[5], compute.attention)
        self.norm = config.transformer.normalise() if config.final_norm else None
        self.out = Linear(d, k, keys[6], axes=("embed", None))

    def read(self, batch: Batch, drop: Array) -> Context:
        """Encode the condition of a batch: `drop` (b,) marks rows that get the unconditional one."""
        return read_context(self.config.conditioning.what, self.condition, batch, drop, self.compute.dtype)

    @typed
    def __call__(
        self, x: Float[Array, "b 1 1 c"], t: Num[Array, " b"], context: Context, key: Array | None = None
    ) -> Float[Array, "b 1 1 c"]:
        """A noised embedding x (b, 1, 1, c) at times t (b,) -> (b, 1, 1, c) fp32; key: for dropout."""
        dtype = self.compute.dtype
        own = self.embed(rearrange(x, "b 1 1 c -> b c").astype(dtype))
        last = repeat(self.last[...].astype(dtype), "d -> b d", b=len(x))
        own = jnp.stack([self.time(t).astype(dtype), own, last], 1)
        y = jnp.concatenate([context.tokens.astype(dtype), own], 1) + self.positions[...].astype(dtype)
        valid = jnp.pad(context.mask, ((0, 0), (0, own.shape[1])), constant_values=True)
        mask = Causal(valid, prefix=context.mask.shape[1])
        y = scan_stack(self.blocks, shard(y, "batch", "length", None), mask=mask, key=key, remat=self.compute.remat)[
            :, -1
        ]
        y = self.out(y if self.norm is None else self.norm(y))
        return rearrange(y, "b c -> b 1 1 c").astype(jnp.float32)
