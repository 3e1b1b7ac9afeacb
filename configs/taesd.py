"""A small codec of convolutions and ReLUs, TAESD's, on images of a folder: 8x8 pixels a code of 16 numbers.

    t2i train configs/taesd.py --run runs/taesd --data.source.path=FOLDER
    t2i release runs/taesd --out models/taesd --scale

With `codec="models/taesd"` it is the codec of another experiment. Published ones: `t2i convert taesd FOLDER`.
"""

from t2i_jax.codecs.discriminator import DiscriminatorConfig
from t2i_jax.codecs.taesd import TAESD
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import Folder
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=TAESD(16, perceptual_blocks=3, adversarial=0.1, start=20_000, discriminator=DiscriminatorConfig(32)),
    data=Data(Folder("data/images"), image_size=256, batch_size=16),
    train=Train(steps=100_000, optimizer=Optimizer(learning_rate=3e-4, warmup=1000), ema=0.999),
)
