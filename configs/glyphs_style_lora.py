"""A style as adapters (LoRA): line drawings by the MaskGIT of `glyphs_maskgit.py`, whose own weights do not change.

    t2i data build glyphs --out data/glyphs_line --size 32 --styles openmoji-line
    t2i encode configs/glyphs_maskgit.py --data.source.path=data/glyphs_line --out data/glyphs_line_codes
    t2i train configs/glyphs_style_lora.py --run runs/glyphs/line
    t2i sample runs/glyphs/maskgit "a red heart" --lora runs/glyphs/line=0.7

To teach a subject in place of a style, as DreamBooth does, let the base keep its kind: sample a few hundred images of
the kind by the base, and mix them in with `Mixture((mine, made), weights=(0.5, 0.5))`, their prompts as captions.
"""

from dataclasses import replace
from pathlib import Path

from t2i_jax.data.sources import ArrayRecord
from t2i_jax.nn.lora import LoRA
from t2i_jax.training.experiment import load_experiment
from t2i_jax.training.optimizer import Optimizer

base = load_experiment(Path(__file__).with_name("glyphs_maskgit.py"))
experiment = replace(
    base,
    data=replace(base.data, source=ArrayRecord("data/glyphs_line_codes")),
    train=replace(
        base.train,
        start="runs/glyphs/maskgit",
        lora=LoRA(rank=8, alpha=16.0),
        steps=400,
        optimizer=Optimizer("adamw", 2e-3, warmup=20, weight_decay=0.0),
        evaluate_every=100,
        preview_every=100,
        save_every=100,
    ),
)
