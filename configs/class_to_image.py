"""A next-token model of 256 px images by class, as LlamaGen has it: codes are computed before, by `t2i encode`.

`--model.transformer.width=256 --model.transformer.depth=6 --model.transformer.heads=4 --model.transformer.mlp=704
--data.batch-size=8` make it fit for a laptop.
"""

from dataclasses import replace

from t2i_jax.core.sharding import MeshConfig
from t2i_jax.core.types import Compute
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.networks.condition import ClassEmbedder, Conditioning
from t2i_jax.presets import PRESETS
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=replace(
        PRESETS["llamagen-b"],
        vocabulary=16384,
        grid=(16, 16),
        conditioning=Conditioning(ClassEmbedder(1000)),
        compute=Compute(dtype="bfloat16"),
    ),
    data=Data(ArrayRecord("data/imagenet_codes"), image_size=256, batch_size=256),
    train=Train(steps=300_000, optimizer=Optimizer("adamw", 1e-4, warmup=0, schedule="constant"), ema=0.9999),
    mesh=MeshConfig(data=-1),
)
