"""Image GPT (Chen et al. 2020) on 32x32 glyphs: pixel by pixel, over the colours of `color_clusters.py`.

A prompt is not read: `t2i sample runs/glyphs/image_gpt any --count 16`. The published shapes are
`preset("imagegpt-s")`, `m` and `l`; with `conditioning=Conditioning(CaptionEncoder(...))` the model reads captions.
"""

from t2i_jax.core.family import with_fields
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.presets import OF_AR
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=with_fields(OF_AR["imagegpt-s"], vocabulary=64, width=128, depth=6, heads=4),
    data=Data(ArrayRecord("data/glyphs"), image_size=32, batch_size=16),
    train=Train(steps=2000, optimizer=Optimizer(learning_rate=1e-3, warmup=100), ema=0.99),
    codec="runs/glyphs/colors",
)
