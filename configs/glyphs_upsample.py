"""The second stage of a cascade: glyphs of 32x32 enlarged to 64x64, conditioned on the noise level of the small image.

The small images of training are the large ones made smaller, with noise on them, so that what a first model gets
wrong is forgiven. Any model of 32x32 images may be the first:

    t2i data build glyphs --out data/glyphs64 --size 64
    t2i train configs/glyphs_upsample.py
    t2i sample runs/quickstart/model "a red heart" --upsample runs/glyphs_upsample
"""

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import Conditioning, TextFeatures
from t2i_jax.networks.unet import UNet
from t2i_jax.noise.processes import Discrete
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=Diffusion(
        network=UNet(
            size=(64, 64),
            width=64,
            multipliers=(1, 2, 3),
            blocks=1,
            attention=(4,),
            conditioning=Conditioning(TextFeatures(MiniLM.dim, 1)),
            extra_inputs=("low_res",),
            noise_aug_conditioning=True,
            learn_variance=False,
        ),
        process=Discrete("cosine"),
        predicts="v",
        upscale=2,
        noise_aug=0.5,
        solver="dpm++",
        sampling=DiffusionSampler(steps=20, guidance=1.5, noise_aug=0.1),
    ),
    data=Data(ArrayRecord("data/glyphs64"), image_size=64, batch_size=32),
    train=Train(steps=2000, optimizer=Optimizer(learning_rate=3e-4, warmup=100), ema=0.99),
    text=MiniLM(16, pooled=True),
)
