"""Captions to 64x64 glyphs of ten styles by an AttnGAN of two stages, 32 -> 64, with the DAMSM of `glyphs_damsm.py`.

    t2i train configs/glyphs_attngan.py --run runs/glyphs/attngan
    t2i sample runs/glyphs/attngan "an emoji of pizza" --watch

DM-GAN's stage is `DynamicMemory(1)`, with `norm="spectral"`; StackGAN++'s is `Joint(1)`, with `judged="mean"`.
"""

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.staged_gan import StagedGAN
from t2i_jax.networks.condition import SentenceAndWords
from t2i_jax.networks.staged_discriminator import ScaleDiscriminator
from t2i_jax.networks.staged_generator import StagedGenerator, WordAttention
from t2i_jax.text.damsm import DamsmText
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=StagedGAN(
        StagedGenerator(64, width=24, stages=(WordAttention(1),)),
        ScaleDiscriminator(32),
        SentenceAndWords(256, 20),
        matching="runs/glyphs/damsm",
    ),
    data=Data(ArrayRecord("data/glyphs_all"), image_size=64, batch_size=32),
    train=Train(
        steps=3000,
        optimizer=Optimizer("adam", 4e-4, schedule="constant", b1=0.5, b2=0.999, weight_decay=0.0, clip=0.0),
        ema=0.99,
        ema_params=("generator",),
        save_every=250,
    ),
    text=DamsmText("runs/glyphs/damsm"),
)
