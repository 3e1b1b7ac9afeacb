"""Imagen on 32x32 glyphs (Saharia et al. 2022): pixels from all vectors of a frozen text encoder, which attention reads
beside the image and pools to a vector; samples are thresholded.

The text encoder of the paper is T5: with a folder of one, `text` is `T5("models/flan-t5-small", WORDS)`, and `FEATURES`
are of its width. A run of `imagen_glyphs_upsample.py` enlarges the images:

    t2i data build glyphs --out data/glyphs --size 32
    t2i train configs/imagen_glyphs.py
    t2i sample runs/imagen_glyphs "a red heart" --upsample runs/imagen_glyphs_upsample
"""

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import Conditioning, CrossAttnFeatures
from t2i_jax.networks.imagen import AttentionPooledFeatures
from t2i_jax.networks.unet import UNet
from t2i_jax.noise.processes import Discrete
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

WORDS = 16
FEATURES = CrossAttnFeatures(MiniLM.dim, WORDS)

experiment = Experiment(
    model=Diffusion(
        UNet(
            (32, 32),
            width=64,
            multipliers=(1, 2, 3),
            blocks=1,
            attention=(4,),
            conditioning=Conditioning(AttentionPooledFeatures(FEATURES, heads=6, summary=256)),
            context=128,
            context_norm="layer",
            pool="summary",
            learn_variance=False,
        ),
        Discrete("cosine"),
        "v",
        solver="dpm++",
        sampling=DiffusionSampler(20, guidance=3.0, threshold=0.995),
    ),
    data=Data(ArrayRecord("data/glyphs"), image_size=32, batch_size=32),
    train=Train(steps=2000, optimizer=Optimizer(learning_rate=3e-4, warmup=100), ema=0.99),
    text=MiniLM(WORDS),
)
