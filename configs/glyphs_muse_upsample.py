"""Second stage of Muse for glyphs: codes of 32x32 images from captions and the codes of 16x16 ones of `glyphs_muse.py`.

Those are computed of the image in training, and of the first stage's image in sampling, by the same codec.
"""

from dataclasses import replace

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.heads import SoftmaxHead
from t2i_jax.networks.condition import Conditioning, Joined, LowCodes, TextFeatures
from t2i_jax.presets import MAR, MUSE_SR
from t2i_jax.sampling.options import MaskedSampler
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

WORDS = 16
CONDITION = Joined((TextFeatures(MiniLM.dim, WORDS), LowCodes(512, (4, 4), width=128, depth=2, heads=4)))

experiment = Experiment(
    model=replace(
        MUSE_SR,
        grid=(8, 8),
        head=SoftmaxHead(512),
        transformer=replace(MAR, width=192, depth=4, heads=4, dropout=0.0),
        conditioning=Conditioning(CONDITION, via="cross_attention"),
        sampling=MaskedSampler(guidance=2.0, iterations=8, choice_temperature=2.0),
    ),
    data=Data(ArrayRecord("data/glyphs"), image_size=32, batch_size=32),
    train=Train(
        steps=1500,
        optimizer=Optimizer("muon", 2e-2, adam_learning_rate=3e-3, warmup=50, final=0.05, weight_decay=0.01),
        ema=0.99,
        save_every=250,
    ),
    codec="runs/glyphs/vqgan",
    text=MiniLM(WORDS),
)
