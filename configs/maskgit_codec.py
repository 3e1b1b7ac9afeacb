"""The codec of MaskGIT on 256 px images, as it was trained: StyleGAN's discriminator with R1, no attention."""

from t2i_jax.core.sharding import MeshConfig
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import Folder
from t2i_jax.presets import MASKGIT_VQGAN
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=MASKGIT_VQGAN,
    data=Data(Folder("data/imagenet"), image_size=256, batch_size=256),
    train=Train(
        steps=1_000_000,
        optimizer=Optimizer("adam", 1e-4, schedule="constant", warmup=0, b1=0.0, b2=0.99, weight_decay=0.0),
        ema=0.999,
        save_every=10_000,
    ),
    mesh=MeshConfig(data=-1),
)
