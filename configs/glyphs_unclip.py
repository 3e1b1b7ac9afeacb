"""unCLIP on 32x32 glyphs (Ramesh et al. 2022, DALL-E 2): a prior of CLIP embeddings and a decoder, trained together.

A CLIP is yours to bring, as Hugging Face or open_clip lay it out or a file of OpenAI's: `text.folder` names it. A step
trains both parts, each by its own loss. `t2i encode configs/glyphs_unclip.py --out data/glyphs_unclip` stores features
and embeddings, which are computed in each step otherwise. The run is one model: `t2i sample` draws an embedding for
each prompt, and an image of it; a run of `glyphs_upsample.py` enlarges it with --upsample.
"""

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.models.unclip import UnCLIP
from t2i_jax.networks.condition import Conditioning, CrossAttnFeatures
from t2i_jax.networks.prior import EmbeddingPrior
from t2i_jax.networks.unclip import CaptionAndTokens, ImageAndCaption
from t2i_jax.networks.unet import UNet
from t2i_jax.nn.transformer import Transformer
from t2i_jax.noise.processes import Discrete
from t2i_jax.sampling.options import DiffusionSampler, UnCLIPSampler
from t2i_jax.text.clip import ClipCaption
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

FEATURES = CrossAttnFeatures(512, 78)  # of ViT-B/32; 768 of ViT-L/14

experiment = Experiment(
    model=UnCLIP(
        prior=Diffusion(
            EmbeddingPrior(
                512,
                Transformer(256, 4, 4, norm="layer", activation="gelu", bias=True),
                Conditioning(CaptionAndTokens(FEATURES)),
            ),
            Discrete("cosine"),
            "x0",
            variance="fixed_small",
            clip_range=10.0,
            sampling=DiffusionSampler(25, guidance=2.0, clip=True),
        ),
        decoder=Diffusion(
            UNet(
                (32, 32),
                width=64,
                multipliers=(1, 2, 3),
                blocks=1,
                attention=(4,),
                conditioning=Conditioning(ImageAndCaption(FEATURES, summary=256)),
                context=128,
                pool="summary",
                learn_variance=False,
            ),
            Discrete("cosine"),
            "v",
            solver="dpm++",
        ),
        candidates=2,
        sampling=UnCLIPSampler(20, guidance=2.0, prior_guidance=2.0),
        fit_examples=8192,  # mean and standard deviation of embeddings
    ),
    data=Data(ArrayRecord("data/glyphs"), image_size=32, batch_size=32),
    train=Train(steps=2000, optimizer=Optimizer(learning_rate=3e-4, warmup=100), ema=0.99),
    text=ClipCaption("models/clip-vit-base-patch32"),
)
