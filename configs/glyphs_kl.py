"""A small KL autoencoder on 32x32 glyphs: 8x8 codes of 8 numbers, for heads of vectors (`glyphs_mar.py`).

`t2i release runs/glyphs/kl --out runs/glyphs/kl_scaled --scale` measures the scale of its codes.
"""

from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.kl import KL
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=KL(
        AutoencoderConfig(
            32,
            (2, 2),
            blocks=1,
            decoder_blocks=1,
            latent=8,
            moments=True,
            patch=2,
            attention=(),
            middle_attention=False,
            groups=16,
        ),
        kl=1e-4,  # small images: heavier than published, so that codes stay near a standard normal
        pixels="l1",
        perceptual=0.0,
        adversarial=0.0,
    ),
    data=Data(ArrayRecord("data/glyphs"), image_size=32, batch_size=32),
    train=Train(
        steps=700,
        optimizer=Optimizer(learning_rate=3e-3, warmup=60, final=0.05, weight_decay=0.01),
        ema=0.99,
        evaluate_every=350,
        preview_every=350,
        save_every=350,
    ),
)
