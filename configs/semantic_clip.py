"""Captions and noised 32x32 glyphs of ten styles in one space: the CLIP that guides `semantic_diffusion.py`.

    t2i data vocab configs/semantic_clip.py --out data/glyphs_all/vocabulary.model
    t2i train configs/semantic_clip.py --run runs/glyphs/noised_clip

That of `glyphs_clip.py` on smaller images, with the noise of the diffusion, whose times it is given.
"""

from dataclasses import replace
from pathlib import Path

from t2i_jax.noise.processes import Discrete
from t2i_jax.training.experiment import load_experiment

base = load_experiment(Path(__file__).with_name("glyphs_clip.py"))
experiment = replace(
    base,
    model=replace(
        base.model, towers=replace(base.model.towers, size=32, patch=4, times=1000), noise=Discrete("cosine")
    ),
    data=replace(base.data, image_size=32, crop="center"),
    train=replace(base.train, steps=600),
)
