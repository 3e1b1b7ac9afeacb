"""The second stage of Imagen for glyphs: 32x32 enlarged to 64x64 by an Efficient UNet, whose blocks are at low
resolutions; it reads the captions, and the small image with noise whose level is a condition.

Training draws the level of each image; `--noise-aug 0.2` gives that of samples:

    t2i data build glyphs --out data/glyphs64 --size 64
    t2i train configs/imagen_glyphs_upsample.py
    t2i sample runs/imagen_glyphs "a red heart" --upsample runs/imagen_glyphs_upsample
"""

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import Conditioning, CrossAttnFeatures
from t2i_jax.networks.imagen import AttentionPooledFeatures
from t2i_jax.networks.unet import UNet
from t2i_jax.noise.processes import Discrete
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

WORDS = 16
FEATURES = CrossAttnFeatures(MiniLM.dim, WORDS)

experiment = Experiment(
    model=Diffusion(
        UNet(
            (64, 64),
            width=64,
            multipliers=(1, 1, 2, 3),
            level_blocks=(0, 1, 2, 2),
            attention=(8,),
            only_context=(8,),
            resample="conv",
            resample_first=True,
            residual_scale=0.7071,
            conditioning=Conditioning(AttentionPooledFeatures(FEATURES, heads=6, summary=256)),
            context=128,
            context_norm="layer",
            pool="summary",
            extra_inputs=("low_res",),
            upscaling="cubic",
            noise_aug_conditioning=True,
            learn_variance=False,
        ),
        Discrete("cosine"),
        "v",
        upscale=2,
        noise_aug=1.0,
        low_res_process=Discrete("cosine"),
        solver="dpm++",
        sampling=DiffusionSampler(20, guidance=1.5, noise_aug=0.1, threshold=0.995),
    ),
    data=Data(ArrayRecord("data/glyphs64"), image_size=64, batch_size=32),
    train=Train(steps=2000, optimizer=Optimizer(learning_rate=3e-4, warmup=100), ema=0.99),
    text=MiniLM(WORDS),
)
