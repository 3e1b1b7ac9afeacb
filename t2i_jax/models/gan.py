"""One-stage GANs: a generator from noise and a sentence, and a discriminator of images that match their sentence.

DF-GAN (Tao et al. 2022, arXiv:2008.05865) and SSA-GAN (Liao et al. 2022, arXiv:2104.00567) share the discriminator, its
hinge losses and the penalty on its gradient; they differ in the blocks of the generator.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t2i_jax.core.conditions import Batch, Condition
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import FREE, Checked, NotNegative, Positive, Range, Size
from t2i_jax.core.specs import CodeSpec, SampleSpec
from t2i_jax.core.types import Compute, LossOutput, Objective, Progress, Toward
from t2i_jax.networks.condition import SentenceAndWords, check_vectors
from t2i_jax.networks.damsm import ImageEncoder, caption_losses
from t2i_jax.networks.one_stage import OneStage, OneStageGenerator
from t2i_jax.networks.one_way import OneWay, OneWayDiscriminator
from t2i_jax.nn.adversarial import (
    Adversary,
    Paired,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    input_gradients,
)
from t2i_jax.nn.layers import replace
from t2i_jax.nn.losses import row_mean, row_weights, weighted_mean
from t2i_jax.sampling.gan import GANFamily
from t2i_jax.sampling.interpolation import lerp, slerp
from t2i_jax.sampling.options import GANSampler
from t2i_jax.sampling.progress import report
from t2i_jax.text.damsm import load_image_encoder


@dataclasses.dataclass(frozen=True)
class GradientPenalty(Checked):
    """weight mean |g|^power, g the gradient of the discriminator's logit at real images with their own sentences.

    The default is the matching-aware penalty of DF-GAN (Tao et al. 2022, eq. 2).
    """

    weight: NotNegative = 2.0
    power: Positive = 6.0
    sentence: bool = True
    """g is by the image and by the sentence; False: by the image alone"""
    apart: bool = False
    """an update of its own after that of the other losses, as in SSA-GAN; else a term of their sum"""
    every: Size = 1
    """training steps from one penalty to the next; above 1 it is an update of its own"""


R1 = GradientPenalty(5.0, 2.0, sentence=False)
"""gamma / 2 |g|^2 by the image, gamma = 10 (Mescheder et al. 2018, arXiv:1801.04406, eq. 9)."""


class GeneratedImages(NamedTuple):
    """What the objectives share: the images of a step."""

    images: Array
    """(b, i, j, 3) in [-1, 1], fp32"""
    generator: OneStageGenerator
    """with the running statistics after these images"""


@dataclasses.dataclass(frozen=True)
class GAN(GANFamily["GANNetwork"]):
    """A one-stage generator, its discriminator, and their losses.

    A condition with parameters has those of the generator and those of the discriminator. One without a summary vector
    is summarised by the mean of its tokens.
    """

    network: OneStage = OneStage()
    """the generator"""
    discriminator: OneWay | None = OneWay()
    """None: of published files without one, which cannot be trained on"""
    condition: Condition = SentenceAndWords()
    """class, caption or features: those of DAMSM, or of any other frozen encoder"""
    sentence: Size = 256
    """size of the sentence vector, for conditions that are projected"""
    adversary: Adversary = "hinge"
    penalty: GradientPenalty | None = GradientPenalty()
    mismatched: Literal["rolled", "shifted"] = "rolled"
    """the discriminator's images with sentences of other images: that of the image before, the last one's for the first
    (DF-GAN); or that of the next, and none for the last (SSA-GAN). Equal sentences do match, and do not count"""
    alternating: bool = True
    """the generator learns from the discriminator as updated in the same step; else both from those before it"""
    matching: str = ""
    """run, released model or published file of the DAMSM whose text encoder gives the condition: the generator learns
    from its image encoder, too; empty: none"""
    matching_weight: NotNegative = 0.05
    """weight of the four losses of words and sentences"""
    gammas: Annotated[tuple[float, float, float], Range(low=0)] = (5.0, 5.0, 10.0)
    """their factors gamma1, gamma2 and gamma3"""
    paired: Paired | None = None
    """the generator's images are also compared with the real ones of their sentences"""
    align_corners: bool = False
    """how images are resized for a published file of `matching` (`text.damsm.load_image_encoder`)"""
    compute: Compute = Compute()
    sampling: Annotated[GANSampler, FREE] = GANSampler()

    def __post_init__(self):
        super().__post_init__()
        check_vectors(self.condition)
        if self.matching and not isinstance(self.condition, SentenceAndWords):
            raise ConfigError("GAN.matching: it compares words with images, so the condition is SentenceAndWords")

    def sample_spec(self) -> SampleSpec:
        return SampleSpec(self.network.size, CodeSpec("float32", (3,)))

    def init(self, key: Array) -> GANNetwork:
        return GANNetwork(self, key)

    def frozen(self) -> ImageEncoder:
        """The image encoder of `matching`, which the generator's loss reads as `batch["frozen"]`."""
        return load_image_encoder(self.matching, self.align_corners)

    def objectives(self) -> dict[str, Objective[GANNetwork, Batch]]:
        """The discriminator, its penalty where that is an update of its own, and the generator.

        Errors: `ConfigError` without a discriminator.
        """
        if self.discriminator is None:
            raise ConfigError("GAN.discriminator is None: this GAN samples, and cannot be trained")
        found = {"discriminator": Objective(self.discriminator_loss, ("discriminator",))}
        if self.penalty is not None and self._apart:
            found["penalty"] = Objective(
                self.penalty_loss, ("discriminator",), "discriminator", self.penalty.every, ("discriminator",)
            )
        after = tuple(found) if self.alternating else ()
        return found | {"generator": Objective(self.generator_loss, ("generator",), after=after)}

    @property
    def _apart(self) -> bool:
        return self.penalty is not None and (self.penalty.apart or self.penalty.every > 1)

    def forward(self, model: GANNetwork, batch: Batch, key: Array, step: Array, train: bool) -> GeneratedImages:
        """The images of a step: one for each example, of its condition and new noise."""
        generator, count = model.generator, len(batch["image"])
        z = jax.random.normal(key, (count, self.network.noise))
        output, after = generator(z, generator.read(batch, count).pooled, train)
        return GeneratedImages(output.images, after)

    def discriminator_loss(self, model: GANNetwork, batch: Batch, key: Array, step: Array, train: bool) -> LossOutput:
        """Real pairs against generated images and mismatched pairs, which count half each; and the penalty.

        With hinges: mean max(0, 1 - D(x, s)) + mean max(0, 1 + D(G(z, s), s)) / 2 + mean max(0, 1 + D(x, s')) / 2 (Tao
        et al. 2022, eq. 1).
        """
        judge, images = model.judge, batch["image"]
        weight = row_weights(batch, len(images))
        sentence = judge.read(batch, len(images)).pooled
        penalty = jnp.zeros(())
        if self.penalty is None or self._apart:
            features = judge.features(images)
            real = judge.logits(features, sentence)
        else:
            real, features, each = self._penalised(judge, images, sentence, self.penalty)
            penalty = weighted_mean(each, weight)
        generated = jax.lax.stop_gradient(_generated(batch).images)
        fake = judge.logits(judge.features(generated), sentence)
        others, apart = self._mismatched(sentence, weight)
        wrong = judge.logits(features, others)
        terms = {
            "real": weighted_mean(discriminator_loss(real, True, self.adversary), weight),
            "fake": weighted_mean(discriminator_loss(fake, False, self.adversary), weight),
            "mismatched": weighted_mean(discriminator_loss(wrong, False, self.adversary), apart),
            "penalty": penalty,
        }
        loss = terms["real"] + (terms["fake"] + terms["mismatched"]) / 2 + penalty
        means = {"logit_real": weighted_mean(real, weight), "logit_fake": weighted_mean(fake, weight)}
        return LossOutput(loss, {"loss": loss, **terms, **means})

    def penalty_loss(self, model: GANNetwork, batch: Batch, key: Array, step: Array, train: bool) -> LossOutput:
        """The penalty alone."""
        assert self.penalty is not None
        judge, images = model.judge, batch["image"]
        each = self._penalised(judge, images, judge.read(batch, len(images)).pooled, self.penalty)[2]
        loss = row_mean(each, batch)
        return LossOutput(loss, {"loss": loss})

    def generator_loss(self, model: GANNetwork, batch: Batch, key: Array, step: Array, train: bool) -> LossOutput:
        """-mean D(G(z, s), s) with hinges, and the terms of `matching` and `paired`.

        The returned state holds the running statistics.
        """
        judge, (images, generator) = model.judge, _generated(batch)
        logits = judge.logits(judge.features(images), judge.read(batch, len(images)).pooled)
        terms = {"adversarial": row_mean(generator_loss(logits, self.adversary), batch)}
        loss = terms["adversarial"]
        if self.matching:
            encoder = cast(ImageEncoder, batch["frozen"])
            terms["matching"] = sum(self.matched(encoder, model, batch, images).values(), jnp.zeros(()))
            loss = loss + self.matching_weight * terms["matching"]
        if self.paired is not None:
            terms["paired"] = row_mean(self.paired.distances(images, batch["image"]), batch)
            loss = loss + self.paired.weight * terms["paired"]
        return LossOutput(loss, {"loss": loss, **terms}, replace(model, generator=generator))

    def matched(self, encoder: ImageEncoder, model: GANNetwork, batch: Batch, images: Array) -> dict[str, Array]:
        """The four losses of matching images to their captions, unweighted: `networks.damsm.caption_losses`."""
        context, weight = model.generator.read(batch, len(images)), row_weights(batch, len(images))
        return caption_losses(encoder, context, images, weight, batch.get("label"), self.gammas)

    def _penalised(
        self, judge: OneWayDiscriminator, images: Array, sentence: Array, penalty: GradientPenalty
    ) -> tuple[Array, Array, Array]:
        """Logits (b,) and features of real pairs, and the penalty (b,)."""
        features, back = jax.vjp(judge.features, images)
        logits, (by_features, by_sentence) = input_gradients(judge.logits, features, sentence)
        gradients = (*back(by_features), *((by_sentence,) if penalty.sentence else ()))
        return logits, features, penalty.weight * gradient_penalty(gradients, penalty.power)

    def _mismatched(self, sentence: Array, weight: Array) -> tuple[Array, Array]:
        """For each image a sentence of another one (b, k), and the weight (b,) of the pair."""
        shift = 1 if self.mismatched == "rolled" else -1
        others = jnp.roll(sentence, shift, 0)
        weight = weight * jnp.roll(weight, shift) * jnp.any(others != sentence, -1)
        return others, weight if self.mismatched == "rolled" else weight * (jnp.arange(len(weight)) < len(weight) - 1)

    def generate(
        self,
        model: GANNetwork,
        condition: Batch,
        keys: Array,
        options: GANSampler,
        progress: Progress | None,
        toward: Toward | None,
    ) -> Array:
        """The images of `sample`, with traced options."""

        def inputs(condition: Batch, keys: Array) -> tuple[Array, Array]:
            return options.noise(keys, self.network.noise), model.generator.read(condition, len(keys)).pooled

        z, sentence = inputs(condition, keys)
        if toward is not None:
            other, after = inputs(toward.condition, toward.keys)
            z, sentence = slerp(z, other, toward.share), lerp(sentence, after, toward.share)
        images = model.generator(z, sentence, False)[0].images
        report(progress, jnp.int32(1), 1, images)
        return images


class GANNetwork(nnx.Module):
    """The parameters of a `GAN`."""

    def __init__(self, config: GAN, key: Array):
        keys, network, judge = jax.random.split(key), config.network, config.discriminator
        what = config.condition, config.sentence
        self.generator: OneStageGenerator = network.init(*what, keys[0], config.compute)
        self.discriminator: OneWayDiscriminator | None = (
            None if judge is None else judge.init(network.size, *what, keys[1], config.compute)
        )

    @property
    def judge(self) -> OneWayDiscriminator:
        """The discriminator of a GAN that has one."""
        assert self.discriminator is not None
        return self.discriminator


def _generated(batch: Batch) -> GeneratedImages:
    return cast(GeneratedImages, batch["outputs"])
