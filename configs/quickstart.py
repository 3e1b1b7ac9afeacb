"""Captions to 64x64 glyphs of Twemoji, by next-token prediction over the codes of the zoo's codec: six minutes.

A frozen sentence encoder reads the captions, so that new words for a known thing are near the ones in the data.
"""

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import Conditioning, TextFeatures
from t2i_jax.nn.transformer import Transformer
from t2i_jax.sampling.options import ARSampler
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=AR(
        vocabulary=4096,
        grid=(8, 8),
        transformer=Transformer(width=192, depth=4, heads=4, qk_norm=True),
        conditioning=Conditioning(TextFeatures(MiniLM.dim, 1)),
        token_dropout=0.0,
        sampling=ARSampler(guidance=1.0, temperature=0.25),
    ),
    data=Data(ArrayRecord("data/quickstart_codes"), image_size=64, batch_size=32),
    train=Train(
        steps=1150,
        # Muon wants rates ten times those of Adam, which moves the tables.
        optimizer=Optimizer("muon", 2e-2, adam_learning_rate=3e-3, warmup=50, final=0.05, weight_decay=0.01),
        ema=0.98,
        evaluate_every=230,
        preview_every=230,
        save_every=230,
    ),
    codec="twemoji-64/codec",
    text=MiniLM(16, pooled=True),
)
