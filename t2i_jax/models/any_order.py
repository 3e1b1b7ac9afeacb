"""Next-token prediction in any order, with any head: p(x | c) = prod_k p(x_o(k) | x_o(<k), c).

A causal Transformer reads the codes of an image in the order o in which they are generated. Each token carries its own
position and that of the token it predicts, so one network serves every permutation (Pang et al. 2024, RandAR; Yu et al.
2024, RAR). With raster order and the softmax head this is plain next-token prediction; with a diffusion head, the
causal rows of MAR's tables (Li et al. 2024, arXiv:2406.11838). Keys and values are cached.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Bool, Float, Int, Shaped, typed
from t2i_jax.core.conditions import Batch
from t2i_jax.core.fields import FREE, Grid, Size
from t2i_jax.core.sharding import shard
from t2i_jax.core.types import Capabilities, Compute, LossOutput
from t2i_jax.heads import HeadFamily, ImageKeys, SoftmaxHead, TokenHead
from t2i_jax.networks.condition import ClassEmbedder, Conditioning, dropped_rows
from t2i_jax.nn.attention import Causal
from t2i_jax.nn.decode import prepare_layers_for_decode
from t2i_jax.nn.layers import normal, position_table
from t2i_jax.nn.losses import row_mean
from t2i_jax.nn.stationary import lookup, weight_stationary
from t2i_jax.nn.tokens import from_tokens, to_tokens
from t2i_jax.nn.transformer import Block, Cache, Transformer, apply_layers, scan_stack, stack
from t2i_jax.sampling.guidance import Branches
from t2i_jax.sampling.options import ARSampler
from t2i_jax.sampling.orders import Permutation, Raster, orders_of, with_known_last
from t2i_jax.sampling.progress import Progress, known_so_far, report


@dataclasses.dataclass(frozen=True)
class AnyOrder(HeadFamily[ARSampler]):
    """A causal Transformer over the codes of an image in a given order, its head and its training settings."""

    grid: Grid = (8, 8)
    """Rows and columns of tokens."""
    patch: Size = 1
    """Side of the square of codes that makes up a token; more than 1 needs a head that models vectors."""
    head: TokenHead = SoftmaxHead()
    order: Raster | Permutation = Raster()  # pyright: ignore[reportIncompatibleVariableOverride]
    transformer: Transformer = Transformer(256, 6, 4, qk_norm=True, dropout=0.1)
    conditioning: Conditioning = Conditioning(ClassEmbedder(1000))
    """The class, a caption or features, as a prefix of the image."""
    compute: Compute = Compute()
    sampling: Annotated[ARSampler, FREE] = ARSampler()
    """Default options of `sample`."""

    def __post_init__(self):
        super().__post_init__()
        if not self.order.one_at_a_time:
            raise ValueError(
                f"order {type(self.order).__name__} asks for sets of tokens: a causal model gives one by one"
            )

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        return dataclasses.replace(super().capabilities, likelihood=self.head.knows_probability)

    def init(self, key: Array) -> AnyOrderNetwork:
        """A model with fresh parameters."""
        return AnyOrderNetwork(self, key)

    # -- training

    def loss(self, model: AnyOrderNetwork, batch: Batch, key: Array, train: bool = True) -> LossOutput:
        """Mean of -log p(x_o(k) | x_o(<k), c), or of the head's loss, over all positions; and metrics.

        batch: `codes` int (b, h, w) or float (b, h, w, k), the condition's fields, and optionally `weight` (b,), 0 for
        examples to ignore.
        """
        keys = jax.random.split(key, 4)
        b = len(batch["codes"])
        orders = orders_of(self.order, jax.random.split(keys[0], b), self.length)
        dropped = dropped_rows(keys[1], self.conditioning.dropout, b, train)
        z, x = model(batch, orders, dropped, keys[2] if train else None)
        loss = row_mean(self.head.loss(model.head, z, x, keys[3], train).mean(1), batch)
        return LossOutput(loss, {"loss": loss})

    @typed
    def log_likelihood(
        self, model: AnyOrderNetwork, batch: Batch, orders: Int[Array, "b t"] | None = None
    ) -> Float[Array, " b"]:
        """log p(codes | condition) of each image in nats, in the orders (b, L) (default: raster): (b,) fp32.

        Errors: ValueError if the head has no probability of a code.
        """
        if not self.head.knows_probability:
            raise ValueError(f"a {type(self.head).__name__} gives no probability of a code; SoftmaxHead does")
        b = len(batch["codes"])
        orders = orders_of(Raster(), jax.random.split(jax.random.key(0), b), self.length) if orders is None else orders
        z, x = model(batch, orders)
        return -self.head.loss(model.head, z, x, jax.random.key(0), train=False).sum(1)

    # -- sampling

    def draw(
        self,
        model: AnyOrderNetwork,
        condition: Batch,
        x: Array,
        keep: Array,
        orders: Array,
        draws: ImageKeys,
        options: ARSampler,
        both: Branches,
        progress: Progress | None,
    ) -> Array:
        """Tokens (b, L, *code): see `HeadFamily`. Each step feeds one token and samples the next one of the order."""
        b, length, model, rows = len(x), self.length, weight_stationary(model), both.rows
        places = jnp.flip(orders if self.order.fixed else with_known_last(orders, keep), 1)
        place = lambda k: jax.lax.dynamic_slice_in_dim(places, k, 1, 1)
        ranks = jnp.argsort(places, 1)
        z, state = model.prefill(*both.conditions(condition, b), rows(place(0)))

        def sampled(x: Array, z: Array, k: Array | int) -> Array:
            """Codes after sampling the k-th token of the order from z (b n, 1, d)."""
            at, (own, null) = place(k), both.split(z)
            scale = jnp.broadcast_to(options.guidance_at(k, length), (b,))
            drawn, _ = self.head.sample(model.head, own, null, draws.at(0, at), scale, options)
            kept, old = jnp.take_along_axis(keep, at, 1), _pick(x, at)
            new = jnp.where(kept.reshape(kept.shape + (1,) * (old.ndim - 2)), old, drawn.astype(x.dtype))
            return jax.vmap(lambda row, p, value: row.at[p].set(value))(x, at, new)

        def step(carry: tuple[Array, tuple[Cache, ...]], k: Array) -> tuple[tuple[Array, tuple[Cache, ...]], None]:
            x, caches = carry
            here = dataclasses.replace(state, caches=caches)
            z, after = model.decode(here, rows(_pick(x, place(k))), rows(place(k)), rows(place(k + 1)), k)
            x = sampled(x, z, k + 1)
            shown = known_so_far(x, ranks < k + 2)
            report(progress, k + 2, length, from_tokens(shown, self.grid, self.patch))
            return (x, after.caches), None

        x = sampled(x, z, 0)
        (x, _), _ = jax.lax.scan(step, (x, state.caches), jnp.arange(length - 1))
        return x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnyOrderDecodeState:
    """State of token-by-token decoding."""

    caches: tuple[Cache, ...]
    blocks: tuple[Block, ...]
    """One by one, in the layout that decodes fastest."""
    valid: Array
    """Which tokens of the condition, then of the image, are real (b, s + L - 1)."""


class AnyOrderNetwork(nnx.Module):
    """The causal Transformer of an `AnyOrder`, from codes in generation order to the inputs of the head."""

    def __init__(self, config: AnyOrder, key: Array):
        self.config, keys, d = config, jax.random.split(key, 6), config.transformer.width
        self.condition = config.conditioning.what.init(keys[0], d)
        self.entrance = config.head.entrance(keys[1], d)
        self.position = position_table(normal(keys[2], (config.length, d)), config.grid)
        self.target = position_table(normal(keys[3], (config.length, d)), config.grid)
        self.blocks = stack(config.transformer, keys[4], config.compute.attention)
        self.norm = config.transformer.normalise()
        self.head = config.head.init(keys[5], d)

    @typed
    def __call__(
        self,
        batch: Batch,
        orders: Int[Array, "b t"],
        dropped: Bool[Array, " b"] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "b t d"], Shaped[Array, "b t *k"]]:
        """z (b, L, d) of every token given the preceding ones, and the tokens, both in generation order.

        batch: `codes`, and the condition's fields. orders: int (b, L), each read from its end. dropped: bool (b,), rows
        without their condition. key: for dropout.
        """
        config, places = self.config, jnp.flip(orders, 1)
        x = _pick(to_tokens(batch["codes"], config.patch), places)
        dropped = jnp.zeros(len(orders), bool) if dropped is None else dropped
        prefix, valid = self.condition(batch, dropped, config.compute.dtype)
        y = jnp.concatenate([prefix, self.embed(x, places)[:, :-1]], 1)
        y = shard(self.add_targets(y, places), "batch", "length", None)
        padded = config.conditioning.what.spec.has_padding
        mask = Causal(self._with_image(valid), valid.shape[1]) if padded else Causal()
        y = scan_stack(self.blocks, y, mask=mask, key=key, remat=config.compute.remat)
        return self.norm(y[:, prefix.shape[1] - 1 :]), x

    @typed
    def embed(self, x: Shaped[Array, "b m *k"], places: Int[Array, "b m"]) -> Float[Array, "b m d"]:
        """Codes (b, m, *code) of tokens at positions (b, m) as inputs: (b, m, d)."""
        dtype = self.config.compute.dtype
        entered = self.entrance(x if self.config.head.code.is_discrete else x.astype(dtype))
        return (entered + lookup(self.position, places)).astype(dtype)

    @typed
    def add_targets(self, y: Float[Array, "b t d"], places: Int[Array, "b m"]) -> Float[Array, "b t d"]:
        """Add the target positions (b, m) to the last m tokens of y (b, t, d)."""
        target = jnp.pad(lookup(self.target, places), ((0, 0), (y.shape[1] - places.shape[1], 0), (0, 0)))
        return y + target.astype(y.dtype)

    def _with_image(self, valid: Array) -> Array:
        """Which tokens are real, of the condition (b, s) and of the sequence (b, s + L - 1)."""
        return jnp.pad(valid, ((0, 0), (0, self.config.length - 1)), constant_values=True)

    @typed
    def prefill(
        self, condition: Batch, dropped: Bool[Array, " b"], place: Int[Array, "b 1"]
    ) -> tuple[Float[Array, "b 1 d"], AnyOrderDecodeState]:
        """Process the condition: z (b, 1, d) of the first token, at `place` (b, 1), and the state for `decode`."""
        config, dtype = self.config, self.config.compute.dtype
        prefix, valid = self.condition(condition, dropped, dtype)
        (b, s), real = valid.shape, self._with_image(valid)
        reading, decoding = prepare_layers_for_decode(self.blocks, dtype)
        caches = tuple(Cache.empty(config.transformer, b, real.shape[1], dtype) for _ in reading)
        mask = jnp.pad(Causal(valid).dense(s), ((0, 0), (0, 0), (0, 0), (0, config.length - 1)))
        y, caches = apply_layers(reading, self.add_targets(prefix, place), mask=mask, caches=caches)
        return self.norm(y[:, -1:]), AnyOrderDecodeState(caches, decoding, real)

    @typed
    def decode(
        self,
        state: AnyOrderDecodeState,
        x: Shaped[Array, "b 1 *k"],
        place: Int[Array, "b 1"],
        following: Int[Array, "b 1"],
        k: Array | int,
    ) -> tuple[Float[Array, "b 1 d"], AnyOrderDecodeState]:
        """Feed the k-th token of the order, codes x (b, 1, *code) at `place` (b, 1): z (b, 1, d) of the next one, at
        `following` (b, 1)."""
        s, capacity = state.valid.shape[1] - self.config.length + 1, state.valid.shape[1]
        y = self.add_targets(self.embed(x, place), following)
        mask = (state.valid & (jnp.arange(capacity) <= s + k))[:, None, None]
        y, caches = apply_layers(state.blocks, y, mask=mask, caches=state.caches)
        return self.norm(y), dataclasses.replace(state, caches=caches)


def _pick(x: Array, places: Array) -> Array:
    return jax.vmap(lambda row, p: row[p])(x, places)
