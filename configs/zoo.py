"""`emoji-64` of the zoo: captions to 64x64 glyphs in ten styles, by next-scale prediction over `zoo_codec.py`'s codes.

    t2i encode configs/zoo.py --data.source.path=data/glyphs_all --out data/glyphs_zoo
    t2i train configs/zoo.py --run runs/zoo/emoji-64
    t2i release runs/zoo/emoji-64 --out t2i_jax/zoo/models/emoji-64 --int8

A frozen sentence encoder reads the captions, so that new words for a known thing are near the ones in the data.
"""

from dataclasses import replace

from t2i_jax.codecs.multiscale import MultiScaleConfig
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.var import VAR
from t2i_jax.networks.condition import Conditioning, TextFeatures
from t2i_jax.sampling.options import ScaleSampler
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=VAR(
        MultiScaleConfig(QuantizerConfig(1024, 8, normalize=False), scales=(1, 2, 3, 4, 6, 8)),
        transformer=replace(VAR().transformer, width=192, depth=6, heads=4),
        conditioning=Conditioning(TextFeatures(MiniLM.dim, 1)),
        sampling=ScaleSampler(guidance=1.0, temperature=0.25, top_k=0, top_p=1.0),
    ),
    data=Data(ArrayRecord("data/glyphs_zoo"), image_size=64, batch_size=32),
    train=Train(
        steps=2700,
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
