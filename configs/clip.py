"""Pictures and captions of a folder in one space: a CLIP of ViT-S size, with the sigmoid loss of SigLIP.

    t2i data vocab configs/clip.py --out data/pictures/vocabulary.model --size 8000
    t2i train configs/clip.py --run runs/clip
    t2i evaluate runs/clip

`data/pictures` holds images at any depth, each with its captions in a .txt file of the same name, one a line; see `t2i
data --help` for other sources. Losses compare all pairs of the global batch, so that a larger one is a harder
task: `compute.loss_chunk` bounds the memory of its products.
"""

from t2i_jax.core.types import Compute
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import Folder
from t2i_jax.models.clip import CLIP
from t2i_jax.networks.clip import CLIPTowers
from t2i_jax.nn.transformer import Transformer
from t2i_jax.text.sentencepiece import SentencePiece
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

WORDS, PIECES, SIDE = 64, 8000, 224

experiment = Experiment(
    model=CLIP(
        CLIPTowers(
            text=Transformer(384, 12, 6, norm="layer", activation="gelu", bias=True),
            image=Transformer(384, 12, 6, norm="layer", activation="gelu", bias=True),
            dim=384,
            vocabulary=PIECES,
            length=WORDS,
            last=True,
            size=SIDE,
            patch=16,
        ),
        "sigmoid",
        scale=10.0,
        compute=Compute("bfloat16", remat="branches"),
    ),
    data=Data(
        Folder("data/pictures"),
        held_out=Folder("data/pictures_held_out"),
        image_size=SIDE,
        batch_size=1024,
        crop="random",
        workers=8,
    ),
    train=Train(
        steps=20_000,
        optimizer=Optimizer("adamw", 1e-3, warmup=1000, b2=0.95, weight_decay=0.1),
        ema=0.999,
        evaluate_every=1000,
        preview_every=0,
        save_every=1000,
    ),
    text=SentencePiece("data/pictures/vocabulary.model", length=WORDS),
)
