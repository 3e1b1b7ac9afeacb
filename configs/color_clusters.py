"""Clusters of colours, the codec of Image GPT: k-means of the pixels of a data set, here 64 of 32x32 glyphs.

    t2i train configs/color_clusters.py --run runs/glyphs/colors

Published clusters: `t2i convert imagegpt-clusters FOLDER`.
"""

from t2i_jax.codecs.clusters import ColorClusters
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.training.experiment import Experiment, Train

experiment = Experiment(
    model=ColorClusters(QuantizerConfig(64, 3, normalize=False, decay=0.99, revive=0.05)),
    data=Data(ArrayRecord("data/glyphs"), image_size=32, batch_size=32),
    train=Train(steps=500, evaluate_every=250, preview_every=250, save_every=250),
)
