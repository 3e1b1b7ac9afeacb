"""Images without captions by retrieval: KNN-Diffusion (Sheynin et al. 2022) on 32x32 glyphs.

A discrete diffusion reads the CLIP embedding of the image and those of its neighbours, in sampling that of the caption
and its neighbours, over the codes of `glyphs_vqgan.py`. CLIP and database are those of `rdm.py`.
"""

from dataclasses import replace

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.vq_diffusion import VQDiffusion
from t2i_jax.networks.condition import Conditioning, CrossAttnFeatures
from t2i_jax.noise.discrete import Chain
from t2i_jax.presets import GPT
from t2i_jax.sampling.options import DiscreteSampler
from t2i_jax.text.clip import ClipEmbedding
from t2i_jax.text.retrieval import Neighbours
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

NEIGHBOURS = 10

experiment = Experiment(
    model=VQDiffusion(
        chain=Chain(codes=512, steps=100),
        grid=(8, 8),
        transformer=replace(GPT, width=128, depth=4, heads=4, activation="quick_gelu"),
        conditioning=Conditioning(CrossAttnFeatures(512, 1 + NEIGHBOURS, trained_null=False, zero_null=True)),
        sampling=DiscreteSampler(guidance=2.0, truncation=0.9, steps=25),
    ),
    data=Data(ArrayRecord("data/glyphs"), image_size=32, batch_size=16),
    train=Train(steps=1000, optimizer=Optimizer("muon", 2e-2, adam_learning_rate=3e-3, warmup=50), ema=0.99),
    codec="runs/glyphs/vqgan",
    text=Neighbours(
        ClipEmbedding("models/clip-vit-base-patch32"),
        "data/glyphs_clip",
        neighbours=NEIGHBOURS,
        own=True,
        skipped=1,
    ),
)
