"""Codes by retrieval: RARM (Blattmann et al. 2022) on 64x64 glyphs of ten styles, trained without captions.

A next-token model whose layers cross-attend to the CLIP embeddings of the nearest images of a database, over the codes
of the zoo's codec. In training they are the neighbours of the image, without itself; in sampling those of the caption.
The CLIP is that of `glyphs_clip.py`; the database is swapped in sampling:

    t2i data build glyphs --out data/glyphs_all --size 64 --styles all
    t2i data neighbours configs/rarm.py --out data/glyphs_neighbours
    t2i encode configs/rarm.py --out data/glyphs_rarm
    t2i train configs/rarm.py --run runs/glyphs/rarm --data.source.path=data/glyphs_rarm
    t2i sample runs/glyphs/rarm "a red heart"

    t2i data build glyphs --out data/glyphs_line --size 64 --styles openmoji-line
    t2i data neighbours configs/rarm.py --out data/line_neighbours --data.source.path=data/glyphs_line
    t2i sample runs/glyphs/rarm "a red heart" --database data/line_neighbours

docs/results/retrieval.md has what came of it.
"""

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import Conditioning, CrossAttnFeatures
from t2i_jax.nn.positions import LearnedPositions
from t2i_jax.nn.transformer import Transformer
from t2i_jax.sampling.options import ARSampler
from t2i_jax.text.clip import ClipEmbedding
from t2i_jax.text.retrieval import Neighbours
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

NEIGHBOURS = 4

experiment = Experiment(
    model=AR(
        vocabulary=4096,
        grid=(8, 8),
        transformer=Transformer(width=192, depth=4, heads=4, qk_norm=True),
        conditioning=Conditioning(
            CrossAttnFeatures(128, NEIGHBOURS, trained_null=False, zero_null=True), via="cross_attention", dropout=0.1
        ),
        positions=LearnedPositions(),
        sampling=ARSampler(guidance=1.0, temperature=0.5),
    ),
    data=Data(ArrayRecord("data/glyphs_all"), image_size=64, batch_size=32),
    train=Train(
        steps=900,
        optimizer=Optimizer("muon", 2e-2, adam_learning_rate=3e-3, warmup=50, final=0.05, weight_decay=0.01),
        ema=0.99,
        evaluate_every=300,
        preview_every=300,
        save_every=150,
    ),
    codec="twemoji-64/codec",
    # The caption's own embedding is left out (query=False): networks have seen embeddings of images alone.
    text=Neighbours(
        ClipEmbedding("docs/results/clip"),
        "data/glyphs_neighbours",
        neighbours=NEIGHBOURS,
        query=False,
        skipped=1,
        normalise=True,
    ),
)
