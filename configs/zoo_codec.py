"""The codec of the zoo: 64x64 glyphs in ten styles as 8x8 codes of 4,096.

    t2i data build glyphs --out data/glyphs_all --size 64 --styles all
    t2i train configs/zoo_codec.py --run runs/zoo/codec
    t2i release runs/zoo/codec --out t2i_jax/zoo/models/twemoji-64/codec --int8

`docs/results/zoo.md` compares it with others.
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
        # As `glyphs_vqgan.py`: patches of 2x2 pixels at the door, and one level more.
        AutoencoderConfig(
            32,
            (2, 2, 4),
            blocks=1,
            decoder_blocks=1,
            latent=64,
            patch=2,
            attention=(),
            middle_attention=False,
            groups=16,
        ),
        QuantizerConfig(4096, 12, decay=0.9, revive=0.2),
        pixels="l1",
        perceptual=0.0,
        adversarial=0.0,
    ),
    data=Data(ArrayRecord("data/glyphs_all"), image_size=64, batch_size=32),
    train=Train(
        steps=4000,
        optimizer=Optimizer(learning_rate=3e-3, warmup=60, final=0.02, weight_decay=0.01),
        ema=0.995,
        evaluate_every=500,
        preview_every=500,
        save_every=250,
    ),
)
