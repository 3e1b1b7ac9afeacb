"""unCLIP on 32x32 glyphs with its other prior (Ramesh et al. 2022, 2.2), which draws codes of an embedding one by one.

The codes are leading principal components of CLIP embeddings, computed from the first `fit_examples` examples, each in
equal buckets; the prior is an `AR` over them, by the caption, its embedding and how similar caption and image are. In
the paper 319 of 1024 components are kept; of the 512 of a ViT-B/32 about half hold as much.

The rest is as in `glyphs_unclip.py`, whose CLIP and stored features and embeddings it reads.
"""

from t2i_jax.codecs.principal import PrincipalCodes
from t2i_jax.core.family import with_fields
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.ar import AR
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.models.unclip import UnCLIP
from t2i_jax.networks.condition import Conditioning, CrossAttnFeatures, Joined
from t2i_jax.networks.unclip import CaptionAndTokens, ImageAndCaption, Similarity
from t2i_jax.networks.unet import UNet
from t2i_jax.nn.positions import LearnedPositions
from t2i_jax.noise.processes import Discrete
from t2i_jax.sampling.options import UnCLIPSampler
from t2i_jax.text.clip import ClipCaption
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

FEATURES = CrossAttnFeatures(512, 78)
CODES = PrincipalCodes(kept=160, buckets=256)

experiment = Experiment(
    model=UnCLIP(
        prior=with_fields(
            AR(CODES.buckets, (1, CODES.kept)),
            condition=Joined((CaptionAndTokens(FEATURES), Similarity(CODES.buckets))),
            positions=LearnedPositions(),
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
        codes=CODES,
        fit_examples=8192,
    ),
    data=Data(ArrayRecord("data/glyphs"), image_size=32, batch_size=32),
    train=Train(steps=2000, optimizer=Optimizer(learning_rate=3e-4, warmup=100), ema=0.99),
    text=ClipCaption("models/clip-vit-base-patch32"),
)
