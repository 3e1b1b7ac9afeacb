"""MaskGIT on 256 px images by class, as it was released: codes are computed before, by `t2i encode`.

`--model.conditioning.what.null=true --model.conditioning.dropout=0.1` trains an unconditional branch, too.
"""

from dataclasses import replace

from t2i_jax.core.sharding import MeshConfig
from t2i_jax.core.types import Compute
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.presets import MASKGIT
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=replace(MASKGIT, compute=Compute("bfloat16")),
    data=Data(ArrayRecord("data/imagenet_codes"), image_size=256, batch_size=256),
    train=Train(
        steps=2_000_000,
        optimizer=Optimizer("adamw", 1e-4, schedule="constant", warmup=5000, b2=0.96, weight_decay=0.045),
        ema=0.0,
        save_every=10_000,
    ),
    mesh=MeshConfig(data=-1),
)
