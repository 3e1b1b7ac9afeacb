"""A GAN, a next-token model and a latent flow of equal training compute, on 32x32 glyphs of ten styles.

    t2i data build glyphs --out data/glyphs_all --size 64 --styles all
    t2i train configs/glyphs_vqgan.py --run runs/glyphs_all/codec --data.source.path=data/glyphs_all
    t2i encode configs/glyphs_ar.py --data.source.path=data/glyphs_all --codec=runs/glyphs_all/codec \\
        --out data/glyphs_all_codes
    t2i train configs/glyphs_kl.py --run runs/glyphs_all/kl --data.source.path=data/glyphs_all
    t2i release runs/glyphs_all/kl --out runs/glyphs_all/kl_scaled --scale
    t2i encode configs/glyphs_flow.py --data.source.path=data/glyphs_all --codec=runs/glyphs_all/kl_scaled \\
        --out data/glyphs_all_latents
    t2i compare configs/compare_trilemma.py --out docs/results/trilemma

Every model reads a caption as one vector of the same frozen sentence encoder. The codecs' training is not counted.
"""

from dataclasses import replace

from t2i_jax.comparison import Comparison, Sweep, Variant
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.ar import AR
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.models.gan import GAN
from t2i_jax.networks.condition import Conditioning, CrossAttnFeatures, TextFeatures
from t2i_jax.networks.dit import DiT
from t2i_jax.networks.one_stage import OneStage, SemanticSpatial
from t2i_jax.networks.one_way import OneWay
from t2i_jax.nn.adversarial import Paired
from t2i_jax.nn.transformer import Transformer
from t2i_jax.noise.processes import Flow
from t2i_jax.presets import ADALN
from t2i_jax.sampling.options import ARSampler, DiffusionSampler, GANSampler
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

TEXT = MiniLM(16, pooled=True)
GAME = Optimizer("adam", 4e-4, schedule="constant", warmup=0, b1=0.0, b2=0.9, weight_decay=0.0, clip=0.0)

gan = Experiment(
    GAN(
        OneStage((32, 32), width=16, noise=32, block=SemanticSpatial(32)),
        OneWay(16),
        condition=CrossAttnFeatures(MiniLM.dim, 1, trained_null=False),
        paired=Paired(10.0, 16),
        sampling=GANSampler(0.88, 2.0),
    ),
    Data(ArrayRecord("data/glyphs_all"), image_size=32, batch_size=32),
    Train(
        optimizer=GAME,
        optimizers={"discriminator": replace(GAME, learning_rate=8e-4)},
        ema=0.998,
        ema_params=("generator",),
    ),
    text=TEXT,
)
next_token = Experiment(
    AR(
        vocabulary=512,
        grid=(8, 8),
        transformer=Transformer(width=192, depth=4, heads=4, qk_norm=True),
        conditioning=Conditioning(TextFeatures(MiniLM.dim, 1)),
        token_dropout=0.0,
        sampling=ARSampler(guidance=1.0, temperature=0.5),
    ),
    Data(ArrayRecord("data/glyphs_all_codes"), image_size=32, batch_size=32),
    Train(
        optimizer=Optimizer("muon", 2e-2, adam_learning_rate=3e-3, warmup=50, final=0.05, weight_decay=0.01), ema=0.99
    ),
    codec="runs/glyphs_all/codec",
    text=TEXT,
)
flow = Experiment(
    Diffusion(
        DiT(
            size=(8, 8),
            channels=8,
            patch=1,
            transformer=replace(ADALN, width=144, depth=5, heads=4),
            conditioning=Conditioning(TextFeatures(MiniLM.dim, 1)),
            learn_variance=False,
        ),
        Flow(),
        predicts="velocity",
        solver="dpm++",
        sampling=DiffusionSampler(steps=20, guidance=2.0),
    ),
    Data(ArrayRecord("data/glyphs_all_latents"), image_size=32, batch_size=32),
    Train(
        optimizer=Optimizer("muon", 1e-2, adam_learning_rate=2e-3, warmup=50, final=0.05, weight_decay=0.01), ema=0.99
    ),
    codec="runs/glyphs_all/kl_scaled",
    text=TEXT,
)

runs = {"GAN, one pass": gan, "next token": next_token, "latent flow": flow}

experiment = Comparison(
    title="The trilemma: a GAN, a next-token model, a latent flow",
    about="""
Generative models are said to have two of three things: good images, all of the data, speed (Xiao et al. 2022). The
three families of text-to-image models, each of about 2 M parameters that draw, are trained here with equal compute on
the same 13,356 images of ten styles and their captions, three times each.
""",
    runs=runs,
    reference=replace(gan, data=Data(ArrayRecord("data/glyphs_all"), image_size=32)),
    flops=2e13,
    repeats=3,
    sweeps={
        "truncation": Sweep(
            "Truncated noise, GAN",
            "temperature",
            (0.25, 0.5, 0.88, 1.0),
            {"GAN": Variant("GAN, one pass")},
            about="Noise of less variance: fewer kinds of images for a caption.",
        ),
        "temperature": Sweep(
            "Temperature, next token", "temperature", (0.25, 0.5, 1.0), {"next token": Variant("next token")}
        ),
        "guidance": Sweep(
            "Guidance, latent flow", "guidance", (1.0, 2.0, 4.0), {"latent flow": Variant("latent flow")}
        ),
    },
    count=500,
)
