"""Captions to 16x16 glyphs in the manner of Muse (Chang et al. 2023): its base model, for `glyphs_muse_upsample.py`.

Every layer cross-attends to the vectors of the caption's words. `t2i sample runs/glyphs/muse "a red heart" --upsample
runs/glyphs/muse_upsample --negative "a blue heart"` samples by both stages, away from another prompt.
"""

from dataclasses import replace

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.heads import SoftmaxHead
from t2i_jax.networks.condition import Conditioning, TextFeatures
from t2i_jax.presets import MAR, MUSE
from t2i_jax.sampling.options import MaskedSampler
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

WORDS = 16

experiment = Experiment(
    model=replace(
        MUSE,
        grid=(4, 4),
        head=SoftmaxHead(512),
        transformer=replace(MAR, width=192, depth=4, heads=4, dropout=0.0),
        conditioning=Conditioning(TextFeatures(MiniLM.dim, WORDS), via="cross_attention"),
        sampling=MaskedSampler(guidance=2.0, iterations=8, choice_temperature=2.0),
    ),
    data=Data(ArrayRecord("data/glyphs"), image_size=16, batch_size=32),
    train=Train(
        steps=1500,
        optimizer=Optimizer("muon", 2e-2, adam_learning_rate=3e-3, warmup=50, final=0.05, weight_decay=0.01),
        ema=0.99,
        save_every=250,
    ),
    codec="runs/glyphs/vqgan",
    text=MiniLM(WORDS),
)
