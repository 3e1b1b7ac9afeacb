"""MAR's table on 32x32 glyphs: every order with a softmax over codes and with a diffusion head over latents.

Codes are those of `glyphs_vqgan.py`, latents those of `glyphs_kl.py`; both are stored with the captions' features.
Every twelfth image is used, so that minutes of training are many passes over them. `t2i compare` runs it.
"""

import dataclasses
from dataclasses import replace
from typing import Any

from t2i_jax.comparison import Comparison, Sweep, Variant
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.heads import DiffusionHead, FlowHead, SoftmaxHead
from t2i_jax.models.any_order import AnyOrder
from t2i_jax.models.masked import Masked
from t2i_jax.networks.condition import Conditioning, TextFeatures
from t2i_jax.nn.transformer import Transformer
from t2i_jax.presets import MAR
from t2i_jax.sampling.options import ARSampler, MaskedSampler
from t2i_jax.sampling.orders import Confidence, Permutation, Raster, Sets
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

TEXT = MiniLM(16, pooled=True)
OPTIMIZER = Optimizer("muon", 2e-2, adam_learning_rate=3e-3, warmup=20, final=0.05, weight_decay=0.01)
SHAPE: dict[str, Any] = dict(grid=(8, 8), conditioning=Conditioning(TextFeatures(MiniLM.dim, 1)))

HEADS = {
    "softmax": (SoftmaxHead(512), "data/glyphs_codes", "runs/glyphs/vqgan", 0.25),
    # The published cosine schedule ends in noise alone, where a head must know eps to 1e-5: hours away.
    "diffusion": (
        DiffusionHead(dim=8, width=128, depth=3, schedule="linear", respacing="25"),
        "data/glyphs_latents",
        "runs/glyphs/kl_scaled",
        0.7,
    ),
    "flow": (FlowHead(dim=8, width=128, depth=3, steps=8), "data/glyphs_latents", "runs/glyphs/kl_scaled", 0.7),
}


def cell(family: Any, order: Any, head: str) -> Experiment:
    kind, data, codec, temperature = HEADS[head]
    if family is AnyOrder:
        transformer = Transformer(width=192, depth=4, heads=4, qk_norm=True)
        drawn = ARSampler(guidance=1.0, temperature=temperature)
        model = AnyOrder(head=kind, order=order, transformer=transformer, sampling=drawn, **SHAPE)
    else:
        drawn = MaskedSampler(guidance=1.0, temperature=temperature, iterations=16)
        transformer = replace(MAR, width=192, depth=2, heads=4, dropout=0.0)
        model = Masked(head=kind, order=order, transformer=transformer, buffer=4, sampling=drawn, **SHAPE)
    return Experiment(
        model,
        Data(ArrayRecord(data, every=12), image_size=32, batch_size=16),
        Train(optimizer=OPTIMIZER, ema=0.98),
        codec=codec,
        text=TEXT,
    )


TABLE = ("softmax", "diffusion")
CELLS = {
    "causal, raster": (AnyOrder, Raster()),
    "causal, random": (AnyOrder, Permutation()),
    "masked, one by one": (Masked, Permutation()),
    "masked, random sets": (Masked, Sets()),
}
runs = {f"{name}, {head}": cell(*parts, head) for name, parts in CELLS.items() for head in TABLE}
runs["masked, random sets, flow"] = cell(Masked, Sets(), "flow")

SOFTMAX, DIFFUSION, FLOW = (f"masked, random sets, {head}" for head in HEADS)

experiment = Comparison(
    title="Orders and heads",
    about="""
MAR (Li et al. 2024) says: autoregression needs no quantisation, a diffusion head over latents is better than a softmax
over codes in every order, random orders are better than raster, bidirectional attention better than causal, and sets of
tokens are as good as single ones and much faster. With a caption, random order with a diffusion head is what Fluid
does, and masked sets with a softmax what Muse does. Here each cell has 2.1 to 2.3 M parameters, on 32x32 images of 64
tokens.
""",
    runs=runs,
    reference=dataclasses.replace(
        next(iter(runs.values())), data=Data(ArrayRecord("data/glyphs", every=12), image_size=32)
    ),
    flops=6e12,
    sweeps={
        "iterations": Sweep(
            "Steps in which the tokens become known",
            "iterations",
            (4, 8, 16, 64),
            {
                "softmax": Variant(SOFTMAX),
                "softmax, by confidence": Variant(SOFTMAX, family={"order": Confidence()}),
                "diffusion": Variant(DIFFUSION),
                "flow": Variant(FLOW),
            },
        ),
        "saved": Sweep(
            "Tokens that are not known pass no encoder; only what is asked for passes the head",
            "iterations",
            (16, 64),
            {
                "encoder of four sizes": Variant(DIFFUSION),
                "encoder of eight sizes": Variant(DIFFUSION, family={"size_buckets": 8}),
                "encoder of all tokens": Variant(DIFFUSION, family={"size_buckets": 1}),
                "head of 50 steps": Variant(
                    DIFFUSION, family={"head": dataclasses.replace(HEADS["diffusion"][0], respacing="50")}
                ),
                "head of 5 steps": Variant(
                    DIFFUSION, family={"head": dataclasses.replace(HEADS["diffusion"][0], respacing="5")}
                ),
            },
            about="The images are the same for any sizes; what is left of the time without steps of the head is the "
            "backbone's.",
        ),
        "temperature": Sweep(
            "Temperature",
            "temperature",
            (1.0, 0.7, 0.4),
            {"softmax": Variant(SOFTMAX), "diffusion": Variant(DIFFUSION)},
        ),
        "guidance": Sweep(
            "Guidance", "guidance", (1.0, 2.0, 4.0), {"softmax": Variant(SOFTMAX), "diffusion": Variant(DIFFUSION)}
        ),
    },
)
