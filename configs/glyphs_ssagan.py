"""Captions to 32x32 glyphs of ten styles by SSA-GAN, with the losses of a DAMSM that reads images of that size.

    t2i train configs/glyphs_damsm.py --run runs/glyphs/damsm32 --data.image-size=32
    t2i train configs/glyphs_ssagan.py --run runs/glyphs/ssagan
    t2i evaluate runs/glyphs/ssagan --matching runs/glyphs/damsm32 --noises 100

What was found with it is in docs/results/gan.md.
"""

from dataclasses import replace

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.gan import GAN
from t2i_jax.networks.condition import SentenceAndWords
from t2i_jax.networks.one_stage import OneStage, SemanticSpatial
from t2i_jax.networks.one_way import OneWay
from t2i_jax.sampling.options import GANSampler
from t2i_jax.text.damsm import DamsmText
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

# Twice the published rates: with BatchNorm they are stable, and learn more than twice as fast here.
OPTIMIZER = Optimizer("adam", 4e-4, schedule="constant", warmup=0, b1=0.0, b2=0.9, weight_decay=0.0, clip=0.0)

experiment = Experiment(
    model=GAN(
        OneStage((32, 32), width=16, noise=32, block=SemanticSpatial(32)),
        OneWay(16),
        condition=SentenceAndWords(256, 20),
        matching="runs/glyphs/damsm32",
        matching_weight=0.2,
        sampling=GANSampler(0.88, 2.0),
    ),
    data=Data(ArrayRecord("data/glyphs_all"), image_size=32, batch_size=32),
    train=Train(
        steps=20000,
        optimizer=OPTIMIZER,
        optimizers={"discriminator": replace(OPTIMIZER, learning_rate=8e-4)},
        ema=0.998,
        ema_params=("generator",),
        evaluate_every=0,  # the losses of a game do not say how good its images are
        preview_every=1000,
        save_every=500,
    ),
    text=DamsmText("runs/glyphs/damsm32"),
)
