"""Codes of a small image, then those of a large one: p(x | w) = sum_y p(y | w) p(x | y, w).

CogView2 (Ding et al. 2022, arXiv:2204.14217): any family in raster order samples coarse codes y after the text. Direct
super-resolution predicts all fine codes at once, each given the text and the coarse codes around it. Iterative
super-resolution then hides a part of them in each round and draws it again, given the text and fine codes nearby: local
parallel autoregression, in which a fixed pattern says which codes of each block are drawn in which rounds.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Bool, Float, Int, typed
from t2i_jax.core.conditions import Batch
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import BaseFamily
from t2i_jax.core.fields import FREE, SAMPLED, Count, Grid, Sizes
from t2i_jax.core.specs import BatchSpec, CodeSpec, SampleSpec
from t2i_jax.core.types import Capabilities, Compute, LossOutput, Objective
from t2i_jax.networks.condition import ids, value
from t2i_jax.networks.local import LocalNetwork, LocalTransformer
from t2i_jax.nn.layers import ModelState
from t2i_jax.nn.losses import chunked_cross_entropy, row_weights, weighted_mean
from t2i_jax.noise.schedule import spread
from t2i_jax.sampling.autoregressive import Autoregressive
from t2i_jax.sampling.guidance import is_guided
from t2i_jax.sampling.options import ARSampler, CoarseToFineSampler, StreamSampler
from t2i_jax.sampling.progress import Progress, report
from t2i_jax.sampling.tokens import sample_in_clusters, sample_token

PATTERN = (
    (-1, 0, 1, 2, 3, 4),
    (0, -1, 2, -1, -2, 5),
    (1, -2, 3, 4, 5, 6),
    (2, 3, 4, 5, -1, 1),
    (3, -1, -2, 0, -1, 2),
    (4, 5, 6, 1, 3, -2),
)
"""The rounds of CogView2: round i draws the positions with i or more again, and those with 0 or less never."""


@dataclasses.dataclass(frozen=True)
class CoarseToFine(BaseFamily[CoarseToFineSampler]):
    """A family of coarse codes, and two networks of fine ones; each of the three is trained by its own objective."""

    coarse: Autoregressive
    """The family of coarse codes; it reads `text`, and its `compute` is the default one, as that here is for all."""
    grid: Grid = (60, 60)
    """Rows and columns of fine codes, multiples of those of the coarse ones."""
    direct: LocalTransformer = LocalTransformer(own_attention=True)
    """Predicts the fine codes of text and coarse ones."""
    refiner: LocalTransformer = LocalTransformer(sees="text", text=16)
    """Predicts hidden fine codes of text and others."""
    pattern: Annotated[tuple[tuple[int, ...], ...], SAMPLED] = PATTERN
    """Of the codes of a block, which tiles the image: the last round that draws each of them again."""
    top_ks: Annotated[Sizes, SAMPLED] = (40, 40, 40, 20, 20, 10)
    """Of each round, how many of the most probable codes are kept."""
    clusters: Count = 0
    """Clusters of similar codes, for `CoarseToFineSampler.direct_top_clusters`; 0: none."""
    compute: Compute = Compute()
    sampling: Annotated[CoarseToFineSampler, FREE] = CoarseToFineSampler()
    """Default options of `sample`."""

    def __post_init__(self):
        coarse = self.coarse
        if "text" not in coarse.condition_spec():
            raise ConfigError(f"coarse: a {type(coarse).__name__} that reads no 'text', which fine codes depend on too")
        super().__post_init__()
        if any(n % m for n, m in zip(self.grid, coarse.grid, strict=True)):
            raise ConfigError(f"grid {self.grid} is no multiple of the coarse one, {coarse.grid}")
        if (self.direct.sees, self.refiner.sees) != ("coarse", "text"):
            raise ConfigError("direct.sees is 'coarse' and refiner.sees 'text': what each of them is for")
        if coarse.compute not in (Compute(), self.compute):
            raise ConfigError("coarse.compute: set the `compute` of the whole, which is that of all three networks")
        if not self.pattern or len({len(row) for row in self.pattern}) != 1 or not self.pattern[0]:
            raise ConfigError(f"pattern {self.pattern}: rows of equal length")

    @property
    def base(self) -> Autoregressive:
        """The family of coarse codes, with the `compute` of the whole."""
        return self.coarse.with_compute(self.compute)

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training; guidance is that of the coarse codes."""
        can = self.coarse.capabilities
        return Capabilities(
            family=True,
            unconditional=can.unconditional,
            guidance=True,
            remat=can.remat,
            attention=can.attention,
            loss_chunk=True,
        )

    @property
    def rounds(self) -> np.ndarray:
        """The last round that draws each fine code again: int (h, w)."""
        (h, w), block = self.grid, np.asarray(self.pattern)
        return np.tile(block, (-(-h // len(block)), -(-w // block.shape[1])))[:h, :w]

    def sample_spec(self) -> SampleSpec:
        """Shape and dtype of a sample."""
        return SampleSpec(self.grid, CodeSpec("int32", sizes=(self.coarse.vocabulary,)))

    def condition_spec(self) -> BatchSpec:
        """Batch fields that `sample` reads; the mask of padding is needed."""
        spec = self.coarse.condition_spec()
        return {**spec, "text_mask": dataclasses.replace(spec["text_mask"], optional=False)}

    def batch_spec(self) -> BatchSpec:
        """Fields of a training batch: `codes` of the large image, and `low_codes` of the same one made smaller."""
        return {**super().batch_spec(), "low_codes": self.coarse.sample_spec().field}

    def init(self, key: Array) -> CoarseToFineNetworks:
        """A model with fresh parameters."""
        return CoarseToFineNetworks(self, key)

    def check(self, options: CoarseToFineSampler) -> None:
        """Errors: `ConfigError` for clusters of codes that the model does not have, and too many refinements."""
        self.coarse.check(options)
        if not self.clusters and np.any(np.asarray(options.direct_top_clusters)):
            raise ConfigError("direct_top_clusters: the codes of this model are in no clusters")
        if np.any(np.asarray(options.refinements) > len(self.top_ks)):
            raise ConfigError(f"refinements {options.refinements}: the model has {len(self.top_ks)} rounds")

    def loop_trips(self, options: CoarseToFineSampler) -> int:
        """Rounds of iterative super-resolution."""
        return int(options.refinements)

    # -- training

    def objectives(self) -> dict[str, Objective]:
        """A loss of each network."""
        of = {"coarse": self.coarse_loss, "direct": self.direct_loss, "refiner": self.refiner_loss}
        drawn = lambda loss: lambda model, batch, key, step, train: loss(model, batch, key, train)
        return {name: Objective(drawn(loss), (name,)) for name, loss in of.items()}

    def coarse_loss(self, model: CoarseToFineNetworks, batch: Batch, key: Array, train: bool = True) -> LossOutput:
        """The loss of the coarse codes, `low_codes` int (b, i, j) of the batch, as their family has it."""
        found = self.base.loss(model.coarse, {**batch, "codes": value(batch, "low_codes")}, key, train)
        return LossOutput(found.loss, found.metrics)

    def direct_loss(self, model: CoarseToFineNetworks, batch: Batch, key: Array, train: bool = True) -> LossOutput:
        """Mean of -log p(x_i | y, w) over all fine codes."""
        every = jnp.ones(batch["codes"].shape, bool)
        return self._loss(model.direct, batch, every, key if train else None)

    def refiner_loss(self, model: CoarseToFineNetworks, batch: Batch, key: Array, train: bool = True) -> LossOutput:
        """Mean of -log p(x_i | others, w) over the codes that a round hides, the round of each image drawn evenly."""
        keys = jax.random.split(key)
        share = spread(keys[0], len(batch["codes"]), train)
        round = 1 + jnp.floor(share * len(self.top_ks)).astype(jnp.int32)
        return self._loss(model.refiner, batch, self.hidden(round), keys[1] if train else None)

    def _loss(self, network: LocalNetwork, batch: Batch, hidden: Array, key: Array | None) -> LossOutput:
        z = network(*self.text(batch), value(batch, "low_codes"), batch["codes"], hidden, key)
        flat = lambda a: rearrange(a, "b h w -> b (h w)")
        targets, weight = flat(batch["codes"]), flat(hidden) * row_weights(batch, len(hidden))[:, None]
        _, nll, correct = chunked_cross_entropy(network.logits, z, targets, self.compute.loss_chunk)
        loss = weighted_mean(nll, weight)
        metrics = {"bits_per_token": loss / math.log(2), "accuracy": weighted_mean(correct, weight)}
        return LossOutput(loss, {"loss": loss, **metrics})

    @typed
    def hidden(self, round: Int[Array, " b"]) -> Bool[Array, "b h w"]:
        """The fine codes that a round, from 1 on, draws again, for the round of each image."""
        return jnp.asarray(self.rounds) >= round[:, None, None]

    def text(self, batch: Batch) -> tuple[Int[Array, "b s"], Bool[Array, "b s"]]:
        """Ids (b, s) of the text, and which of them are no padding."""
        spec = self.coarse.condition_spec()["text"]
        text = jnp.asarray(ids(batch, "text", (spec.high or 0) + 1), jnp.int32)
        return text, value(batch, "text_mask")

    # -- sampling

    def sample(
        self,
        model: CoarseToFineNetworks,
        condition: Batch,
        keys: Array,
        options: CoarseToFineSampler | None = None,
        *,
        guided: bool | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Fine codes int32 (b, h, w), one image per row of the condition and per key of `keys` (b,).

        An image depends only on its own key and condition, not on its batch. All three networks run in one program, and
        all options are traced. guided: as in `Autoregressive.sample`, of the coarse codes. progress: its listener is
        called with (passes over the fine codes, all of these, codes).
        """
        guided = is_guided(self.capabilities, guided)
        return _sample(self, model, condition, keys, (options or self.options()).arrays(), guided, progress)

    @typed
    def enlarge(
        self,
        model: CoarseToFineNetworks,
        condition: Batch,
        coarse: Int[Array, "b i j"],
        options: CoarseToFineSampler,
        uniform: Float[Array, "two b l"],
    ) -> Int[Array, "b h w"]:
        """Fine codes int32 of coarse ones by direct super-resolution, with two uniform numbers for each."""
        hidden = jnp.ones((len(coarse), *self.grid), bool)
        logits = self.logits(model.direct, condition, coarse, jnp.zeros(hidden.shape, jnp.int32), hidden)
        chosen = StreamSampler(
            temperature=options.direct_temperature,
            top_k=options.direct_top_k,
            top_clusters=options.direct_top_clusters,
            cluster_temperature=options.direct_cluster_temperature,
            greedy=options.greedy,
        ).arrays()
        if model.clusters is None:
            drawn = sample_token(logits, chosen, uniform[0])
        else:
            drawn = sample_in_clusters(logits, chosen, uniform, model.clusters[...], self.clusters)
        return drawn.reshape(hidden.shape)

    @typed
    def refine(
        self,
        model: CoarseToFineNetworks,
        condition: Batch,
        fine: Int[Array, "b h w"],
        round: Array | int,
        options: CoarseToFineSampler,
        uniform: Float[Array, "b l"],
    ) -> Int[Array, "b h w"]:
        """Fine codes int32 after a round, from 1 on, of iterative super-resolution, with a uniform number for each."""
        hidden = self.hidden(jnp.full(len(fine), round))
        top_k = jnp.asarray(self.top_ks)[round - 1]
        chosen = ARSampler(temperature=options.refine_temperature, top_k=top_k, greedy=options.greedy).arrays()
        logits = self.logits(model.refiner, condition, fine[:, :0, :0], fine, hidden)
        return jnp.where(hidden, sample_token(logits, chosen, uniform).reshape(fine.shape), fine)

    @typed
    def logits(
        self,
        network: LocalNetwork,
        condition: Batch,
        coarse: Int[Array, "b _ _"],
        fine: Int[Array, "b h w"],
        hidden: Bool[Array, "b h w"],
    ) -> Float[Array, "b h*w v"]:
        """Logits of all fine codes by one of the networks, given those that are not hidden."""
        return network.logits(network(*self.text(condition), coarse, fine, hidden))


class CoarseToFineNetworks(nnx.Module):
    """The three networks of a `CoarseToFine`, and the clusters of codes."""

    def __init__(self, config: CoarseToFine, key: Array):
        keys, coarse = jax.random.split(key, 3), config.base
        words, codes = (coarse.condition_spec()["text"].high or 0) + 1, coarse.vocabulary
        local = lambda part, key: part.init(key, words, codes, coarse.grid, config.grid, config.compute)
        self.coarse = coarse.init(keys[0])
        self.direct, self.refiner = local(config.direct, keys[1]), local(config.refiner, keys[2])
        labels = jnp.arange(codes, dtype=jnp.int32) % max(config.clusters, 1)
        self.clusters = ModelState(labels) if config.clusters else None


@partial(jax.jit, static_argnames=("config", "guided"))
def _sample(
    config: CoarseToFine,
    model: CoarseToFineNetworks,
    condition: Batch,
    keys: Array,
    options: CoarseToFineSampler,
    guided: bool,
    progress: Progress | None,
) -> Array:
    own, length = jax.vmap(lambda key: jax.random.split(key, 3))(keys), config.length
    numbers = lambda keys, *shape: jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)
    coarse = config.base.sample(model.coarse, condition, own[:, 0], options, guided=guided)
    fine = config.enlarge(model, condition, coarse, options, rearrange(numbers(own[:, 1], 2, length), "b n l -> n b l"))
    rounds = jnp.minimum(options.refinements, len(config.top_ks))
    report(progress, jnp.int32(1), rounds + 1, fine)

    def step(i: Array, fine: Array) -> Array:
        uniform = numbers(jax.vmap(jax.random.fold_in, (0, None))(own[:, 2], i), length)
        fine = config.refine(model, condition, fine, i + 1, options, uniform)
        report(progress, i + 2, rounds + 1, fine)
        return fine

    return jax.lax.fori_loop(0, rounds, step, fine)
