"""Gaussian diffusion on 32x32 glyphs: pixels or latents, noise or velocity; guidance, solvers and steps.

Latents are those of `glyphs_kl.py`, stored with the captions' features. Every twelfth image is used, so that minutes
of training are many passes over them. `t2i compare` runs it.
"""

import dataclasses
from dataclasses import replace
from typing import Any

from t2i_jax.comparison import Comparison, Sweep, Variant
from t2i_jax.core.conditions import Condition
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.clip import CLIP
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.models.noised_classifier import NoisedClassifier
from t2i_jax.networks.clip import CLIPTowers
from t2i_jax.networks.condition import ClassEmbedder, Conditioning, TextFeatures
from t2i_jax.networks.dit import DiT
from t2i_jax.networks.unet import UNet
from t2i_jax.nn.transformer import Transformer
from t2i_jax.noise.processes import Discrete, Flow
from t2i_jax.presets import ADALN
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.text.minilm import MiniLM
from t2i_jax.text.sentencepiece import SentencePiece
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

TEXT = MiniLM(16, pooled=True)
CONDITION = TextFeatures(MiniLM.dim, 1)
CONCEPTS = 1900
"""Classes at most; each image shows another."""
DATA = Data(ArrayRecord("data/glyphs", every=12), image_size=32, batch_size=16)
# Patches of 4x4 pixels make as many tokens as the latents have.
PIXELS: dict[str, Any] = dict(size=(32, 32), channels=3, patch=4)
LATENTS: dict[str, Any] = dict(size=(8, 8), channels=8, patch=1)


def dit(shape: dict[str, Any], condition: Condition = CONDITION, **fields: Any) -> Diffusion:
    transformer = replace(ADALN, width=144, depth=5, heads=4)
    network = DiT(transformer=transformer, conditioning=Conditioning(condition), learn_variance=False, **shape)
    return Diffusion(network, solver="dpm++", sampling=DiffusionSampler(steps=20, guidance=2.0), **fields)


def trained(model: Diffusion, latent: bool) -> Experiment:
    return Experiment(
        model,
        dataclasses.replace(DATA, source=ArrayRecord("data/glyphs_latents", every=12)) if latent else DATA,
        Train(
            optimizer=Optimizer("muon", 1e-2, adam_learning_rate=2e-3, warmup=20, final=0.05, weight_decay=0.01),
            ema=0.98,
        ),
        codec="runs/glyphs/kl_scaled" if latent else "",
        text=None if isinstance(model.condition, ClassEmbedder) else TEXT,
    )


NOISE: dict[str, Any] = dict(process=Discrete("cosine"), predicts="v")
FLOW: dict[str, Any] = dict(process=Flow(), predicts="velocity")

unet = UNet(
    size=(32, 32),
    width=32,
    multipliers=(1, 2, 3),
    blocks=1,
    attention=(4,),
    conditioning=Conditioning(CONDITION),
    learn_variance=False,
    groups=8,
)
runs = {
    # The cosine schedule ends in noise alone, where x0 = (x - sigma eps) / alpha is 20,000 times the error of eps.
    "latent DiT, eps": trained(dit(LATENTS, process=Discrete("scaled_linear"), predicts="eps"), True),
    "latent DiT, flow": trained(dit(LATENTS, **FLOW), True),
    "pixel DiT, flow": trained(dit(PIXELS, **FLOW), False),
    "pixel UNet, v": trained(
        Diffusion(unet, solver="dpm++", sampling=DiffusionSampler(steps=20, guidance=2.0), **NOISE), False
    ),
    "pixel DiT, flow, classes": trained(dit(PIXELS, ClassEmbedder(CONCEPTS), **FLOW), False),
}
MAIN, EPS, PIXEL, CLASSES = "latent DiT, flow", "latent DiT, eps", "pixel DiT, flow", "pixel DiT, flow, classes"

# Classifies noised images.
classifier = Experiment(
    NoisedClassifier(dataclasses.replace(unet, width=24, conditioning=None), CONCEPTS, "adaptive", Flow()),
    dataclasses.replace(DATA, batch_size=32),
    Train(optimizer=Optimizer(learning_rate=2e-3, warmup=20, final=0.05, weight_decay=0.05), ema=0.98),
)
# Compares captions with noised images, by a tokenizer of its own.
judge = Experiment(
    CLIP(
        CLIPTowers(
            Transformer(128, 2, 4, norm="layer", activation="gelu", bias=True),
            Transformer(144, 4, 4, norm="layer", activation="gelu", bias=True),
            dim=128,
            vocabulary=1000,
            length=16,
            last=True,
            size=32,
            patch=4,
            times=1000,
        ),
        scale=20.0,
        learn_scale=False,
        noise=Flow(),
    ),
    dataclasses.replace(DATA, batch_size=64),
    Train(optimizer=Optimizer(learning_rate=2e-3, warmup=20, final=0.05, weight_decay=0.05), ema=0.98),
    text=SentencePiece("data/glyphs/vocabulary.model", length=16),
)

experiment = Comparison(
    title="Gaussian diffusion and flow matching",
    about="""
The models differ in what is noised (pixels, or the latents of a small KL autoencoder), in what the network predicts
(noise, v, velocity) and in the network. Each has about 2 M parameters and equal training compute.
""",
    runs=runs,
    reference=Experiment(runs[MAIN].model, DATA),
    guides={"image-text model": judge, "classifier": classifier},
    flops=6e12,
    sweeps={
        "steps": Sweep(
            "Steps of each solver, latent flow",
            "steps",
            (4, 8, 16),
            {
                solver: Variant(MAIN, family={"solver": solver})
                for solver in ("euler", "heun", "dpm++", "unipc", "dpm++sde")
            },
        ),
        "ancestral": Sweep(
            "Steps of each solver, latent noise prediction",
            "steps",
            (8, 16, 32),
            {
                "DDPM": Variant(EPS, family={"solver": "ddpm"}),
                "DDIM": Variant(EPS, family={"solver": "ddim"}),
                "DPM-Solver++": Variant(EPS),
            },
        ),
        "guidance": Sweep(
            "Classifier-free guidance",
            "guidance",
            (1.0, 2.0, 4.0),
            {name: Variant(name) for name in (MAIN, EPS, PIXEL, CLASSES)},
        ),
        "classifier": Sweep(
            "Guidance by a classifier of noised images",
            "classifier_scale",
            (0.0, 1.0, 3.0, 10.0),
            {
                "without classifier-free guidance": Variant(CLASSES, {"guidance": 1.0}, classifier="classifier"),
                "with guidance 2": Variant(CLASSES, classifier="classifier"),
                "unconditional by class": Variant(CLASSES, {"guidance": 0.0}, classifier="classifier"),
            },
            about="Guidance 0 leaves the model without its condition, so that the classifier alone decides.",
        ),
        "image_text": Sweep(
            "Guidance by an image-text model of noised images",
            "classifier_scale",
            (0.0, 1.0, 3.0),
            {
                "without classifier-free guidance": Variant(PIXEL, {"guidance": 1.0}, classifier="image-text model"),
                "unconditional by caption": Variant(PIXEL, {"guidance": 0.0}, classifier="image-text model"),
            },
        ),
    },
)
