"""Captions to 32x32 glyphs by MAR: random sets of latents, a diffusion head, over the codes of `glyphs_kl.py`.

Other cells of the table are other values of two fields: `head=SoftmaxHead(512)` over `glyphs_vqgan.py`,
`FlowHead(8)` or `MixtureHead(8)`; `order=Raster()`, `Permutation()` or, with softmax,
`Confidence()`; `models.any_order.AnyOrder` is causal.
`t2i encode configs/glyphs_mar.py --data.source.path=data/glyphs --out data/glyphs_latents` makes the data.
"""

from dataclasses import replace

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.heads import DiffusionHead
from t2i_jax.models.masked import Masked
from t2i_jax.networks.condition import Conditioning, TextFeatures
from t2i_jax.presets import MAR
from t2i_jax.sampling.options import MaskedSampler
from t2i_jax.sampling.orders import Sets
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=Masked(
        grid=(8, 8),
        head=DiffusionHead(dim=8, width=192, depth=3, respacing="50"),
        order=Sets(),
        transformer=replace(MAR, width=192, depth=2, heads=4, dropout=0.0),
        buffer=4,
        conditioning=Conditioning(TextFeatures(MiniLM.dim, 1)),
        sampling=MaskedSampler(iterations=16, temperature=0.8),
    ),
    data=Data(ArrayRecord("data/glyphs_latents"), image_size=32, batch_size=32),
    train=Train(
        steps=1000,
        optimizer=Optimizer("muon", 2e-2, adam_learning_rate=3e-3, warmup=50, final=0.05, weight_decay=0.01),
        ema=0.99,
        evaluate_every=500,
        preview_every=500,
        save_every=250,
    ),
    codec="runs/glyphs/kl_scaled",
    text=MiniLM(16, pooled=True),
)
