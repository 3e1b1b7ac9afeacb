"""Captions to 32x32 glyphs by next-scale prediction over the codes of `glyphs_var_codec.py`: six steps an image.

    t2i train configs/glyphs_var_codec.py --run runs/glyphs/scales
    t2i encode configs/glyphs_var.py --data.source.path=data/glyphs --out data/glyphs_scales
    t2i train configs/glyphs_var.py --run runs/glyphs/var

The caption modulates every block, as the class does in VAR; `via="cross_attention"` with the features of each token
(`TextFeatures(MiniLM.dim, 16)`, `MiniLM(16)`) reads them one by one, too.
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
        MultiScaleConfig(QuantizerConfig(512, 8, normalize=False), scales=(1, 2, 3, 4, 6, 8)),
        transformer=replace(VAR().transformer, width=192, depth=4, heads=4),
        conditioning=Conditioning(TextFeatures(MiniLM.dim, 1)),
        sampling=ScaleSampler(guidance=1.0, temperature=0.25, top_k=0, top_p=1.0),
    ),
    data=Data(ArrayRecord("data/glyphs_scales"), image_size=32, batch_size=32),
    train=Train(
        steps=1400,
        # Muon wants rates ten times those of Adam, which moves the tables.
        optimizer=Optimizer("muon", 2e-2, adam_learning_rate=3e-3, warmup=50, final=0.05, weight_decay=0.01),
        ema=0.98,
        evaluate_every=350,
        preview_every=350,
        save_every=350,
    ),
    codec="runs/glyphs/scales",
    text=MiniLM(16, pooled=True),
)
