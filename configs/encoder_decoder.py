"""Captions to 32x32 glyphs by an encoder and a decoder (dalle-mini, Parti), over the codes of `glyphs_vqgan.py`.

The largest Parti is the same with `Transformer(4096, 64, 64, mlp=16384, activation="gelu")` and 16 layers of that width
for text; docs/scaling.md plans it.

The vocabulary is made by `t2i data vocab configs/glyphs_vqgan.py --out data/glyphs/vocabulary.model`.
"""

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import CaptionEncoder, Conditioning
from t2i_jax.nn.transformer import Transformer
from t2i_jax.text.sentencepiece import SentencePiece
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

TOKENS = 16

experiment = Experiment(
    model=AR(
        vocabulary=512,
        grid=(8, 8),
        transformer=Transformer(width=192, depth=4, heads=4, qk_norm=True),
        conditioning=Conditioning(
            CaptionEncoder(vocabulary=1000, length=TOKENS, width=192, depth=2, heads=4), via="cross_attention"
        ),
        token_dropout=0.0,
        corruption=1.0,
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
