"""A folder of pictures of any shape, each cut to the nearest of several shapes: a flow on pixels, with captions.

    t2i train configs/any_shape.py --data.source.path=my_pictures --run runs/any_shape
    t2i sample runs/any_shape "a lake" --size 48x24
    t2i sample runs/any_shape "a tower" --size 24x48

Batches have one shape each, in turn, as often as there are pictures of it. With a codec (`codec="runs/..."`) the shapes
are still in pixels, of multiples of its factor times the patch; `t2i encode` stores each picture in its own shape.
Rotary positions serve every grid; the sines and cosines of `SinCosPositions` are scaled to the range of the first one.
"""

from dataclasses import replace

from t2i_jax.data.buckets import shapes_around
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import Folder
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import Conditioning, TextFeatures
from t2i_jax.networks.dit import DiT
from t2i_jax.nn.positions import RotaryPositions
from t2i_jax.noise.processes import Flow
from t2i_jax.presets import ADALN
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

SIDE, PATCH = 32, 4

experiment = Experiment(
    model=Diffusion(
        network=DiT(
            size=(SIDE, SIDE),
            channels=3,
            patch=PATCH,
            transformer=replace(ADALN, width=192, depth=4, heads=4),
            conditioning=Conditioning(TextFeatures(MiniLM.dim, 1)),
            positions=RotaryPositions(),
            learn_variance=False,
        ),
        process=Flow(),
        predicts="velocity",
        solver="dpm++",
        sampling=DiffusionSampler(steps=25, guidance=2.0),
    ),
    data=Data(
        Folder("my_pictures"),
        Folder("my_pictures"),
        image_size=SIDE,
        shapes=shapes_around(SIDE, PATCH, longest=2.0),
        batch_size=16,
    ),
    train=Train(
        steps=1500,
        optimizer=Optimizer("muon", 1e-2, adam_learning_rate=2e-3, warmup=50, final=0.05, weight_decay=0.01),
        ema=0.99,
        evaluate_every=0,
        preview_every=500,
        save_every=500,
    ),
    text=MiniLM(16, pooled=True),
)
