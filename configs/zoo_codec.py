"""The codec of the zoo: 64x64 glyphs in ten styles as 16x16 of 1024 codes.

t2i data build glyphs --out data/glyphs_all --size 64 --styles all
t2i train configs/zoo_codec.py --run runs/zoo/codec
"""

from t2i_jax.codecs.autoencoder import AutoencoderConfig
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
        QuantizerConfig(codes=1024, dim=8, decay=0.9, revive=0.2),
        pixels="l1",
        perceptual=0.0,
        adversarial=0.0,
    ),
    data=Data(ArrayRecord("data/glyphs_all"), image_size=64, batch_size=32),
    train=Train(
        steps=1500,
        optimizer=Optimizer(learning_rate=3e-3, warmup=60, final=0.02, weight_decay=0.01),
        ema=0.995,
        evaluate_every=500,
        preview_every=500,
        save_every=250,
    ),
)
