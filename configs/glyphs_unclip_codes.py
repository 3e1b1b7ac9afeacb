"""unCLIP on 64x64 glyphs with its other prior (Ramesh et al. 2022, 2.2), which draws codes of an embedding one by one.

    t2i train configs/glyphs_unclip_codes.py --run runs/glyphs/unclip_codes --data.source.path=data/glyphs_unclip

The codes are leading principal components of CLIP embeddings, computed from the first `fit_examples` examples, each in
equal buckets; the prior is an `AR` over them, by the caption, its embedding and how similar caption and image are. In
the paper 319 of 1024 components are kept; here 64 of 128. The rest is as in `glyphs_unclip.py`, whose stored latents,
features and embeddings it reads.
"""

from dataclasses import replace
from pathlib import Path

from t2i_jax.codecs.principal import PrincipalCodes
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import Conditioning, CrossAttnFeatures, Joined
from t2i_jax.networks.unclip import CaptionAndTokens, Similarity
from t2i_jax.nn.positions import LearnedPositions
from t2i_jax.nn.transformer import Transformer
from t2i_jax.training.experiment import load_experiment

CODES = PrincipalCodes(kept=64, buckets=256)
READ = Joined((CaptionAndTokens(CrossAttnFeatures(128, 21)), Similarity(CODES.buckets)))

base = load_experiment(Path(__file__).with_name("glyphs_unclip.py"))
prior = AR(
    CODES.buckets,
    (1, CODES.kept),
    transformer=Transformer(width=128, depth=3, heads=4),
    conditioning=Conditioning(READ),
    positions=LearnedPositions(),
)
experiment = replace(base, model=replace(base.model, prior=prior, codes=CODES))
