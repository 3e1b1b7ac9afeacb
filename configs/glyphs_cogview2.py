"""Captions to 64x64 glyphs by CogView2: 8x8 coarse codes after the text, then 16x16 fine ones of these, drawn again.

Three networks are trained at once, each by its own loss, on the codes of every image and of the same image of 32x32:

    t2i train configs/glyphs_vqgan.py --run runs/glyphs/vqgan
    t2i data build glyphs --out data/glyphs64 --size 64
    t2i data vocab configs/glyphs_vqgan.py --out data/glyphs/vocabulary.model
    t2i train configs/glyphs_cogview2.py
    t2i sample runs/glyphs_cogview2 "a red heart" --watch
"""

from dataclasses import replace

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.coarse_to_fine import CoarseToFine
from t2i_jax.models.stream import Stream, StreamText
from t2i_jax.networks.local import LocalTransformer
from t2i_jax.presets import COGVIEW2
from t2i_jax.sampling.options import CoarseToFineSampler
from t2i_jax.text.sentencepiece import SentencePiece
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

PIECES, TOKENS = 1000, 16
SMALL = replace(COGVIEW2, width=128, depth=3, heads=4)

experiment = Experiment(
    model=CoarseToFine(
        coarse=Stream(
            vocabulary=512,
            grid=(8, 8),
            condition=StreamText(PIECES + 1, TOKENS, bidirectional=True, end=PIECES),
            transformer=replace(COGVIEW2, width=192, depth=4, heads=4),
            tied=True,
        ),
        grid=(16, 16),
        direct=LocalTransformer(SMALL, text=TOKENS, hidden=PIECES, own_attention=True),
        refiner=LocalTransformer(SMALL, "text", TOKENS, hidden=PIECES),
        sampling=CoarseToFineSampler(guidance=3.0, top_k=100, direct_temperature=0.7, refine_temperature=0.7),
    ),
    data=Data(ArrayRecord("data/glyphs64"), image_size=64, batch_size=16),
    train=Train(
        steps=750,
        optimizer=Optimizer("muon", 2e-2, adam_learning_rate=3e-3, warmup=50, final=0.05, weight_decay=0.01),
        ema=0.99,
        evaluate_every=250,
        preview_every=250,
        save_every=250,
    ),
    codec="runs/glyphs/vqgan",
    text=SentencePiece("data/glyphs/vocabulary.model", length=TOKENS),
)
