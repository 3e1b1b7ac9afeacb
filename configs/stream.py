"""Captions to 32x32 glyphs, text and codes in one stream (DALL-E, CogView), over the codes of `glyphs_vqgan.py`.

The vocabulary is made by `t2i data vocab configs/glyphs_vqgan.py --out data/glyphs/vocabulary.model`.
"""

from dataclasses import replace

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.stream import Stream, StreamText
from t2i_jax.presets import GPT
from t2i_jax.text.sentencepiece import SentencePiece
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

TOKENS = 16

experiment = Experiment(
    model=Stream(
        vocabulary=512,
        grid=(8, 8),
        condition=StreamText(1000, TOKENS, start=True, unique_padding=True),
        transformer=replace(GPT, width=192, depth=4, heads=4, sandwich_norm=True),
        image_weight=7.0,
    ),
    data=Data(ArrayRecord("data/glyphs_codes"), image_size=32, batch_size=16, fields=("codes",)),
    train=Train(
        steps=1000,
        optimizer=Optimizer("muon", 2e-2, adam_learning_rate=3e-3, warmup=50, final=0.05, weight_decay=0.01),
        ema=0.99,
        evaluate_every=500,
        preview_every=500,
        save_every=250,
    ),
    codec="runs/glyphs/vqgan",
    text=SentencePiece("data/glyphs/vocabulary.model", length=TOKENS),
)
