"""A small VQGAN on 32x32 glyphs: 64 codes an image, minutes on two cores."""

from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=VQGAN(
        # Patches of 2x2 pixels at the door: no convolution runs at full resolution, which is where a CPU spends itself.
        AutoencoderConfig(
            32, (2, 2), blocks=1, decoder_blocks=1, latent=64, patch=2, attention=(), middle_attention=False, groups=16
        ),
        QuantizerConfig(codes=512, dim=8, decay=0.9, revive=0.2),
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
