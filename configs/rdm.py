"""Images without captions by retrieval: RDM (Blattmann et al. 2022) on 32x32 glyphs.

Diffusion reads the CLIP embeddings of the nearest images of a database, in sampling that of the caption first. A CLIP
is yours to bring, and the database is made of the images of any config; the training images are in this one, so the
nearest neighbour of each, itself, is left out:

    t2i data neighbours configs/rdm.py --out data/glyphs_clip
    t2i train configs/rdm.py --run runs/glyphs/rdm
    t2i sample runs/glyphs/rdm "a red heart"

`knn_diffusion.py` trains on the embedding of the image, too, and `rarm.py` is autoregressive.
"""

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import Conditioning, CrossAttnFeatures
from t2i_jax.networks.unet import UNet
from t2i_jax.noise.processes import Discrete
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.text.clip import ClipEmbedding
from t2i_jax.text.retrieval import Neighbours
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

experiment = Experiment(
    model=Diffusion(
        UNet(
            size=(32, 32),
            width=64,
            multipliers=(1, 2, 3),
            blocks=1,
            attention=(4,),
            head_dim=32,
            transformers=1,
            conditioning=Conditioning(CrossAttnFeatures(512, 4, trained_null=False, zero_null=True)),
            context=512,
            pool="none",
            scale_shift=False,
            resample="conv",
            learn_variance=False,
        ),
        Discrete("scaled_linear", ends=(0.0015, 0.0195)),
        solver="ddim",
        sampling=DiffusionSampler(steps=100, guidance=2.0, spacing="leading"),
    ),
    data=Data(ArrayRecord("data/glyphs"), image_size=32, batch_size=32),
    train=Train(steps=2000, optimizer=Optimizer(learning_rate=3e-4, warmup=100), ema=0.999),
    text=Neighbours(ClipEmbedding("models/clip-vit-base-patch32"), "data/glyphs_clip", skipped=1),
)
