"""Tried for the zoo: captions to 64x64 glyphs in ten styles, by flow matching on the latents of `zoo_kl.py`.

    t2i encode configs/zoo_flow.py --data.source.path=data/glyphs_all --out data/glyphs_latents64
    t2i train configs/zoo_flow.py --run runs/zoo/flow

`docs/results/zoo.md` has what came of it.
"""

from dataclasses import replace

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import Conditioning, TextFeatures
from t2i_jax.networks.dit import DiT
from t2i_jax.noise.processes import Flow
from t2i_jax.presets import ADALN
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=Diffusion(
        network=DiT(
            size=(8, 8),
            channels=16,
            patch=1,
            transformer=replace(ADALN, width=192, depth=8, heads=4, qk_norm=True),
            conditioning=Conditioning(TextFeatures(MiniLM.dim, 1), dropout=0.1),
            shared=True,
            learn_variance=False,
        ),
        process=Flow(),
        predicts="velocity",
        solver="dpm++",
        sampling=DiffusionSampler(steps=12, guidance=2.0),
    ),
    data=Data(ArrayRecord("data/glyphs_latents64"), image_size=64, batch_size=64),
    train=Train(
        steps=4000,
        # Muon wants rates ten times those of Adam, which moves the tables.
        optimizer=Optimizer("muon", 1e-2, adam_learning_rate=2e-3, warmup=100, final=0.02, weight_decay=0.01),
        ema=0.998,
        evaluate_every=500,
        preview_every=500,
        save_every=250,
    ),
    codec="docs/results/zoo/kl",
    text=MiniLM(16, pooled=True),
)
