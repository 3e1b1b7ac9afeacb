"""Text-to-image GANs in stages, each of whose images has a discriminator of its own.

One family for StackGAN (Zhang et al. 2017, arXiv:1612.03242), StackGAN++ (Zhang et al. 2018, arXiv:1710.10916), AttnGAN
(Xu et al. 2018, arXiv:1711.10485) and DM-GAN (Zhu et al. 2019, arXiv:1904.01310). `networks/staged_generator.py` has
their stages; the terms of their losses are values of the config.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Annotated, Literal, NamedTuple, NotRequired, TypedDict

import jax
import jax.numpy as jnp
from einops import reduce, repeat
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Float, typed
from t2i_jax.core.conditions import Batch, Condition
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import FREE, Checked, NotNegative, Size, values
from t2i_jax.core.specs import CodeSpec, SampleSpec
from t2i_jax.core.types import Compute, LossOutput, Objective, Progress, Toward
from t2i_jax.networks.condition import Context, SentenceAndWords, check_vectors, read_context
from t2i_jax.networks.damsm import ImageEncoder, caption_losses
from t2i_jax.networks.staged_discriminator import ScaleDiscriminator, ScaleDiscriminatorNetwork
from t2i_jax.networks.staged_generator import StagedGenerator, StageOutput
from t2i_jax.nn.adversarial import (
    Adversary,
    Paired,
    discriminator_loss,
    gaussian_kl,
    generator_loss,
    gradient_penalty,
    input_gradients,
)
from t2i_jax.nn.layers import replace
from t2i_jax.nn.losses import row_weights, weighted_mean
from t2i_jax.sampling.gan import GANFamily
from t2i_jax.sampling.interpolation import lerp, slerp
from t2i_jax.sampling.options import GANSampler
from t2i_jax.sampling.progress import report
from t2i_jax.text.damsm import load_image_encoder

# -- the terms of the losses


@dataclasses.dataclass(frozen=True)
class Terms(Checked):
    """Weights of the means that a discriminator's loss is a sum of; the default is AttnGAN's and DM-GAN's."""

    real: NotNegative = 1 / 2
    """real images with their captions"""
    wrong: NotNegative = 1 / 3
    """real images with captions of others, which are to be fake"""
    fake: NotNegative = 1 / 3
    """images of the generator with the captions that they were made for"""
    real_alone: NotNegative = 1 / 2
    """real images without caption"""
    wrong_alone: NotNegative = 0.0
    """the real images of wrong pairs without caption, which are to be real"""
    fake_alone: NotNegative = 1 / 3
    """images of the generator without caption"""

    @property
    def alone(self) -> bool:
        """Whether images alone have a weight."""
        return bool(self.real_alone or self.wrong_alone or self.fake_alone)


