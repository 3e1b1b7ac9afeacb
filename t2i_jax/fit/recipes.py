"""The experiments of a plan: those of `configs/`, at the size, the width and the length that a data set allows."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import NamedTuple

import jax

from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.kl import KL
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.core.conditions import Condition as ConditionConfig
from t2i_jax.core.family import path_of, with_fields
from t2i_jax.core.narrow import gives_features
from t2i_jax.core.types import Compute, Family
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.fit.plan import FitPlan
from t2i_jax.heads import DiffusionHead, SoftmaxHead
from t2i_jax.models.ar import AR
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.models.gan import GAN, R1
from t2i_jax.models.masked import Masked
from t2i_jax.networks.condition import CaptionEncoder, ClassEmbedder, Conditioning, TextFeatures
from t2i_jax.networks.dit import DiT
from t2i_jax.networks.one_stage import OneStage
from t2i_jax.networks.one_way import OneWay
from t2i_jax.nn.transformer import Transformer
from t2i_jax.noise.processes import Flow
from t2i_jax.presets import ADALN, BERT, MAR, MASKGIT
from t2i_jax.sampling.options import ARSampler, DiffusionSampler, GANSampler, MaskedSampler
from t2i_jax.sampling.orders import MaskRate, Sets
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

CODES = 512
"""Codes of a VQGAN that is trained here."""


class Shape(NamedTuple):
    """Size of a Transformer, or of a codec or a GAN in proportion."""

    width: int
    depth: int
    heads: int

    @property
    def cost(self) -> float:
        """FLOPs of a token in proportion."""
        return self.depth * self.width**2

    def transformer(self, kind: Transformer) -> Transformer:
        return dataclasses.replace(kind, width=self.width, depth=self.depth, heads=self.heads, mlp=0, dropout=0.0)


SHAPES = (Shape(128, 3, 4), Shape(192, 4, 4), Shape(256, 6, 4), Shape(512, 8, 8), Shape(768, 12, 12))
USUAL = SHAPES[1]
"""That of the quickstart, which is measured."""
WANTED = 2500
"""Steps that a larger model has to be given; else a smaller one is trained for longer."""
LEAST = 500
"""Steps below which a smaller model is trained."""
TIMES = 400
"""How often each picture is seen at most; those of small data sets are known by then."""


def largest_shape(pictures: int) -> Shape:
    """The largest model for so many pictures."""
    ends = (2_000, 20_000, 200_000)
    return SHAPES[1 + sum(pictures >= end for end in ends)]


def choose_shape(steps: float, pictures: int) -> Shape:
    """The model that is given enough steps in the time in which the usual one makes `steps` of them."""
    allowed = [shape for shape in SHAPES if shape.cost <= largest_shape(pictures).cost]
    of = lambda shape: steps * USUAL.cost / shape.cost
    if steps < LEAST:
        return SHAPES[0]
    return max((shape for shape in allowed if shape == USUAL or of(shape) >= WANTED), key=lambda shape: shape.cost)


def batch_size(pictures: int, devices: int, accelerated: bool) -> int:
    """Images of a batch: 32 on a CPU, 128 on an accelerator, no more than there are pictures; a multiple of devices."""
    most = 128 if accelerated else 32
    size = min(most, 1 << max(3, int(math.log2(max(pictures, 1)))))
    return -(-size // devices) * devices


def lengths(steps: int, **fields: object) -> Train:
    """The training of so many steps, saved ten times and shown three times."""
    return Train(
        steps=steps,
        ema=0.99 if steps >= 400 else 0.9 if steps >= 40 else 0.0,
        log_every=max(1, min(20, steps // 10)),
        save_every=max(1, steps // 10),
        evaluate_every=0,
        preview_every=max(1, steps // 3),
        previews=16,
        **fields,  # pyright: ignore[reportArgumentType]
    )


def muon(steps: int, rate: float, adam: float) -> Optimizer:
    warmup = min(50, steps // 10)
    return Optimizer("muon", rate, adam_learning_rate=adam, warmup=warmup, final=0.05, weight_decay=0.01)


def pictures_of(plan: FitPlan) -> Data:
    """The data set as it is, in batches for this machine."""
    accelerated = jax.default_backend() != "cpu"
    size = batch_size(len(plan.look.usable), jax.device_count(), accelerated)
    threads = min(16, os.cpu_count() or 2) if accelerated else plan.pictures.threads
    return dataclasses.replace(plan.pictures, batch_size=size, threads=threads)


def codec_experiment(plan: FitPlan, steps: int, channels: int = 32) -> Experiment:
    """The training of the plan's codec."""
    patch = 2 if plan.size <= 64 else 4
    levels = int(math.log2(max(plan.factor // patch, 1))) + 1
    patch = min(patch, plan.factor)
    sizes = AutoencoderConfig(
        channels,
        (2,) * levels if levels < 3 else (1, *(2,) * (levels - 1)),
        blocks=1,
        decoder_blocks=1,
        latent=64 if plan.trains == "vq" else 16,
        moments=plan.trains == "kl",
        attention=(),
        middle_attention=False,
        patch=patch,
        groups=16,
    )
    plain = {"pixels": "l1", "perceptual": 0.0, "adversarial": 0.0}
    model = (
        VQGAN(sizes, QuantizerConfig(codes=CODES, dim=8, decay=0.9, revive=0.2), **plain)
        if plan.trains == "vq"
        else KL(sizes, kl=1e-4, **plain)
    )
    optimizer = Optimizer(learning_rate=3e-3, warmup=min(60, steps // 10), final=0.05, weight_decay=0.01)
    return Experiment(model, pictures_of(plan), lengths(steps, optimizer=optimizer))


def codes_of(plan: FitPlan) -> int:
    """How many values a code has; of vectors, how many numbers."""
    if plan.given is not None:
        return plan.given.code.values if plan.is_discrete else plan.given.code.shape[0]
    return CODES if plan.trains == "vq" else 16


def condition_of(plan: FitPlan, shape: Shape, pieces: int) -> ConditionConfig:
    """What the model reads; pieces: of the vocabulary of a learned encoder."""
    if plan.text == "minilm":
        return TextFeatures(MiniLM.dim, 1)
    if plan.text == "learned":
        return CaptionEncoder(pieces, plan.length, width=shape.width, depth=2, heads=shape.heads)
    return ClassEmbedder(plan.classes)


def family_of(plan: FitPlan, shape: Shape, pieces: int) -> Family:
    """The model of a plan."""
    if plan.base is not None:
        return _started(plan)
    drop = 0.1 if plan.condition != "none" else 0.0
    conditioning = Conditioning(condition_of(plan, shape, pieces), dropout=drop)
    compute = Compute() if jax.default_backend() == "cpu" else Compute("bfloat16")
    guided = plan.condition != "none"
    if plan.family == "ar":
        cool = 0.25 if plan.condition == "captions" else 0.9
        return AR(
            codes_of(plan),
            plan.grid,
            transformer=dataclasses.replace(shape.transformer(Transformer()), qk_norm=True),
            conditioning=conditioning,
            token_dropout=0.0,
            compute=compute,
            sampling=ARSampler(guidance=1.0, temperature=cool),
        )
    if plan.family == "masked" and plan.is_discrete:
        return dataclasses.replace(
            MASKGIT,
            grid=plan.grid,
            head=SoftmaxHead(codes_of(plan)),
            rate=MaskRate("cosine"),
            transformer=shape.transformer(BERT),
            conditioning=conditioning,
            compute=compute,
            sampling=MaskedSampler(
                guidance=2.0 if guided else 1.0, iterations=16, temperature=0.8, choice_temperature=2.0
            ),
        )
    if plan.family == "masked":
        return Masked(
            grid=plan.grid,
            head=DiffusionHead(dim=codes_of(plan), width=shape.width, depth=3, respacing="50"),
            order=Sets(),
            transformer=dataclasses.replace(shape.transformer(MAR), depth=max(1, shape.depth // 2)),
            buffer=4,
            conditioning=conditioning,
            compute=compute,
            sampling=MaskedSampler(guidance=1.0, iterations=16, temperature=0.8),
        )
    if plan.family == "diffusion":
        rows = plan.grid[0]
        patch = next(p for p in (1, 2, 4) if rows // p <= 8 or p == 4) if rows % 4 == 0 else 1
        network = DiT(
            plan.grid,
            channels=codes_of(plan) if plan.codec or plan.trains else 3,
            patch=patch,
            transformer=shape.transformer(ADALN),
            conditioning=conditioning,
            learn_variance=False,
        )
        sampling = DiffusionSampler(steps=25, guidance=2.0 if guided else 1.0)
        return Diffusion(network, Flow(), "velocity", solver="dpm++", compute=compute, sampling=sampling)
    return GAN(
        OneStage((plan.size, plan.size), width=max(8, shape.width // 12), noise=32),
        OneWay(max(8, shape.width // 12)),
        condition=conditioning.what,
        penalty=R1 if plan.condition == "none" else GAN.penalty,
        compute=compute,
        sampling=GANSampler(0.88, 2.0),
    )


def _started(plan: FitPlan) -> Family:
    """The model to begin with, with the classes of this data set."""
    model = plan.family_of_start()
    fresh = plan.condition == "classes" and path_of(model, "condition")
    return with_fields(model, condition=ClassEmbedder(plan.classes)) if fresh else model


def train_of(plan: FitPlan, steps: int) -> Train:
    """The training of the model of a plan."""
    if plan.base is not None:
        rate = muon(steps, 3e-3, 5e-4) if plan.family_of_start().capabilities.token_by_token else Optimizer()
        rate = dataclasses.replace(rate, warmup=min(50, steps // 10))
        return lengths(steps, optimizer=rate, start=plan.start)
    if plan.family == "gan":
        # Without momentum, the discriminator faster than the generator, as published.
        game = Optimizer("adam", 1e-4, schedule="constant", warmup=0, b1=0.0, b2=0.9, weight_decay=0.0, clip=0.0)
        faster = {"discriminator": dataclasses.replace(game, learning_rate=4e-4)}
        return lengths(steps, optimizer=game, optimizers=faster, ema_params=("generator",))
    rates = (1e-2, 2e-3) if plan.family == "diffusion" else (2e-2, 3e-3)
    return lengths(steps, optimizer=muon(steps, *rates))


def model_experiment(
    plan: FitPlan, shape: Shape, steps: int, codec: str, encoded: str, vocabulary: str = "", pieces: int = 0
) -> Experiment:
    """The training of the plan's model.

    codec: folder of the codec; empty for pixels. encoded: folder of the encoded data; empty for the pictures.
    vocabulary, pieces: file and size of the vocabulary of a learned text encoder.
    """
    data = pictures_of(plan)
    if encoded:
        records = ArrayRecord(encoded)
        data = Data(records, records, image_size=plan.size, batch_size=data.batch_size)
        data = dataclasses.replace(data, empty_captions=plan.pictures.empty_captions)
    text = plan.tokenizer(vocabulary)
    return Experiment(family_of(plan, shape, pieces), data, train_of(plan, steps), codec=codec, text=text)


def is_encoded(plan: FitPlan) -> bool:
    """Whether codes or features are computed before the training."""
    return bool(plan.codec or plan.trains or gives_features(plan.tokenizer("")))
