"""Captions and 64x64 glyphs of ten styles in one space, for text-to-image GANs: a DAMSM.

    t2i data build glyphs --out data/glyphs_all --size 64 --styles all
    t2i data vocab configs/glyphs_damsm.py --out data/glyphs_all/vocabulary.model
    t2i train configs/glyphs_damsm.py --run runs/glyphs/damsm
    t2i evaluate runs/glyphs/damsm

A GAN reads `DamsmText("runs/glyphs/damsm")` as its text, and the same path as its `matching`. As published (AttnGAN):
`trunk=Inception("image_encoder200.pth")`, batches of 48, and the learning rate falls by 0.98 every epoch, at which
Adam's moments also begin anew; here it falls along a cosine.
"""

from dataclasses import replace

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.damsm import DAMSM, EfficientNet
from t2i_jax.text.sentencepiece import SentencePiece
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

WORDS = 20
OPTIMIZER = Optimizer("adam", 2e-3, warmup=50, b1=0.5, b2=0.999, weight_decay=0.0, clip=0.0)

experiment = Experiment(
    model=DAMSM(vocabulary=1000, length=WORDS, trunk=EfficientNet(64, pixels=16)),
    data=Data(ArrayRecord("data/glyphs_all"), image_size=64, batch_size=64, crop="random", smallest_crop=0.9),
    train=Train(
        steps=1200,
        optimizer=OPTIMIZER,
        # The gradient of the recurrent layer alone is clipped.
        optimizers={"text": replace(OPTIMIZER, clip=0.25)},
        evaluate_every=300,
        evaluate_batches=8,
        preview_every=0,
        save_every=300,
    ),
    text=SentencePiece("data/glyphs_all/vocabulary.model", length=WORDS),
)
