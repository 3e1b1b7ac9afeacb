"""32x32 glyphs enlarged to 128x128 in the manner of Stable Diffusion's upscaler: a UNet of latents that reads captions,
and the small image with noise whose level is a condition.

Latents are those of `glyphs_kl.py`, a position for each pixel of the small image, which training makes of the large
one. Positions attend to each other at the lowest resolution alone.

    t2i data build glyphs --out data/glyphs128 --size 128
    t2i train configs/glyphs_latent_upsample.py
    t2i sample runs/imagen_glyphs "a red heart" --upsample runs/glyphs_latent_upsample
"""

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import Conditioning, CrossAttnFeatures
from t2i_jax.networks.unet import UNet
from t2i_jax.noise.processes import Discrete
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

WORDS = 16

experiment = Experiment(
    model=Diffusion(
        UNet(
            (32, 32),
            channels=8,
            width=64,
            multipliers=(1, 2, 2),
            blocks=1,
            attention=(2, 4),
            only_context=(2,),
            transformers=1,
            conditioning=Conditioning(CrossAttnFeatures(MiniLM.dim, WORDS)),
            context=MiniLM.dim,
            pool="none",
            scale_shift=False,
            resample="conv",
            extra_inputs=("low_res",),
            low_res_channels=3,
            noise_aug_conditioning=True,
            noise_levels=1000,
            learn_variance=False,
        ),
        Discrete("scaled_linear"),
        "v",
        noise_aug=0.35,
        low_res_process=Discrete("scaled_linear"),
        solver="ddim",
        sampling=DiffusionSampler(50, guidance=3.0, spacing="leading", noise_aug=0.02),
    ),
    data=Data(ArrayRecord("data/glyphs128"), image_size=128, batch_size=16),
    train=Train(steps=2000, optimizer=Optimizer(learning_rate=3e-4, warmup=100), ema=0.99),
    codec="runs/glyphs/kl_scaled",
    text=MiniLM(WORDS),
)
