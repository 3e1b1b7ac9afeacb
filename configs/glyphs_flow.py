"""Captions to 32x32 glyphs by flow matching on the latents of `glyphs_kl.py`; text has a stream of its own.

With noise prediction instead: `process=Discrete("cosine")`, `predicts="eps"`, `solver="ddpm"`. On pixels: a network of
size (32, 32) with 3 channels (`nn.unet.UNet` or a DiT of larger patches) and no codec.
"""

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.diffusion import Diffusion, Solving
from t2i_jax.nn.condition import Captions
from t2i_jax.nn.dit import DiT
from t2i_jax.noise.processes import Flow
from t2i_jax.text.sentencepiece import SentencePiece
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

TOKENS = 16

experiment = Experiment(
    model=Diffusion(
        network=DiT(
            size=(8, 8),
            channels=8,
            patch=1,
            width=192,
            depth=4,
            heads=4,
            condition=Captions(vocabulary=1000, length=TOKENS, width=128, depth=2, heads=4),
            text="joint",
            learn_variance=False,
        ),
        process=Flow(),
        predicts="velocity",
        solver="dpm++",
        sampling=Solving(steps=25, guidance=3.0, eta=0.0),
    ),
    data=Data(ArrayRecord("data/glyphs"), image_size=32, batch_size=16),
    train=Train(
        steps=1000,
        optimizer=Optimizer("muon", learning_rate=2e-3, warmup=50, weight_decay=0.01),
        ema=0.99,
        evaluate_every=500,
        preview_every=500,
        save_every=250,
    ),
    codec="runs/glyphs/kl",
    text=SentencePiece("data/glyphs/vocabulary.model", length=TOKENS),
)
