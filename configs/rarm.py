"""Codes by retrieval: RARM (Blattmann et al. 2022) on 32x32 glyphs, over the codes of `quickstart_codec.py`.

A next-token model whose layers cross-attend to the CLIP embeddings of the nearest images of a database, in sampling to
that of the caption first. CLIP and database are those of `rdm.py`:

    t2i encode configs/rarm.py --database --out data/glyphs_clip.npy
    t2i train configs/rarm.py --run runs/glyphs/rarm
    t2i sample runs/glyphs/rarm "a red heart"
"""

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import Conditioning, CrossAttnFeatures
from t2i_jax.nn.positions import LearnedPositions
from t2i_jax.nn.transformer import Transformer
from t2i_jax.text.clip import ClipEmbedding
from t2i_jax.text.retrieval import Neighbours
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=AR(
        vocabulary=512,
        grid=(8, 8),
        transformer=Transformer(width=192, depth=4, heads=4, qk_norm=True),
        conditioning=Conditioning(
            CrossAttnFeatures(512, 4, trained_null=False, zero_null=True), via="cross_attention", dropout=0.1
        ),
        positions=LearnedPositions(),
    ),
    data=Data(ArrayRecord("data/glyphs"), image_size=32, batch_size=32),
    train=Train(steps=650, optimizer=Optimizer("muon", 2e-2, adam_learning_rate=3e-3, warmup=50), ema=0.99),
    codec="runs/quickstart/codec",
    text=Neighbours(ClipEmbedding("models/clip-vit-base-patch32"), "data/glyphs_clip.npy", skipped=1),
)
