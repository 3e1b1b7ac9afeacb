"""Captions to 64x64 glyphs in ten styles, by next-token prediction over the codes of `zoo_codec.py`.

    t2i data build glyphs --out data/glyphs_all --size 64 --styles all
    t2i encode configs/zoo.py --data.source.path=data/glyphs_all --out data/glyphs_zoo
    t2i train configs/zoo.py --run runs/zoo/styles
    t2i sample runs/zoo/styles --prompts configs/zoo_prompts.txt

A frozen sentence encoder reads the captions, of which a tenth is dropped, for guidance. `docs/results/zoo.md` has what
came of it.
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
        transformer=Transformer(width=192, depth=6, heads=4, qk_norm=True),
        conditioning=Conditioning(TextFeatures(MiniLM.dim, 1), dropout=0.1),
        token_dropout=0.0,
        sampling=ARSampler(guidance=1.5, temperature=0.25),
    ),
    data=Data(ArrayRecord("data/glyphs_zoo"), image_size=64, batch_size=32),
    train=Train(
        steps=5500,
        # Muon wants rates ten times those of Adam, which moves the tables.
        optimizer=Optimizer("muon", 2e-2, adam_learning_rate=3e-3, warmup=100, final=0.02, weight_decay=0.01),
        ema=0.995,
        evaluate_every=500,
        preview_every=500,
        save_every=250,
    ),
    codec="twemoji-64/codec",
    text=MiniLM(16, pooled=True),
)
