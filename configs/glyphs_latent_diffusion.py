"""Captions to 32x32 glyphs in the manner of Stable Diffusion (Rombach et al. 2022): a UNet of latents, CLIP's tokens.

Latents are those of `glyphs_kl.py`. A CLIP is yours to bring: `text.folder` names it. `t2i encode
configs/glyphs_latent_diffusion.py --out data/glyphs_sd` stores latents and features once.
"""

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import Conditioning, CrossAttnFeatures
from t2i_jax.networks.unet import UNet
from t2i_jax.noise.processes import Discrete
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.text.clip import ClipText
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=Diffusion(
        UNet(
            (8, 8),
            channels=8,
            width=64,
            multipliers=(1, 2),
            blocks=1,
            attention=(1, 2),
            transformers=1,
            conditioning=Conditioning(CrossAttnFeatures(512, 77)),
            context=512,
            pool="none",
            scale_shift=False,
            resample="conv",
            learn_variance=False,
        ),
        Discrete("scaled_linear"),
        solver="dpm++",
        sampling=DiffusionSampler(30, guidance=3.0),
    ),
    data=Data(ArrayRecord("data/glyphs"), image_size=32, batch_size=32),
    train=Train(steps=2000, optimizer=Optimizer(learning_rate=3e-4, warmup=100), ema=0.99),
    codec="runs/glyphs/kl_scaled",
    text=ClipText("models/clip-vit-base-patch32"),
)
