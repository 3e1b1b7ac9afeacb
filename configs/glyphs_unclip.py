"""unCLIP on 64x64 glyphs of ten styles (Ramesh et al. 2022, DALL-E 2): a prior of CLIP embeddings and a decoder.

The CLIP is that of `glyphs_clip.py`, and the decoder draws the latents of `zoo_kl.py`. A step trains both parts, each
by its own loss, on stored latents, features and embeddings:

    t2i data build glyphs --out data/glyphs_all --size 64 --styles all
    t2i encode configs/glyphs_unclip.py --out data/glyphs_unclip
    t2i train configs/glyphs_unclip.py --run runs/glyphs/unclip --data.source.path=data/glyphs_unclip
    t2i sample runs/glyphs/unclip "a red heart"
    t2i sample runs/glyphs/unclip --vary heart.png --count 8
    t2i sample runs/glyphs/unclip --blend heart.png house.png --share 0.5

What came of it is in docs/results/unclip.md. The run is one model: `t2i sample` draws an embedding for each prompt, and
an image of it. With another CLIP, as Hugging Face or open_clip lay it out or a file of OpenAI's, `text.folder` names it
and FEATURES are of its size: (512, 78) of a ViT-B/32.
"""

from dataclasses import replace

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.models.unclip import UnCLIP
from t2i_jax.networks.condition import Conditioning, CrossAttnFeatures
from t2i_jax.networks.dit import DiT
from t2i_jax.networks.prior import EmbeddingPrior
from t2i_jax.networks.unclip import CaptionAndTokens, ImageAndCaption
from t2i_jax.nn.transformer import Transformer
from t2i_jax.noise.processes import Discrete, Flow
from t2i_jax.presets import ADALN
from t2i_jax.sampling.options import DiffusionSampler, UnCLIPSampler
from t2i_jax.text.clip import ClipCaption
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

FEATURES = CrossAttnFeatures(128, 21)
WIDTH = 192

experiment = Experiment(
    model=UnCLIP(
        prior=Diffusion(
            EmbeddingPrior(
                128,
                Transformer(128, 3, 4, norm="layer", activation="gelu", bias=True),
                Conditioning(CaptionAndTokens(FEATURES)),
            ),
            Discrete("cosine"),
            "x0",
            variance="fixed_small",
            clip_range=10.0,
            sampling=DiffusionSampler(25, guidance=2.0, clip=True),
        ),
        decoder=Diffusion(
            DiT(
                size=(8, 8),
                channels=16,
                patch=1,
                transformer=replace(ADALN, width=WIDTH, depth=4, heads=4, qk_norm=True),
                conditioning=Conditioning(ImageAndCaption(FEATURES, summary=WIDTH)),
                shared=True,
                learn_variance=False,
            ),
            Flow(),
            predicts="velocity",
            solver="dpm++",
        ),
        candidates=2,
        sampling=UnCLIPSampler(12, guidance=2.0, prior_guidance=2.0),
        fit_examples=8192,  # mean and standard deviation of embeddings
    ),
    data=Data(ArrayRecord("data/glyphs_all"), image_size=64, batch_size=64),
    train=Train(
        steps=700,
        # Muon wants rates ten times those of Adam, which moves the tables.
        optimizer=Optimizer("muon", 1e-2, adam_learning_rate=2e-3, warmup=50, final=0.02, weight_decay=0.01),
        ema=0.99,
        evaluate_every=250,
        preview_every=500,
        save_every=250,
    ),
    codec="docs/results/zoo/kl",
    text=ClipCaption("docs/results/clip"),
)
