"""Captions and noised 32x32 glyphs of ten styles in one space: the CLIP that guides `semantic_diffusion.py`.

    t2i data vocab configs/semantic_clip.py --out data/glyphs_all/vocabulary.model
    t2i train configs/semantic_clip.py --run runs/glyphs/noised_clip

Its noise is that of the diffusion, whose times it is given.
"""

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.clip import CLIP
from t2i_jax.networks.clip import CLIPTowers
from t2i_jax.nn.transformer import Transformer
from t2i_jax.noise.processes import Discrete
from t2i_jax.text.sentencepiece import SentencePiece
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

WORDS = 20


def transformer(depth: int) -> Transformer:
    return Transformer(128, depth, 4, norm="layer", activation="gelu", bias=True, dropout=0.1)


experiment = Experiment(
    model=CLIP(
        CLIPTowers(
            transformer(2),
            transformer(4),
            dim=128,
            vocabulary=1000,
            length=WORDS,
            last=True,
            size=32,
            patch=4,
            times=1000,
        ),
        noise=Discrete("cosine"),
    ),
    data=Data(ArrayRecord("data/glyphs_all"), image_size=32, batch_size=128),
    train=Train(
        steps=600,
        optimizer=Optimizer("adamw", 1.5e-3, warmup=100, b2=0.98, weight_decay=0.1, final=0.02),
        ema=0.99,
        evaluate_every=250,
        evaluate_batches=5,
        preview_every=0,
        save_every=250,
    ),
    text=SentencePiece("data/glyphs_all/vocabulary.model", length=WORDS),
)
