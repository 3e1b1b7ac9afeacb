"""Images without captions: learned from CLIP's embedding of each image, drawn for the embedding of a caption.

CLIP-GEN (Wang et al. 2022) on 32x32 glyphs, over the codes of `glyphs_vqgan.py`. A CLIP is yours to bring, as
Hugging Face or open_clip lay it out or a file of OpenAI's: `text.folder` names it. Captions are never read in training.
`t2i encode configs/clip_gen.py --out data/glyphs_clip` computes codes and embeddings once; train on those with
`--data.source.path=data/glyphs_clip --data.fields codes features`.
"""

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import Conditioning, PooledFeatures
from t2i_jax.nn.transformer import Transformer
from t2i_jax.text.clip import ClipEmbedding
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=AR(
        vocabulary=512,
        grid=(8, 8),
        transformer=Transformer(width=192, depth=4, heads=4, qk_norm=True),
        conditioning=Conditioning(PooledFeatures(512)),  # of ViT-B/32; 768 of ViT-L/14
        token_dropout=0.0,
        corruption=1.0,
    ),
    data=Data(ArrayRecord("data/glyphs"), image_size=32, batch_size=32),
    train=Train(
        steps=650,
        optimizer=Optimizer("muon", 2e-2, adam_learning_rate=3e-3, warmup=50, final=0.05, weight_decay=0.01),
        ema=0.99,
        evaluate_every=325,
        preview_every=325,
        save_every=325,
    ),
    codec="runs/glyphs/vqgan",
    text=ClipEmbedding("models/clip-vit-base-patch32"),
)
