"""Captions and pictures in one space: ten-style glyphs and clip art together, 64x64, by the CLIP of `glyphs_clip.py`.

    t2i data build glyphs --out data/glyphs_all --size 64 --styles all
    python -m examples.clipart unpacked data/clipart
    t2i data vocab configs/clipart_clip.py --out data/clipart.model
    t2i train configs/clipart_clip.py --run runs/clipart/clip
    t2i evaluate runs/clipart/clip --count 400 --data data/clipart/test

`examples/clipart.py` says where the clip art comes from. docs/results/clip.md has what came of it.
"""

from dataclasses import replace
from pathlib import Path

from t2i_jax.data.sources import ArrayRecord, Folder, Mixture
from t2i_jax.text.sentencepiece import SentencePiece
from t2i_jax.training.experiment import load_experiment

base = load_experiment(Path(__file__).with_name("glyphs_clip.py"))
experiment = replace(
    base,
    data=replace(
        base.data,
        source=Mixture((ArrayRecord("data/glyphs_all"), Folder("data/clipart/train")), weights=(0.5, 0.5)),
        held_out=Folder("data/clipart/test"),
    ),
    text=SentencePiece("data/clipart.model", length=20),
)