PAIRS = Terms(1.0, 0.5, 0.5, 0.0, 0.0, 0.0)
"""Of StackGAN's first stage, and of StackGAN++ without the loss on images alone."""
SUMS = Terms(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
"""Of StackGAN++."""
ALONE = Terms(0.0, 0.0, 0.0, 1.0, 0.0, 1.0)
"""Of an unconditional StackGAN++."""


class GeneratedStages(NamedTuple):
    """What the generator makes of a batch, for the losses of all objectives."""

    stages: tuple[StageOutput, ...]
    context: Context | None
    generator: ConditionalGenerator
    """with the running statistics after this batch"""


class StagedBatch(TypedDict):
    """What the losses read of a batch, besides the fields of the condition."""

    image: Array
    """float (b, i, j, 3) in [-1, 1]"""
    outputs: GeneratedStages
    """of `forward`"""
    label: NotRequired[Array]
    """int (b,), classes whose captions are no negatives of each other in the matching loss"""
    weight: NotRequired[Array]
    frozen: NotRequired[ImageEncoder]
    """of `frozen()`, if there is a matching loss"""


# -- the family


@dataclasses.dataclass(frozen=True)
class StagedGAN(GANFamily["StagedGANNetwork"]):
    """A generator in stages, a discriminator for each of its images, and their losses.

    Objectives: `discriminator0`, `discriminator1`, ..., from the smallest image on, and `generator`, after them. Only
    the discriminator's own objective keeps its running statistics and its power iterations.
    """

    network: StagedGenerator = StagedGenerator()
    discriminator: ScaleDiscriminator | None = ScaleDiscriminator()
    """of every scale; None: none, as in a file of the generator alone, and the model only samples"""
    condition: Condition = SentenceAndWords()
    """`ClassEmbedder(0)`: an unconditional model"""
    sentence: Size = 256
    """size of the sentence and of its words, for conditions that are projected"""
    judged: Literal["sentence", "mean"] = "sentence"
    """what discriminators read of the condition: the sentence, or the mean of the conditioning augmentation, through
    which the generator's loss has a gradient"""
    terms: tuple[Terms, ...] = (Terms(),)
    """of each discriminator's loss; the last serves all further scales"""
    adversarial: NotNegative = 1.0
    """weight of the generator's loss at images with captions"""
    adversarial_alone: NotNegative = 1.0
    """the same at images alone"""
    mismatched: Literal["rolled", "shifted", "images"] = "rolled"
    """wrong pairs: features of real images with the caption of the image before, the last one's for the first; with
    that of the next, and none for the last (AttnGAN, DM-GAN); or captions with the image before, which passes the whole
    discriminator (StackGAN++)"""
    adversary: Adversary = "vanilla"
    penalty: NotNegative = 0.0
    """weight of half the squared gradient of each discriminator's logits at real images (R1, Mescheder et al. 2018),
    which is an update of its own by the discriminator's optimizer"""
    penalty_every: Size = 1
    """training steps from one such update to the next"""
    kl: NotNegative = 1.0
    """weight of the mean KL of the conditioning augmentations from N(0, 1)"""
    color: NotNegative = 0.0
    """weight of the squared differences of the colours' means, and of their covariances five times, between an image
    and the next smaller one (StackGAN++, eq. 7)"""
    matching: str = ""
    """run or released folder, or published file, of the DAMSM whose text encoder gives the condition: its image encoder
    judges the last image; empty: none"""
    matching_weight: NotNegative = 5.0
    """weight of the four losses of words and sentences (AttnGAN, eq. 14)"""
    gammas: tuple[float, float, float] = (4.0, 5.0, 10.0)
    """their factors gamma1, gamma2 and gamma3"""
    paired: Paired | None = None
    """the images of all stages are also compared with the real ones of their sentences"""
    alternating: bool = True
    """the generator learns from the discriminators as updated in the same step; else all from those before it"""
    compute: Compute = Compute()
    sampling: Annotated[GANSampler, FREE] = GANSampler()

    def __post_init__(self):
        super().__post_init__()
        self.network.check_condition(self.is_conditional)
        if self.is_conditional:
            check_vectors(self.condition)
        if self.judged == "mean" and not self.is_conditional:
            raise ConfigError("judged 'mean': an unconditional model has no conditioning augmentation")
        if self.matching and not self.is_conditional:
            raise ConfigError("matching: an unconditional model has no words to match")
        if self.paired is not None and not self.is_conditional:
            raise ConfigError("paired: an unconditional model has no real image that an image is to be like")
        if not self.terms:
            raise ConfigError("terms: at least those of one scale")
        for n in range(len(self.network.sizes)) if self.discriminator and self.is_conditional else ():
            last = n == len(self.network.sizes) - 1
            if self.terms_of(n).alone and not self.discriminator.judges_alone(last):
                raise ConfigError(f"terms of scale {n}: images alone, which discriminator.alone leaves out there")

    def terms_of(self, scale: int) -> Terms:
        """The terms of the discriminator of a scale."""
        return self.terms[min(scale, len(self.terms) - 1)]

    @property
    def is_conditional(self) -> bool:
        return self.condition.spec.classes != 0

    @property
    def word_size(self) -> int:
        """Size of words and sentence; 0 for an unconditional model."""
        return self.condition.token_width(self.sentence) if self.is_conditional else 0

    def sample_spec(self) -> SampleSpec:
        """Shape and dtype of a sample: pixels."""
        return SampleSpec((self.network.size, self.network.size), CodeSpec("float32", (3,)))

    def init(self, key: Array) -> StagedGANNetwork:
        """A model with fresh parameters."""
        return StagedGANNetwork(self, key)

    def frozen(self) -> ImageEncoder:
        """The image encoder of `matching`, which the generator's loss reads as `batch["frozen"]`."""
        return load_image_encoder(self.matching)

    def objectives(self) -> dict[str, Objective[StagedGANNetwork, StagedBatch]]:
        """The discriminators, their penalties, and the generator after them.

        Errors: `ConfigError` without discriminators.
        """
        if self.discriminator is None:
            raise ConfigError("discriminator None: a generator alone cannot be trained, it only samples")
        found: dict[str, Objective[StagedGANNetwork, StagedBatch]] = {}
        for n in range(len(self.network.sizes)):
            name, params = f"discriminator{n}", (f"discriminators.{n}",)
            found[name] = Objective(partial(self.discriminator_loss, scale=n), params)
            if self.penalty:
                loss = partial(self.penalty_loss, scale=n)
                found[f"penalty{n}"] = Objective(loss, params, name, self.penalty_every, after=(name,))
        after = tuple(found) if self.alternating else ()
        return {**found, "generator": Objective(self.generator_loss, ("generator",), after=after)}

    # -- training

    def forward(
        self, model: StagedGANNetwork, batch: Batch, key: Array, step: Array, train: bool = True
    ) -> GeneratedStages:
        """The images of a batch, one for each caption, by the generator as it is."""
        b, noises = len(batch["image"]), jax.random.split(key)
        noise = jax.random.normal(noises[0], (b, self.network.noise))
        augmentation = jax.random.normal(noises[1], (b, self.augmentation_noise))
        return model.generator(model.generator.read(batch, b), noise, augmentation, train)

    @property
    def augmentation_noise(self) -> int:
        """Size of the noise of the conditioning augmentations."""
        return self.network.augmentation.size * sum(self.network.augments) if self.is_conditional else 0

    def judged_condition(self, outputs: GeneratedStages, scale: int, by_generator: bool = False) -> Array | None:
        """What the discriminator of a scale reads of the condition, (b, c); None for an unconditional model."""
        if outputs.context is None:
            return None
        code = outputs.stages[scale].code
        if self.judged == "mean" and code is not None:
            return code.mean if by_generator else jax.lax.stop_gradient(code.mean)
        return jax.lax.stop_gradient(outputs.context.pooled)

    def discriminator_loss(
        self,
        model: StagedGANNetwork,
        batch: StagedBatch,
        key: Array,
        step: Array,
        train: bool = True,
        *,
        scale: int,
    ) -> LossOutput:
        """Loss of the discriminator of one scale on real images, wrong pairs and the generator's images."""
        outputs, weight = batch["outputs"], self.weights(batch)
        real = shrunk(batch["image"], self.network.sizes[scale])
        fake = jax.lax.stop_gradient(outputs.stages[scale].image)
        condition = self.judged_condition(outputs, scale)
        means, judge = self.judge(model.discriminators[scale], real, fake, condition, train, weight=weight)
        loss, metrics = self.weighed(means, scale)
        judges = [judge if n == scale else other for n, other in enumerate(model.discriminators)]
        return LossOutput(loss, {"loss": loss, **metrics}, replace(model, discriminators=nnx.List(judges)))

    def penalty_loss(
        self,
        model: StagedGANNetwork,
        batch: StagedBatch,
        key: Array,
        step: Array,
        train: bool = True,
        *,
        scale: int,
    ) -> LossOutput:
        """penalty / 2 |g|^2, g the gradient of the logits of real images, with and without captions, by the images.

        Norms use their running statistics, so that each logit depends on its own image alone.
        """
        judge, condition = model.discriminators[scale], self.judged_condition(batch["outputs"], scale)

        def logits(images: Array) -> Array:
            features, after = judge.features(images.astype(self.compute.dtype), False)
            found = jnp.zeros(len(images)) if after.alone is None else after.judges_alone(features)
            if condition is not None:
                found = found + after.matches(features, condition.astype(self.compute.dtype), False)[0]
            return found

        _, slopes = input_gradients(logits, shrunk(batch["image"], self.network.sizes[scale]))
        weight = self.weights(batch)
        loss = self.penalty / 2 * weighted_mean(gradient_penalty(slopes), weight)
        return LossOutput(loss, {"loss": loss})

    def judge(
        self,
        judge: ScaleDiscriminatorNetwork,
        real: Array,
        fake: Array,
        condition: Array | None,
        train: bool,
        wrong: Array | None = None,
        weight: Array | None = None,
    ) -> tuple[dict[str, Array], ScaleDiscriminatorNetwork]:
        """The mean loss at each kind of image, by its name in `Terms`, and the renewed discriminator.

        real, fake, wrong: images float (b, i, j, 3) in [-1, 1]; wrong, with `mismatched` "images", are by default the
        real ones rolled by one. condition: (b, c). weight: of each example (b,), 1 by default.
        """
        weight = jnp.ones(len(real)) if weight is None else weight
        cast = lambda x: x.astype(self.compute.dtype)
        seen, by_image = {}, self.mismatched == "images" and condition is not None
        seen["real"], judge = judge.features(cast(real), train)
        if by_image:
            wrong = jnp.roll(real, 1, 0) if wrong is None else wrong
            seen["wrong"], judge = judge.features(cast(wrong), train)
        seen["fake"], judge = judge.features(cast(fake), train)
        means: dict[str, Array] = {}
        if condition is not None:
            pairs = {k: (h, condition, weight) for k, h in seen.items()}
            if not by_image:
                if self.mismatched == "shifted":
                    pairs["wrong"] = seen["real"][:-1], condition[1:], weight[:-1] * weight[1:]
                else:
                    pairs["wrong"] = seen["real"], jnp.roll(condition, 1, 0), weight * jnp.roll(weight, 1)
            for kind, (features, caption, share) in pairs.items():
                logits, judge = judge.matches(features, cast(caption), train)
                means[kind] = weighted_mean(discriminator_loss(logits, kind == "real", self.adversary), share)
        if judge.alone is not None:
            for kind, features in seen.items():
                logits = judge.judges_alone(features)
                means[f"{kind}_alone"] = weighted_mean(
                    discriminator_loss(logits, kind != "fake", self.adversary), weight
                )
        return means, judge

    @staticmethod
    def weights(batch: StagedBatch) -> Array:
        """The weight (b,) of each example."""
        return row_weights({"weight": batch["weight"]} if "weight" in batch else {}, len(batch["image"]))

    def weighed(self, means: dict[str, Array], scale: int) -> tuple[Array, dict[str, Array]]:
        """The loss of a scale: the sum of the means that have a weight; and these means."""
        weights = values(self.terms_of(scale))
        terms = {k: v for k, v in means.items() if weights[k]}
        return sum((weights[k] * v for k, v in terms.items()), jnp.zeros(())), terms

    def generator_loss(
        self, model: StagedGANNetwork, batch: StagedBatch, key: Array, step: Array, train: bool = True
    ) -> LossOutput:
        """Loss of the generator: to fool every discriminator, and the terms that have a weight."""
        outputs, weight = batch["outputs"], self.weights(batch)
        terms = self.fooled(model, outputs, weight, train) | self.regularised(outputs, weight)
        loss = sum(terms.values(), jnp.zeros(()))
        if self.matching:
            terms |= {f"matching/{k}": v for k, v in self.matched(outputs, batch, weight).items()}
            loss = loss + self.matching_weight * sum(v for k, v in terms.items() if k.startswith("matching/"))
        if self.paired is not None:
            distances = [self.paired.distances(stage.image, batch["image"]) for stage in outputs.stages]
            terms["paired"] = weighted_mean(sum(distances, jnp.zeros(())), weight)
            loss = loss + self.paired.weight * terms["paired"]
        return LossOutput(loss, {"loss": loss, **terms}, replace(model, generator=outputs.generator))

    def fooled(
        self, model: StagedGANNetwork, outputs: GeneratedStages, weight: Array, train: bool = True
    ) -> dict[str, Array]:
        """The weighted loss by each discriminator, by the name of its scale. They keep no statistics of these calls."""
        found = {}
        for n, (judge, stage) in enumerate(zip(model.discriminators, outputs.stages, strict=True)):
            features, judge = judge.features(stage.image.astype(self.compute.dtype), train)
            condition, terms = self.judged_condition(outputs, n, by_generator=True), jnp.zeros(())
            if condition is not None and self.adversarial:
                logits, _ = judge.matches(features, condition.astype(self.compute.dtype), train)
                terms = terms + self.adversarial * weighted_mean(generator_loss(logits, self.adversary), weight)
            if judge.alone is not None and self.adversarial_alone:
                logits = judge.judges_alone(features)
                terms = terms + self.adversarial_alone * weighted_mean(generator_loss(logits, self.adversary), weight)
            found[f"adversarial{n}"] = terms
        return found

    def regularised(self, outputs: GeneratedStages, weight: Array) -> dict[str, Array]:
        """The weighted KL of the conditioning augmentations, and the weighted consistency of colours."""
        terms: dict[str, Array] = {}
        codes = [stage.code for stage, own in zip(outputs.stages, self.network.augments, strict=True) if own]
        divergences = [gaussian_kl(code.mean, code.log_variance) for code in codes if code is not None]
        if self.kl and divergences:
            terms["kl"] = self.kl * weighted_mean(sum(divergences, jnp.zeros(())), weight)
        if self.color and len(outputs.stages) > 1:
            images = [stage.image for stage in outputs.stages]
            pairs = map(color_differences, images[1:], map(jax.lax.stop_gradient, images))
            terms["color"] = self.color * sum((means + 5 * covariances for means, covariances in pairs), jnp.zeros(()))
        return terms

    def matched(self, outputs: GeneratedStages, batch: StagedBatch, weight: Array) -> dict[str, Array]:
        """The four losses of matching the last image to its caption, unweighted: `networks.damsm.caption_losses`.

        Errors: ValueError if the batch has no image encoder.
        """
        context, encoder = outputs.context, batch.get("frozen")
        if encoder is None or context is None:
            raise ValueError('a matching loss needs batch["frozen"], which `StagedGAN.frozen()` gives')
        image, classes = outputs.stages[-1].image, batch.get("label")
        return caption_losses(encoder, context, image, weight, classes, self.gammas)

    # -- sampling

    def generate(
        self,
        model: StagedGANNetwork,
        condition: Batch,
        keys: Array,
        options: GANSampler,
        progress: Progress | None,
        toward: Toward | None,
    ) -> Array:
        """The images of `sample`, those of the last stage, with traced options."""
        draw = lambda keys: options.noise(keys, self.network.noise + self.augmentation_noise)
        context, z = model.generator.read(condition, len(keys)), draw(keys)
        if toward is not None:
            z, there = slerp(z, draw(toward.keys), toward.share), model.generator.read(toward.condition, len(keys))
            if context is not None and there is not None:
                context = between(context, there, toward.share)
        noise, augmentation = jnp.split(z, [self.network.noise], -1)
        stages = model.generator(context, noise, augmentation).stages
        for n, stage in enumerate(stages):
            times = self.network.size // stage.image.shape[1]
            large = repeat(stage.image, "b i j c -> b (i p) (j q) c", p=times, q=times)
            report(progress, jnp.int32(n + 1), len(stages), large)
        return stages[-1].image


class ConditionalGenerator(nnx.Module):
    """The condition, None for an unconditional model, and the generator that reads it."""

    def __init__(self, config: StagedGAN, key: Array):
        keys = jax.random.split(key)
        self.config = config
        self.condition = config.condition.init(keys[0], config.sentence) if config.is_conditional else None
        self.network = config.network.init(config.word_size, keys[1])

    def read(self, batch: Batch, b: int) -> Context | None:
        """The encoded condition of a batch of b rows; None for an unconditional model."""
        if self.condition is None:
            return None
        return read_context(self.config.condition, self.condition, batch, jnp.zeros(b, bool), self.config.compute.dtype)

    def __call__(
        self, context: Context | None, noise: Array, augmentation: Array, train: bool = False
    ) -> GeneratedStages:
        """The images of all stages, from an encoded condition, and noise (b, n) and (b, m c)."""
        stages, network = self.network(context, noise, augmentation, self.config.compute.dtype, train)
        return GeneratedStages(stages, context, replace(self, network=network))


def between(here: Context, there: Context, share: Array) -> Context:
    """The condition between two, at `share` (b,) of the way; on it, words that either has may be read."""
    tokens = lerp(here.tokens, there.tokens, share).astype(here.tokens.dtype)
    mask = (here.mask & (share < 1)[:, None]) | (there.mask & (share > 0)[:, None])
    return Context(lerp(here.pooled, there.pooled, share), tokens, mask)


class StagedGANNetwork(nnx.Module):
    """The parameters of a `StagedGAN`."""

    def __init__(self, config: StagedGAN, key: Array):
        sizes, judge = config.network.sizes, config.discriminator
        keys, c = jax.random.split(key, 1 + len(sizes)), config.word_size
        c = config.network.augmentation.size if c and config.judged == "mean" else c
        self.generator = ConditionalGenerator(config, keys[0])
        self.discriminators = nnx.List(
            [judge.init(size, c, size == sizes[-1], k) for size, k in zip(sizes, keys[1:], strict=True)]
            if judge
            else []
        )


@typed
def shrunk(images: Float[Array, "b i j c"], size: int) -> Float[Array, "b {size} {size} c"]:
    """Images (b, i, j, c) of a size that is a multiple of `size`, by the means of squares: (b, size, size, c)."""
    times = images.shape[1] // size
    return reduce(images, "b (i p) (j q) c -> b i j c", "mean", p=times, q=times)


@typed
def colors(images: Float[Array, "b i j 3"]) -> tuple[Float[Array, "b 3"], Float[Array, "b 3 3"]]:
    """Means (b, 3) and covariances (b, 3, 3) of the pixels of images (b, i, j, 3)."""
    average = images.mean((1, 2))
    away = images - average[:, None, None]
    return average, jnp.einsum("bijc,bijd->bcd", away, away) / (images.shape[1] * images.shape[2])


def color_differences(images: Array, others: Array) -> tuple[Array, Array]:
    """Mean squared differences of the colours' means, and of their covariances, between images of any two sizes."""
    mean_difference, covariance_difference = (
        jnp.mean((a - b) ** 2) for a, b in zip(colors(images), colors(others), strict=True)
    )
    return mean_difference, covariance_difference
