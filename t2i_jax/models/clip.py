"""CLIP: images and captions in one space, by two Transformers trained on pairs (Radford et al. 2021, arXiv:2103.00020).

With `noise` it reads noised images at their noise levels, and the gradient of its similarity guides samples of a
diffusion to a caption (Nichol et al. 2022, GLIDE, 2.3), or to a reference image (Liu et al. 2023, arXiv:2112.05744).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from t2i_jax.core.arrays import Float, Num, typed
from t2i_jax.core.conditions import Batch
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import LARGEST, Checked, Finite, Positive
from t2i_jax.core.noise import NoiseProcess
from t2i_jax.core.specs import BatchSpec, FieldSpec
from t2i_jax.core.types import Capabilities, Compute, LossOutput, Objective, single_objective
from t2i_jax.networks.clip import CLIPNetwork, CLIPTowers
from t2i_jax.networks.condition import ids, text_spec, value
from t2i_jax.nn.contrastive import Pairs, bounded, kinds_of, sigmoid_loss, softmax_loss
from t2i_jax.nn.transformer import REMATS
from t2i_jax.noise.schedule import spread

LossType = Literal["softmax", "sigmoid"]


@dataclasses.dataclass(frozen=True)
class CLIP(Checked):
    """An image tower and a text tower, trained to match by the cosines of all pairs of the global batch.

    Losses and accuracies are of pairs among those of their batch, so batches of one size are compared; where a step
    accumulates gradients, of one part of it. Captions without a token count in no loss.
    """

    towers: CLIPTowers = CLIPTowers()
    loss_type: LossType = "softmax"
    """softmax: the own caption of an image against all others, and the own image of a caption (CLIP); sigmoid: each
    pair by itself, with a learned bias (Zhai et al. 2023, SigLIP)"""
    scale: Positive = 1 / 0.07
    """factor of cosines, at first; SigLIP begins at 10"""
    learn_scale: bool = True
    """whether the scale is learned, as its logarithm"""
    largest_scale: Positive = 100.0
    """the learned scale stays between 1 and this"""
    bias: Finite = -10.0
    """of `sigmoid`, at first"""
    same: Literal["captions", "labels", "none"] = "captions"
    """other pairs of a batch that are no negatives: those with an equal caption, those of the same `label`, or none"""
    noise: NoiseProcess | None = None
    """noise of the images that it learns, whose time it is given if `towers.times`; None: images are clean"""
    compute: Compute = Compute()

    def __post_init__(self):
        super().__post_init__()
        towers = self.towers
        if not towers.dim:
            raise ConfigError("CLIP.towers.dim 0: captions and images need a common space")
        if towers.size % towers.patch:
            raise ConfigError(f"CLIP.towers.size {towers.size}: a multiple of patch {towers.patch}")
        if towers.channels != 3:
            raise ConfigError(f"CLIP.towers.channels {towers.channels}: images have 3")
        if towers.times and self.noise is None:
            raise ConfigError(f"CLIP.towers.times {towers.times}: it is for images with `noise`")
        if towers.times and self.noise is not None:
            process, kind = self.noise, type(self.noise).__name__
            if process.time_levels is None:
                raise ConfigError(f"CLIP.noise {process}: its network times are not indices of noise levels")
            if process.time_levels > towers.times:
                raise ConfigError(f"CLIP.towers.times {towers.times}: this {kind} has {process.time_levels} levels")
        self.compute.check(self.capabilities)

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        clean = self.noise is None
        return Capabilities(
            classifier=not clean,
            reference=not clean,
            image_text=clean,
            remat=REMATS,
            attention=True,
            loss_chunk=True,
        )

    @property
    def process(self) -> NoiseProcess:
        """The noise of its images. Errors: `ConfigError` for one of clean images."""
        if self.noise is None:
            raise ConfigError("CLIP.noise None: it reads clean images")
        return self.noise

    def with_compute(self, compute: Compute) -> CLIP:
        """The same model with other settings of the computation; `loss_chunk` counts images of a device whose products
        with all captions are in memory at a time."""
        return dataclasses.replace(self, compute=compute)

    def init(self, key: Array) -> CLIPNetwork:
        scale = self.scale if self.learn_scale else None
        return CLIPNetwork(self.towers, key, self.compute, scale, self.bias if self.loss_type == "sigmoid" else None)

    def batch_spec(self) -> BatchSpec:
        """Fields of a training batch: images, captions, and labels if equal ones are no negatives."""
        towers = self.towers
        spec = {"image": FieldSpec((towers.size, towers.size, 3), "float32")}
        spec |= text_spec(towers.vocabulary, towers.length)
        return spec | ({"label": FieldSpec((), "int32", 0, LARGEST)} if self.same == "labels" else {})

    def objectives(self) -> dict[str, Objective]:
        return single_objective(self.loss)

    def loss(self, model: CLIPNetwork, batch: Batch, key: Array, train: bool = True) -> LossOutput:
        """The contrastive loss of a batch of pairs.

        batch: `image` in [-1, 1] (b, i, j, 3), `text` and `text_mask` (b, s). train: False is without dropout, and
        spaces the times of noise evenly; static. Metrics: `accuracy`, the share of images whose own caption is the most
        similar of the batch, `image_accuracy`, of captions whose own image is, and the `scale`.
        """
        keys = jax.random.split(key)
        x, t = batch["image"].astype(jnp.float32), None
        if self.noise is not None:
            time = self.noise.quantile(spread(keys[0], len(x), train))
            alpha, sigma = self.noise.alpha_sigma(time, x)
            x, t = alpha * x + sigma * jax.random.normal(keys[1], x.shape), self.noise.network_time(time)
        text, mask = batch["text"], batch["text_mask"]
        dropout = jax.random.split(jax.random.fold_in(key, 2)) if train else (None, None)
        images, texts = model.images(x, t, dropout[0]), model.texts(text, mask, dropout[1])
        kinds = {"captions": lambda: kinds_of(text, mask), "labels": lambda: batch["label"], "none": lambda: None}
        pairs = Pairs(images, texts, mask.any(1), kinds[self.same]())
        scale, chunk = self.scale_of(model), self.compute.loss_chunk
        if model.logit_bias is None:
            loss, accuracy, image_accuracy = softmax_loss(pairs, scale, chunk)
        else:
            loss, accuracy, image_accuracy = sigmoid_loss(pairs, scale, model.logit_bias[...], chunk)
        metrics = {"loss": loss, "accuracy": accuracy, "image_accuracy": image_accuracy, "scale": scale}
        return LossOutput(loss, metrics)

    def scale_of(self, model: CLIPNetwork) -> Array:
        """The factor of cosines: scalar fp32."""
        if model.logit_scale is None:
            return jnp.asarray(self.scale, jnp.float32)
        return jnp.exp(bounded(model.logit_scale[...], 0.0, math.log(self.largest_scale)))

    @typed
    def log_p(
        self, model: CLIPNetwork, x: Float[Array, "b i j 3"], t: Num[Array, " b"], condition: Batch
    ) -> Float[Array, " b"]:
        """log p(condition | x) (b,) up to a constant, of noised images x at network times t (b,).

        Without a reference it is s cos(E(caption), F(x_t)), the scaled similarity of embeddings (Nichol et al. 2022).
        With x'_t, the condition's `reference` (b, i, j, 3) at the noise of x, and `reference_weights` w (b, 3) it is

            w_0 s cos(E(caption), F(x_t)) + w_1 s cos(F(x'_t), F(x_t)) - w_2 mean |M(x'_t) - M(x_t)|^2

        (Liu et al. 2023, Semantic Diffusion Guidance: language, image content, image structure), where M has the
        features of all patches before the last block, and the mean is over patches and features.

        A `Diffusion` samples towards captions with `jax.tree_util.Partial(config.log_p, model)`. Captions are the ids
        `clip_text` and `clip_mask` of this model's own tokenizer if the condition has them, else `text` and
        `text_mask`; with a reference a condition may have neither.
        """
        scale = self.scale_of(model)
        if "reference" not in condition:
            return scale * self._similarity(model, condition, model.images(x, t))
        images, patches = model.images_with_maps(x, t)
        wanted, layout = jax.lax.stop_gradient(model.images_with_maps(condition["reference"], t))
        weights = value(condition, "reference_weights")
        log_p = weights[:, 1] * scale * (wanted * images).sum(-1)
        log_p -= weights[:, 2] * ((layout - patches) ** 2).mean((1, 2))
        if {"text", "clip_text"} & condition.keys():
            log_p += weights[:, 0] * scale * self._similarity(model, condition, images)
        return log_p

    def _similarity(self, model: CLIPNetwork, condition: Batch, images: Array) -> Array:
        """Cosines (b,) of the condition's captions with embeddings of images (b, k)."""
        names = ("clip_text", "clip_mask") if "clip_text" in condition else ("text", "text_mask")
        texts = model.texts(ids(condition, names[0], self.towers.vocabulary), value(condition, names[1]))
        return (jax.lax.stop_gradient(texts) * images).sum(-1)
