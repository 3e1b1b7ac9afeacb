"""VQ-Diffusion and next-token prediction, and its own claims, on 32x32 glyphs: `t2i compare` runs it.

Codes and caption features are those of `t2i encode configs/glyphs_ar.py`. Every sixth image is
used, so that minutes of training are many passes over them.
"""

from dataclasses import replace
from typing import Any

from t2i_jax.comparison import Comparison, Sweep, Variant
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.ar import AR
from t2i_jax.models.vq_diffusion import VQDiffusion
from t2i_jax.networks.condition import Conditioning, CrossAttnFeatures, TextFeatures
from t2i_jax.nn.transformer import Transformer
from t2i_jax.noise.discrete import Chain
from t2i_jax.presets import GPT
from t2i_jax.sampling.options import ARSampler, DiscreteSampler
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

TEXT = MiniLM(16, pooled=True)
OPTIMIZER = Optimizer("muon", 2e-2, adam_learning_rate=3e-3, warmup=20, final=0.05, weight_decay=0.01)


def on_codes(model: Any) -> Experiment:
    return Experiment(
        model,
        Data(ArrayRecord("data/glyphs_codes", every=6), image_size=32, batch_size=16),
        Train(optimizer=OPTIMIZER, ema=0.98),
        codec="runs/glyphs/vqgan",
        text=TEXT,
    )


def diffusion(**chain: Any) -> Experiment:
    return on_codes(
        VQDiffusion(
            Chain(512, steps=100, **chain),
            grid=(8, 8),
            transformer=replace(GPT, width=144, depth=4, heads=4, activation="quick_gelu"),
            conditioning=Conditioning(CrossAttnFeatures(MiniLM.dim, 1)),
            sampling=DiscreteSampler(guidance=2.0, truncation=0.9, steps=50),
        )
    )


ar = AR(
    vocabulary=512,
    grid=(8, 8),
    transformer=Transformer(width=192, depth=4, heads=4, mlp=544, qk_norm=True),
    conditioning=Conditioning(TextFeatures(MiniLM.dim, 1)),
    token_dropout=0.0,
    sampling=ARSampler(guidance=1.0, temperature=0.25),
)

MAIN = "mask and replace"
KINDS = (MAIN, "mask only", "replace only")

experiment = Comparison(
    title="Discrete diffusion and next-token prediction",
    about="""
VQ-Diffusion (Gu et al. 2022; Tang et al. 2022) says of itself: quality above next-token models of like size, at a
fraction of their time; steps can be left out; mask-and-replace is better than either alone; truncation and guidance
help. Here each is tried with about 2.2 M parameters on 32x32 images of 64 codes.
""",
    runs={
        "next token": on_codes(ar),
        MAIN: diffusion(),
        "mask only": diffusion(kind="mask"),
        "replace only": diffusion(kind="replace"),
    },
    reference=Experiment(ar, Data(ArrayRecord("data/glyphs", every=6), image_size=32)),
    flops=5e12,
    sweeps={
        "steps": Sweep(
            "Steps of the sampler, and kinds of noise",
            "steps",
            (100, 50, 25, 10),
            {kind: Variant(kind) for kind in KINDS},
        ),
        "truncation": Sweep("Truncation", "truncation", (1.0, 0.9, 0.75, 0.5), {MAIN: Variant(MAIN, {"steps": 25})}),
        "guidance": Sweep(
            "Guidance",
            "guidance",
            (1.0, 2.0, 4.0, 6.0),
            {MAIN: Variant(MAIN, {"steps": 25}), "next token": Variant("next token")},
        ),
        "temperature": Sweep(
            "Temperature",
            "temperature",
            (1.0, 0.5, 0.25),
            {MAIN: Variant(MAIN, {"steps": 25}), "next token": Variant("next token")},
        ),
        "purity": Sweep(
            "Purity: tokens chosen by how sure they are",
            "purity",
            (0.0, 1.0, 2.0),
            {
                MAIN: Variant(MAIN, {"steps": 10, "rule": 2}),
                "mask only": Variant("mask only", {"steps": 10, "rule": 2}),
            },
        ),
    },
)
