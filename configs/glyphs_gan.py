"""Captions to 32x32 glyphs of ten styles by DF-GAN: one pass of the generator makes an image.

    t2i train configs/glyphs_gan.py --run runs/glyphs/gan
    t2i evaluate runs/glyphs/gan --matching runs/glyphs/damsm --noises 100
    t2i train configs/glyphs_gan.py --run runs/glyphs/gan_control data.swapped_captions=True

The text is that of the DAMSM of `glyphs_damsm.py`. Any other frozen encoder serves: `text=MiniLM(16, pooled=True)` with
`condition=CrossAttnFeatures(MiniLM.dim, 1, trained_null=False)`. With SSA-GAN's blocks instead: `OneStage(..., block=
SemanticSpatial(32))`; with R1 in place of the matching-aware penalty: `penalty=R1`; with the losses of DAMSM:
`matching="runs/glyphs/damsm"`. What was tried is in docs/results/gan.md.
"""

from dataclasses import replace

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.gan import GAN
from t2i_jax.networks.condition import SentenceAndWords
from t2i_jax.networks.one_stage import OneStage
from t2i_jax.networks.one_way import OneWay
from t2i_jax.sampling.options import GANSampler
from t2i_jax.text.damsm import DamsmText
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

# Without momentum, and the discriminator faster than the generator, as published. At twice the generator's rate the
# images are white by step 250, and stay so: tanh has no slope there.
OPTIMIZER = Optimizer("adam", 1e-4, schedule="constant", warmup=0, b1=0.0, b2=0.9, weight_decay=0.0, clip=0.0)

experiment = Experiment(
    model=GAN(
        OneStage((32, 32), width=16, noise=32),
        OneWay(16),
        condition=SentenceAndWords(256, 20),
        sampling=GANSampler(0.88, 2.0),
    ),
    data=Data(ArrayRecord("data/glyphs_all"), image_size=32, batch_size=32),
    train=Train(
        steps=10000,
        optimizer=OPTIMIZER,
        optimizers={"discriminator": replace(OPTIMIZER, learning_rate=4e-4)},
        ema=0.998,
        ema_params=("generator",),
        evaluate_every=0,  # the losses of a game do not say how good its images are
        preview_every=1000,
        save_every=500,
    ),
    text=DamsmText("runs/glyphs/damsm"),
)
