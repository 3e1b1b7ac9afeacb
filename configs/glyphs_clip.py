"""Captions and 64x64 glyphs of ten styles in one space: a CLIP of 1.4 million parameters.

    t2i data build glyphs --out data/glyphs_all --size 64 --styles all
    t2i data vocab configs/glyphs_clip.py --out data/glyphs_all/vocabulary.model
    t2i train configs/glyphs_clip.py --run runs/glyphs/clip
    t2i evaluate runs/glyphs/clip --count 500

Wherever a released CLIP is read the run is, too: `ClipEmbedding("runs/glyphs/clip")` as the text of a model,
`t2i data neighbours CONFIG --out FOLDER`, `t2i sample --rerank runs/glyphs/clip`. For guidance of a diffusion,
`t2i sample --classifier`, it has to know noised images: `noise=` the process of that diffusion, and `towers.times`.
"""

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.clip import CLIP
from t2i_jax.networks.clip import CLIPTowers
from t2i_jax.nn.transformer import Transformer
from t2i_jax.text.sentencepiece import SentencePiece
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

WORDS = 20


def transformer(depth: int) -> Transformer:
    return Transformer(128, depth, 4, norm="layer", activation="gelu", bias=True, dropout=0.1)


experiment = Experiment(
    model=CLIP(
        CLIPTowers(transformer(2), transformer(4), dim=128, vocabulary=1000, length=WORDS, last=True, size=64, patch=16)
    ),
    data=Data(ArrayRecord("data/glyphs_all"), image_size=64, batch_size=128, crop="random", smallest_crop=0.8),
    train=Train(
        steps=1000,
        optimizer=Optimizer("adamw", 1.5e-3, warmup=100, b2=0.98, weight_decay=0.1, final=0.02),
        ema=0.99,
        evaluate_every=250,
        evaluate_batches=5,
        preview_every=0,
        save_every=250,
    ),
    text=SentencePiece("data/glyphs_all/vocabulary.model", length=WORDS),
)
