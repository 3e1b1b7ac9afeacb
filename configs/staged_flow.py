"""A flow on pixels in stages of growing resolution, 32 then 64, each begun with the weights of the one before.

    t2i data build glyphs --out data/glyphs64 --size 64
    t2i train configs/staged_flow.py --run runs/staged/32
    t2i train configs/staged_flow.py --run runs/staged/64 --train.start=runs/staged/32 --train.steps=300 \\
        --model.network.size=64,64 --data.image-size=64 --data.batch-size=8

Most steps are of the first stage, where one costs a quarter. A token is 4x4 pixels in both, so all matrices fit; the
positions of the second stage are scaled to the range of the first (`base`), as in PixArt.
"""

from dataclasses import replace

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import Conditioning, TextFeatures
from t2i_jax.networks.dit import DiT
from t2i_jax.nn.positions import SinCosPositions
from t2i_jax.noise.processes import Flow
from t2i_jax.presets import ADALN
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=Diffusion(
        network=DiT(
            size=(32, 32),
            channels=3,
            patch=4,
            transformer=replace(ADALN, width=192, depth=4, heads=4),
            conditioning=Conditioning(TextFeatures(MiniLM.dim, 1)),
            positions=SinCosPositions(base=(8, 8)),
            learn_variance=False,
        ),
        process=Flow(),
        predicts="velocity",
        solver="dpm++",
        sampling=DiffusionSampler(steps=25, guidance=2.0),
    ),
    data=Data(ArrayRecord("data/glyphs64"), image_size=32, batch_size=32),
    train=Train(
        steps=1000,
        optimizer=Optimizer("muon", 1e-2, adam_learning_rate=2e-3, warmup=50, final=0.05, weight_decay=0.01),
        ema=0.99,
        evaluate_every=500,
        preview_every=500,
        save_every=250,
    ),
    text=MiniLM(16, pooled=True),
)
