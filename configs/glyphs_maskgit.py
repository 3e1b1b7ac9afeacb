"""Captions to 32x32 glyphs by MaskGIT's Transformer over the codes of `glyphs_vqgan.py`: ten minutes on two cores.

One stack that reads mask tokens, LayerNorm after the residual sum, a tied table, the cosine schedule with confidence
(Chang et al. 2022). The class token is the caption's vector here, and there is an unconditional branch, for guidance.
"""

from dataclasses import replace

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.heads import SoftmaxHead
from t2i_jax.networks.condition import Conditioning, TextFeatures
from t2i_jax.presets import BERT, MASKGIT
from t2i_jax.sampling.options import MaskedSampler
from t2i_jax.sampling.orders import MaskRate
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=replace(
        MASKGIT,
        grid=(8, 8),
        head=SoftmaxHead(512),
        rate=MaskRate("cosine"),
        transformer=replace(BERT, width=192, depth=4, heads=4, dropout=0.0),
        conditioning=Conditioning(TextFeatures(MiniLM.dim, 1)),
        sampling=MaskedSampler(guidance=2.0, iterations=16, temperature=0.8, choice_temperature=2.0),
    ),
    data=Data(ArrayRecord("data/glyphs_codes"), image_size=32, batch_size=32),
    train=Train(
        steps=3700,
        optimizer=Optimizer("muon", 2e-2, adam_learning_rate=3e-3, warmup=50, final=0.05, weight_decay=0.01),
        ema=0.99,
        evaluate_every=500,
        preview_every=500,
        save_every=250,
    ),
    codec="runs/glyphs/vqgan",
    text=MiniLM(16, pooled=True),
)
