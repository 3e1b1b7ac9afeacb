"""Captions to 32x32 glyphs by DF-GAN in pixels: one pass of the generator makes an image.

A frozen sentence encoder takes the place of DAMSM's. With SSA-GAN's blocks instead: `OneStage(..., block=
SemanticSpatial(32))`; with R1 in place of the matching-aware penalty: `penalty=R1`; with a trained DAMSM:
`condition=SentenceAndWords(dim, words)`, `text=DamsmText("runs/damsm")`, and for its losses `matching="runs/damsm"`.
"""

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.gan import GAN
from t2i_jax.networks.condition import CrossAttnFeatures
from t2i_jax.networks.one_stage import OneStage
from t2i_jax.networks.one_way import OneWay
from t2i_jax.sampling.options import GANSampler
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=GAN(
        OneStage((32, 32), width=16),
        OneWay(16),
        condition=CrossAttnFeatures(MiniLM.dim, 1, trained_null=False),
        sampling=GANSampler(0.88, 2.0),
    ),
    data=Data(ArrayRecord("data/glyphs"), image_size=32, batch_size=32),
    train=Train(
        steps=6000,
        # Without momentum, and the discriminator faster than the generator, as published.
        optimizer=Optimizer("adam", 1e-4, schedule="constant", warmup=0, b1=0.0, b2=0.9, weight_decay=0.0, clip=0.0),
        optimizers={
            "discriminator": Optimizer(
                "adam", 4e-4, schedule="constant", warmup=0, b1=0.0, b2=0.9, weight_decay=0.0, clip=0.0
            )
        },
        ema=0.998,
        ema_params=("generator",),
        evaluate_every=1000,
        preview_every=500,
        save_every=500,
    ),
    text=MiniLM(16, pooled=True),
)
