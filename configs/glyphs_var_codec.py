"""The codec of `glyphs_var.py`: 130 codes an image, in maps of six sizes (Tian et al. 2024); minutes on two cores."""

from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.multiscale import MultiScaleConfig
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=VQGAN(
        # As `glyphs_vqgan.py`: patches of 2x2 pixels at the door.
        AutoencoderConfig(
            32, (2, 2), blocks=1, decoder_blocks=1, latent=64, patch=2, attention=(), middle_attention=False, groups=16
        ),
        # Moving averages fill the codebook within minutes; VAR's own follows gradients (decay=0).
        MultiScaleConfig(QuantizerConfig(512, 8, normalize=False, decay=0.9, revive=0.2), scales=(1, 2, 3, 4, 6, 8)),
        kernel=3,
        pixels="l1",
        perceptual=0.0,
        adversarial=0.0,
    ),
    data=Data(ArrayRecord("data/glyphs"), image_size=32, batch_size=32),
    train=Train(
        steps=1000,
        optimizer=Optimizer(learning_rate=3e-3, warmup=60, final=0.05, weight_decay=0.01),
        ema=0.99,
        evaluate_every=500,
        preview_every=500,
        save_every=500,
    ),
)
