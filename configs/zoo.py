"""`emoji-64` of the zoo: captions to 64x64 glyphs in ten styles, by next-token prediction over `zoo_codec.py`'s codes.

    t2i encode configs/zoo.py --data.source.path=data/glyphs_all --out data/glyphs_zoo
    t2i train configs/zoo.py --run runs/zoo/emoji-64
    t2i release runs/zoo/emoji-64 --out t2i_jax/zoo/models/emoji-64 --int8

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
        vocabulary=1024,
        grid=(16, 16),
        transformer=Transformer(width=192, depth=5, heads=4, qk_norm=True),
        conditioning=Conditioning(TextFeatures(MiniLM.dim, 1)),
        token_dropout=0.0,
        sampling=ARSampler(guidance=1.0, temperature=0.25),
    ),
    data=Data(ArrayRecord("data/glyphs_zoo"), image_size=64, batch_size=32),
    train=Train(
        steps=3500,
        # Muon wants rates ten times those of Adam, which moves the tables.
        optimizer=Optimizer("muon", 2e-2, adam_learning_rate=3e-3, warmup=100, final=0.02, weight_decay=0.01),
        ema=0.99,
        evaluate_every=500,
        preview_every=500,
        save_every=250,
    ),
    codec="runs/zoo/codec",
    text=MiniLM(16, pooled=True),
)
