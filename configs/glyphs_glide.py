"""Captions to 32x32 glyphs in the manner of GLIDE (Nichol et al. 2022): a UNet of pixels with captions of its own.

The captions' Transformer is trained with the UNet, whose attention reads its tokens, and the last one goes with the
time. The vocabulary is made by `t2i data vocab configs/glyphs_vqgan.py --out data/glyphs/vocabulary.model`; a run
of `glyphs_upsample.py` enlarges the images with --upsample.
"""

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import Conditioning
from t2i_jax.networks.glide_captions import GlideCaptions
from t2i_jax.networks.unet import UNet
from t2i_jax.noise.processes import Discrete
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.text.sentencepiece import SentencePiece
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

TOKENS = 16

experiment = Experiment(
    model=Diffusion(
        UNet(
            (32, 32),
            width=64,
            multipliers=(1, 2, 3),
            blocks=1,
            attention=(2, 4),
            conditioning=Conditioning(GlideCaptions(1000, TOKENS, width=128, depth=2, heads=4)),
            context=128,
            pool="last",
        ),
        Discrete("cosine"),
        sampling=DiffusionSampler(60, guidance=3.0),
    ),
    data=Data(ArrayRecord("data/glyphs"), image_size=32, batch_size=32),
    train=Train(steps=2000, optimizer=Optimizer(learning_rate=3e-4, warmup=100), ema=0.99),
    text=SentencePiece("data/glyphs/vocabulary.model", length=TOKENS),
)
