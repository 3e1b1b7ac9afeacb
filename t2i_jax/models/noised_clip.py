"""An image-text model of noised images, whose gradient guides samples to a caption (Nichol et al. 2022, 2.3)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Bool, Float, Int, Num, typed
from t2i_jax.core.conditions import Batch
from t2i_jax.core.fields import Checked, Count, Finite, Layers, Size
from t2i_jax.core.noise import NoiseProcess
from t2i_jax.core.sharding import shard
from t2i_jax.core.specs import BatchSpec, FieldSpec
from t2i_jax.core.types import Capabilities, Compute, LossOutput, Objective, single_objective
from t2i_jax.networks.condition import ids, text_spec, value
from t2i_jax.nn.attention import attend, causal
from t2i_jax.nn.conv import patchify
from t2i_jax.nn.layers import Embedding, LayerNorm, Linear, normal, param, position_table
from t2i_jax.noise.processes import Discrete
from t2i_jax.noise.schedule import spread

MEAN = (122.77093945, 116.74601272, 104.09373519)
STD = (68.50053285, 66.63215831, 70.32316309)
"""Mean and standard deviation per channel of images in 0 .. 255."""


@dataclasses.dataclass(frozen=True)
class NoisedCLIP(Checked):
    """Two Transformers that embed captions and noised images in one space (Radford et al. 2021)."""

    vocabulary: Size = 49408
    length: Size = 77
    text_width: Size = 512
    text_depth: Layers = 12
    text_heads: Size = 8
    size: Size = 64
    """Side of the image in pixels."""
    patch: Size = 4
    image_width: Size = 768
    image_depth: Layers = 12
    image_heads: Size = 12
    dim: Size = 512
    """Width of the common space."""
    times: Count = 1000
    """Noise levels of the image encoder, one for each integer time of `process`; 0: it reads clean images."""
    scale: Finite = 100.0
    """Factor of the similarities."""
    process: NoiseProcess = Discrete("cosine")

    def __post_init__(self):
        super().__post_init__()
        process, name = self.process, type(self.process).__name__
        if not self.times:
            return
        if process.time_levels is None:
            raise ValueError(f"process {process}: its network times are not indices of noise levels")
        if process.time_levels > self.times:
            raise ValueError(f"times {self.times}: this {name} has {process.time_levels} noise levels")

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        return Capabilities(classifier=True)

    @property
    def compute(self) -> Compute:
        """Settings of the computation."""
        return Compute()

    def with_compute(self, compute: Compute) -> NoisedCLIP:
        """The same model with other settings of the computation."""
        compute.check(self.capabilities)
        return self

    def init(self, key: Array) -> CLIPNetwork:
        return CLIPNetwork(self, key)

    def batch_spec(self) -> BatchSpec:
        """Fields of a training batch."""
        image = FieldSpec((self.size, self.size, 3), "float32")
        return {"image": image, **text_spec(self.vocabulary, self.length)}

    def objectives(self) -> dict[str, Objective]:
        return single_objective(self.loss)

    def loss(self, model: CLIPNetwork, batch: Batch, key: Array, train: bool = True) -> LossOutput:
        """Cross-entropy of matching captions and noised images, in both directions (Radford et al. 2021, figure 3).

        batch: `image` in [-1, 1] (b, i, j, 3), `text` and `text_mask` (b, s). train: False spaces the times evenly;
        static.
        """
        keys = jax.random.split(key)
        x0 = batch["image"].astype(jnp.float32)
        t = self.process.quantile(spread(keys[0], len(x0), train))
        alpha, sigma = self.process.alpha_sigma(t, x0)
        x = alpha * x0 + sigma * jax.random.normal(keys[1], x0.shape)
        images, texts = model.images(x, self.process.network_time(t)), model.texts(batch["text"], batch["text_mask"])
        logits = self.scale * images @ texts.T
        diagonal = lambda logits: -jnp.diagonal(jax.nn.log_softmax(logits)).mean()
        loss = (diagonal(logits) + diagonal(logits.T)) / 2
        return LossOutput(loss, {"loss": loss, "accuracy": (logits.argmax(1) == jnp.arange(len(x0))).mean()})

    @typed
    def log_p(
        self, model: CLIPNetwork, x: Float[Array, "b i j 3"], t: Num[Array, " b"], condition: Batch
    ) -> Float[Array, " b"]:
        """Similarity (b,) of noised images and captions, which replaces log p(caption | x) up to a constant.

        A `Diffusion` samples towards captions with `jax.tree_util.Partial(config.log_p, model)`. Captions are the ids
        `clip_text` and `clip_mask` of this model's own tokenizer if the condition has them, else `text` and
        `text_mask`.
        """
        names = ("clip_text", "clip_mask") if "clip_text" in condition else ("text", "text_mask")
        texts = model.texts(ids(condition, names[0], self.vocabulary), value(condition, names[1]))
        return self.scale * (jax.lax.stop_gradient(texts) * model.images(x, t)).sum(-1)


class ClipBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); keys have no bias, since softmax is invariant to it."""

    def __init__(self, d: int, heads: int, key: Array):
        keys = jax.random.split(key, 6)
        self.attention_norm, self.mlp_norm = LayerNorm(d), LayerNorm(d)
        self.q = Linear(d, d, keys[0], std=d**-0.5, axes=("embed", "heads"))
        self.k = Linear(d, d, keys[1], std=d**-0.5, bias=False, axes=("embed", "heads"))
        self.v = Linear(d, d, keys[2], std=d**-0.5, axes=("embed", "heads"))
        self.out = Linear(d, d, keys[3], axes=("heads", "embed"))
        self.into = Linear(d, 4 * d, keys[4], std=(2 * d) ** -0.5)
        self.back = Linear(4 * d, d, keys[5], axes=("mlp", "embed"))
        self.count = heads

    def __call__(self, x: Array, mask: Array | None) -> Array:
        y = self.attention_norm(x)
        q, k, v = (rearrange(f(y), "b t (n h) -> b t n h", n=self.count) for f in (self.q, self.k, self.v))
        x = x + self.out(rearrange(attend(q, k, v, mask), "b t n h -> b t (n h)"))
        x = x + self.back(jax.nn.gelu(self.into(self.mlp_norm(x)), approximate=False))
        return shard(x, "batch", "length", None)


