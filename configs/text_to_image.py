"""A 0.1 B next-token model of 256 px images from captions, for a pod: codes and T5 features are computed before.

Larger ones are the same with other shapes; docs/scaling.md plans them. The data and the codec are yours to bring:
`t2i encode` writes them, 16x16 codes of 16384 and 120 features of 2048 a caption.
"""

from dataclasses import replace

from t2i_jax.core.sharding import MeshConfig
from t2i_jax.core.types import Compute
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import Conditioning, TextFeatures
from t2i_jax.presets import PRESETS
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=AR(
        vocabulary=16384,
        grid=(16, 16),
        transformer=replace(PRESETS["llamagen-b"].transformer, dropout=0.0),
        conditioning=Conditioning(TextFeatures(2048, 120, left=True)),
        token_dropout=0.0,
        compute=Compute("bfloat16", remat="branches", loss_chunk=64),
    ),
    data=Data(ArrayRecord("data/images_codes"), image_size=256, batch_size=512),
    train=Train(steps=300_000, optimizer=Optimizer("adamw", 3e-4, warmup=5000), ema=0.0, save_every=2000),
    mesh=MeshConfig(data=-1),
)
