"""Captions to 32x32 glyphs of ten styles, by a diffusion on pixels that another model may guide.

    t2i data build glyphs --out data/glyphs_all --size 64 --styles all
    t2i encode configs/semantic_diffusion.py --out data/glyphs_sentences
    t2i train configs/semantic_diffusion.py --run runs/glyphs/pixels --data.source.path=data/glyphs_sentences
    t2i train configs/semantic_clip.py --run runs/glyphs/noised_clip
    t2i sample runs/glyphs/pixels "a red heart" --classifier runs/glyphs/noised_clip --classifier-scale 3
    t2i sample runs/glyphs/pixels "a red heart" --classifier runs/glyphs/noised_clip --reference heart.png

Semantic Diffusion Guidance (Liu et al. 2023): docs/results/semantic_guidance.md has what it gains.
"""

from dataclasses import replace

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import Conditioning, TextFeatures
from t2i_jax.networks.dit import DiT
from t2i_jax.noise.processes import Discrete
from t2i_jax.presets import ADALN
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=Diffusion(
        DiT(
            size=(32, 32),
            channels=3,
            patch=4,
            transformer=replace(ADALN, width=192, depth=4, heads=4, qk_norm=True),
            conditioning=Conditioning(TextFeatures(MiniLM.dim, 1)),
            shared=True,
            learn_variance=False,
        ),
        Discrete("cosine"),
        "v",
        solver="dpm++",
        sampling=DiffusionSampler(20, guidance=2.0),
    ),
    data=Data(ArrayRecord("data/glyphs_all"), image_size=32, batch_size=32),
    train=Train(
        steps=1000,
        # Muon wants rates ten times those of Adam, which moves the tables.
        optimizer=Optimizer("muon", 1e-2, adam_learning_rate=2e-3, warmup=50, final=0.02, weight_decay=0.01),
        ema=0.99,
        evaluate_every=250,
        preview_every=500,
        save_every=250,
    ),
    text=MiniLM(16, pooled=True),
)
