"""Tried for the zoo: 64x64 glyphs in ten styles as 8x8 latents of 16 numbers.

    t2i data build glyphs --out data/glyphs_all --size 64 --styles all
    t2i train configs/zoo_kl.py --run runs/zoo/kl
    t2i release runs/zoo/kl --out docs/results/zoo/kl --scale --half

`docs/results/zoo.md` compares it with others.
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
            (1, 2, 4),
            blocks=1,
            decoder_blocks=2,
            latent=16,
            moments=True,
            patch=2,
            attention=(),
            groups=16,
        ),
        kl=1e-4,
        pixels="l1",
        perceptual=0.0,
        adversarial=0.0,
    ),
    data=Data(ArrayRecord("data/glyphs_all"), image_size=64, batch_size=32),
    train=Train(
        steps=2500,
        optimizer=Optimizer(learning_rate=2e-3, warmup=100, final=0.02, weight_decay=0.01),
        ema=0.995,
        evaluate_every=500,
        preview_every=500,
        save_every=250,
    ),
)