class Tower(nnx.Module):
    """Blocks, and a projection of one output to the common space."""

    def __init__(self, d: int, depth: int, heads: int, dim: int, key: Array):
        keys = jax.random.split(key)
        self.blocks = jax.vmap(lambda k: ClipBlock(d, heads, k))(jax.random.split(keys[0], depth))
        self.norm = LayerNorm(d)
        self.out = Linear(d, dim, keys[1], std=None, bias=False, axes=("embed", None))

    def __call__(self, x: Array, at: Array, mask: Array | None = None) -> Array:
        """x (b, t, d) and the position to read in each row, (b,): unit vectors (b, k)."""
        x, _ = jax.lax.scan(lambda x, block: (block(x, mask), None), shard(x, "batch", "length", None), self.blocks)
        z = self.out(self.norm(jnp.take_along_axis(x, at[:, None, None], 1)[:, 0]))
        return z / (jnp.linalg.norm(z, axis=-1, keepdims=True) + 1e-12)


class CLIPNetwork(nnx.Module):
    """The parameters of a `NoisedCLIP`."""

    def __init__(self, config: NoisedCLIP, key: Array):
        keys = jax.random.split(key, 8)
        d, e, side = config.text_width, config.image_width, config.size // config.patch
        self.config = config
        self.table = Embedding(config.vocabulary, d, keys[0])
        self.text_position = position_table(normal(keys[1], (config.length, d), 0.01))
        self.text = Tower(d, config.text_depth, config.text_heads, config.dim, keys[2])
        self.patches = Linear(3 * config.patch**2, e, keys[3], bias=False, axes=(None, "embed"))
        self.start = param(normal(keys[4], (config.times, e) if config.times else (e,), e**-0.5), None)
        self.image_position = position_table(normal(keys[5], (side**2 + 1, e), e**-0.5), (side, side), prefix=1)
        self.image_norm = LayerNorm(e)
        self.image = Tower(e, config.image_depth, config.image_heads, config.dim, keys[6])

    @typed
    def texts(self, text: Int[Array, "b s"], mask: Bool[Array, "b s"]) -> Float[Array, "b k"]:
        """Captions, ids and mask (b, s) -> unit vectors (b, k), read at the last token of each caption."""
        x = self.table(text) + self.text_position[...]
        return self.text(x, jnp.maximum(mask.sum(1) - 1, 0), causal(x.shape[1]))

    @typed
    def images(self, x: Float[Array, "b i j 3"], t: Num[Array, " b"]) -> Float[Array, "b k"]:
        """Images (b, i, j, 3), in [-1, 1] when clean, at times t (b,), 0 .. 999 -> unit vectors (b, k)."""
        x = ((x + 1) * 127.5 - jnp.asarray(MEAN)) / jnp.asarray(STD)
        x = self.patches(rearrange(patchify(x, self.config.patch), "b i j d -> b (i j) d"))
        times = self.start[...]
        start = times[jnp.asarray(t, jnp.int32)] if self.config.times else jnp.broadcast_to(times, x[:, 0].shape)
        x = self.image_norm(jnp.concatenate([start[:, None], x], 1) + self.image_position[...])
        return self.image(x, jnp.zeros(len(x), jnp.int32))
