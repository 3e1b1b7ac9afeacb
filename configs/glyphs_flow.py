"""Captions to 32x32 glyphs by flow matching on the latents of `glyphs_kl.py`, stored as for `glyphs_mar.py`.

With noise prediction instead: `process=Discrete("cosine")`, `predicts="eps"`, `solver="ddpm"`. On pixels: a network of
size (32, 32) with 3 channels (`networks.unet.UNet` or a DiT of larger patches) and no codec. With many caption tokens:
`Conditioning(..., via="joint")` gives them a stream of their own.
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
            channels=8,
            patch=1,
            transformer=replace(ADALN, width=192, depth=4, heads=4),
            conditioning=Conditioning(TextFeatures(MiniLM.dim, 1)),
            learn_variance=False,
        ),
        process=Flow(),
        predicts="velocity",
        solver="dpm++",
        sampling=DiffusionSampler(steps=25, guidance=2.0),
    ),
    data=Data(ArrayRecord("data/glyphs_latents"), image_size=32, batch_size=32),
    train=Train(
        steps=1000,
        optimizer=Optimizer("muon", 1e-2, adam_learning_rate=2e-3, warmup=50, final=0.05, weight_decay=0.01),
        ema=0.99,
        evaluate_every=500,
        preview_every=500,
        save_every=250,
    ),
    codec="runs/glyphs/kl_scaled",
    text=MiniLM(16, pooled=True),
)
