"""A classifier of noised images, whose gradient guides samples to a class (Dhariwal & Nichol 2021, section 4)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Float, Num, typed
from t2i_jax.core.conditions import Batch
from t2i_jax.core.fields import Checked, Size
from t2i_jax.core.noise import NoiseProcess
from t2i_jax.core.specs import WEIGHT, BatchSpec, FieldSpec
from t2i_jax.core.types import Capabilities, Compute, LossOutput, Objective, single_objective
from t2i_jax.networks.condition import ids
from t2i_jax.networks.unet import UNet, UNetEncoder
from t2i_jax.nn.attention import attend
from t2i_jax.nn.layers import GroupNorm, Linear, normal, position_table
from t2i_jax.nn.losses import cross_entropy, row_mean
from t2i_jax.noise.processes import Discrete
from t2i_jax.noise.schedule import spread
from t2i_jax.sampling.guidance import of_class

HIDDEN = 2048
"""Hidden width of the heads that pool every stage."""


@dataclasses.dataclass(frozen=True)
class NoisedClassifier(Checked):
    """The encoder half of a UNet, pooled to logits."""

    trunk: UNet = UNet(conditioning=None, head_dim=64)
    """UNet whose encoder and middle are used; its condition and prediction target are ignored."""
    classes: Size = 1000
    pool: Literal["adaptive", "attention", "spatial", "spatial_v2"] = "attention"
    """Mean of the last features; attention from that mean to all of them; means of all stages through an MLP, without
    or with normalisation."""
    process: NoiseProcess = Discrete()
    compute: Compute = Compute()

    def __post_init__(self):
        super().__post_init__()
        self.compute.check(self.capabilities)

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        return Capabilities(classifier=True, remat=self.trunk.remats)

    def with_compute(self, compute: Compute) -> NoisedClassifier:
        """The same model with other settings of the computation."""
        return dataclasses.replace(self, compute=compute)

    def init(self, key: Array) -> NoisyClassifierNet:
        return NoisyClassifierNet(self, key)

    def batch_spec(self) -> BatchSpec:
        """Fields of a training batch: `codes` (latents) or `image`, and the class."""
        whole = FieldSpec((*self.trunk.size, self.trunk.channels), "float32", optional=True, one_of="read")
        label = FieldSpec((), "int32", 0, self.classes - 1)
        return {"codes": whole, "image": whole, "label": label, "weight": WEIGHT}

    def objectives(self) -> dict[str, Objective]:
        return single_objective(self.loss)

    def loss(self, model: NoisyClassifierNet, batch: Batch, key: Array, train: bool = True) -> LossOutput:
        """Mean cross-entropy of `label` int (b,) given noised images; batch: also `codes` or `image` (b, i, j, c).

        train: False turns off dropout and spaces the times evenly; static.
        """
        x0 = (batch["codes"] if "codes" in batch else batch["image"]).astype(jnp.float32) * self.process.scale
        keys = jax.random.split(key, 3)
        t = self.process.quantile(spread(keys[0], len(x0), train))
        alpha, sigma = self.process.alpha_sigma(t, x0)
        logits = model(
            alpha * x0 + sigma * jax.random.normal(keys[1], x0.shape),
            self.process.network_time(t),
            keys[2] if train else None,
        )
        _, nll, correct = cross_entropy(logits, batch["label"])
        loss = row_mean(nll, batch)
        return LossOutput(loss, {"loss": loss, "accuracy": row_mean(correct, batch)})

    @typed
    def log_p(
        self, model: NoisyClassifierNet, x: Float[Array, "b i j c"], t: Num[Array, " b"], condition: Batch
    ) -> Float[Array, " b"]:
        """log p(label | x) (b,): a `Diffusion` samples towards `label` with `jax.tree_util.Partial(config.log_p,
        model)`."""
        return of_class(model(x, t), ids(condition, "label", self.classes))


class NoisyClassifierNet(UNetEncoder):
    """The parameters of a `NoisedClassifier`."""

    def __init__(self, config: NoisedClassifier, key: Array):
        keys = jax.random.split(key)
        super().__init__(config.trunk, keys[0], config.compute)
        trunk, c = config.trunk, self.kept[-1]
        self.head: MeanPool | AttentionPool | StagePool
        if config.pool.startswith("spatial"):
            self.head = StagePool(trunk, sum(self.kept) + c, config.classes, keys[1], config.pool == "spatial_v2")
        else:
            pool = AttentionPool if config.pool == "attention" else MeanPool
            self.head = pool(trunk, c, config.classes, keys[1])

    @typed
    def __call__(
        self, x: Float[Array, "b i j c"], t: Num[Array, " b"], key: Array | None = None
    ) -> Float[Array, "b v"]:
        """x (b, i, j, c) at network times t (b,) -> logits (b, v) fp32."""
        return self.head(*self.encode(x, self.time(t).astype(self.compute.dtype), key=key)).astype(jnp.float32)


class MeanPool(nnx.Module):
    """Spatial mean of the last features, then a linear layer."""

    def __init__(self, config: UNet, c: int, classes: int, key: Array):
        self.norm = GroupNorm(c, config.groups, config.eps)
        self.out = Linear(c, classes, key, std=0.0, axes=(None, "vocab"))

    def __call__(self, x: Array, stages: list[Array]) -> Array:
        return self.out(jax.nn.silu(self.norm(x)).mean((1, 2)))


class AttentionPool(nnx.Module):
    """One query, the spatial mean, attends to itself and to all positions (Radford et al. 2021)."""

    def __init__(self, config: UNet, c: int, classes: int, key: Array):
        keys = jax.random.split(key, 3)
        factor = 2 ** (len(config.multipliers) - 1)
        rows, columns = config.size[0] // factor, config.size[1] // factor
        self.norm = GroupNorm(c, config.groups, config.eps)
        self.position = position_table(normal(keys[0], (rows * columns + 1, c), c**-0.5), (rows, columns), prefix=1)
        self.qkv = Linear(c, 3 * c, keys[1], std=None, axes=(None, "heads"))
        self.out = Linear(c, classes, keys[2], std=None, axes=("heads", None))
        self.count = c // config.head_dim if config.head_dim else config.heads

    def __call__(self, x: Array, stages: list[Array]) -> Array:
        x = rearrange(jax.nn.silu(self.norm(x)), "b i j c -> b (i j) c")
        x = jnp.concatenate([x.mean(1, keepdims=True), x], 1) + self.position[...].astype(x.dtype)
        q, k, v = rearrange(self.qkv(x), "b t (three n h) -> three b t n h", three=3, n=self.count)
        return self.out(rearrange(attend(q[:, :1], k, v), "b 1 n h -> b (n h)"))


class StagePool(nnx.Module):
    """Spatial means of the outputs of all stages, concatenated, through an MLP."""

    def __init__(self, config: UNet, c: int, classes: int, key: Array, normalised: bool):
        keys = jax.random.split(key)
        self.into = Linear(c, HIDDEN, keys[0], std=None)
        self.norm = GroupNorm(HIDDEN, config.groups, config.eps) if normalised else None
        self.out = Linear(HIDDEN, classes, keys[1], std=None, axes=("mlp", None))

    def __call__(self, x: Array, stages: list[Array]) -> Array:
        y = self.into(jnp.concatenate([s.mean((1, 2)) for s in (*stages, x)], -1))
        y = jax.nn.relu(y) if self.norm is None else jax.nn.silu(self.norm(y[:, None, None])[:, 0, 0])
        return self.out(y)
