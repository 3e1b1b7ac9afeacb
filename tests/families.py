"""Every family and codec at the smallest size that has all its parts, and batches of what each says it takes."""

import numpy as np

from t2i_jax import heads
from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.discriminator import DiscriminatorConfig
from t2i_jax.codecs.dvae import DVAE, DALLEPytorchVAE
from t2i_jax.codecs.kl import KL
from t2i_jax.codecs.quantize import GumbelConfig, QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.models.any_order import AnyOrder
from t2i_jax.models.ar import AR
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.models.masked import Masked
from t2i_jax.models.noised_classifier import NoisedClassifier
from t2i_jax.models.noised_clip import NoisedCLIP
from t2i_jax.models.stream import Stream, StreamText
from t2i_jax.models.vq_diffusion import VQDiffusion
from t2i_jax.networks.condition import (
    CaptionEncoder,
    ClassEmbedder,
    CrossAttnFeatures,
    PooledAndTokenFeatures,
    PooledFeatures,
    PrefixTokens,
    TextFeatures,
)
from t2i_jax.networks.dit import DiT
from t2i_jax.networks.glide_captions import GlideCaptions
from t2i_jax.networks.unet import UNet
from t2i_jax.noise.discrete import Chain
from t2i_jax.noise.processes import EDM, Discrete, Flow
from t2i_jax.sampling.orders import Confidence, Permutation
from t2i_jax.training.objectives import forward_of, losses

CAPTIONS = CaptionEncoder(20, 6, width=16, depth=1, heads=2)
CONV = dict(channels=8, multipliers=(1, 2), blocks=1, groups=4)
GAME = dict(perceptual=0.0, start=0, discriminator=DiscriminatorConfig(width=8, layers=1))
SMALL = dict(grid=(2, 2), width=16, depth=1, heads=2)
HEAD = dict(dim=3, width=16, depth=1)
DENOISER = dict(patch=2, width=16, depth=1, heads=2, frequency_dim=16)
UNET = dict(size=(4, 4), width=8, multipliers=(1, 2), blocks=1, attention=(1, 2), groups=4, heads=2)

CODECS = {
    "vqgan": VQGAN(AutoencoderConfig(**CONV, latent=8), QuantizerConfig(16, 4, decay=0.9), **GAME),
    "vqgan-gradient": VQGAN(AutoencoderConfig(**CONV, latent=8), QuantizerConfig(16, 4, decay=0.0), **GAME),
    "vqgan-gumbel": VQGAN(AutoencoderConfig(**CONV, latent=8), GumbelConfig(16, 4), **GAME),
    "kl": KL(AutoencoderConfig(**CONV, latent=4, moments=True), channels=3, **GAME),
    "dvae": DVAE(16, DALLEPytorchVAE(channels=8, layers=1, blocks=1, code=4), pixels="l2", kl=0.1),
}
FAMILIES = {
    "ar": AR(16, **SMALL, condition=ClassEmbedder(3)),
    "ar-captions": AR(16, **SMALL, condition=CAPTIONS, conditioning="cross_attention", positions="learned"),
    "ar-features": AR(16, **SMALL, condition=TextFeatures(5, 6)),
    "ar-vector": AR(16, **SMALL, condition=PooledFeatures(5)),
    "ar-given": AR(16, **SMALL, condition=PrefixTokens(1), tied=True),
    "stream": Stream(16, (2, 2), StreamText(20, 6), 16, 1, 2),
    "masked": Masked(**SMALL, head=heads.SoftmaxHead(16), order=Confidence(), condition=CAPTIONS, buffer=4),
    "masked-diffusion": Masked(**SMALL, head=heads.DiffusionHead(**HEAD), condition=ClassEmbedder(3), buffer=4),
    "masked-flow": Masked(**SMALL, head=heads.FlowHead(**HEAD), condition=TextFeatures(5, 6), buffer=4),
    "masked-mixture": Masked(**SMALL, head=heads.MixtureHead(3, 2), condition=ClassEmbedder(3), buffer=4),
    "any-order": AnyOrder(**SMALL, head=heads.SoftmaxHead(16), order=Permutation(), condition=CAPTIONS),
    "any-order-flow": AnyOrder(**SMALL, head=heads.FlowHead(**HEAD), order=Permutation(), condition=ClassEmbedder(3)),
    "vq-diffusion": VQDiffusion(Chain(16, 10), **SMALL, condition=CrossAttnFeatures(5, 6)),
    "vq-diffusion-mask": VQDiffusion(
        Chain(16, 10, kind="mask"), **SMALL, condition=ClassEmbedder(3), objective="continuous", times="none"
    ),
    "dit": Diffusion(DiT((4, 4), 3, **DENOISER, condition=ClassEmbedder(3))),
    "flow": Diffusion(DiT((4, 4), 3, **DENOISER, condition=CAPTIONS, text="joint", learn_variance=False), Flow(), "v"),
    "edm": Diffusion(
        DiT(
            (4, 4),
            3,
            **DENOISER,
            condition=PooledAndTokenFeatures(CrossAttnFeatures(5, 6), 4),
            text="joint",
            learn_variance=False,
        ),
        EDM(),
        "v",
    ),
    "unet": Diffusion(
        UNet(**UNET, channels=3, context=16, condition=GlideCaptions(20, 6, 16, 1, 2), learn_variance=True)
    ),
    "upsampler": Diffusion(
        UNet(**UNET, channels=3, condition=None, learn_variance=False, extra_inputs=("low_res",)), upscale=2
    ),
    "classifier": NoisedClassifier(UNet(**UNET, channels=3, condition=None), classes=3),
    "noised-clip": NoisedCLIP(20, 6, 16, 1, 2, 4, 2, 16, 1, 2, 8, process=Discrete("cosine")),
}


def batch_for(config, b=4, seed=0):
    """A random batch of what a family or codec says it takes, an image where codes or an image will do."""
    rng, spec = np.random.default_rng(seed), config.batch_spec()
    either = "image" if "image" in spec else ""
    wanted = {k: f for k, f in spec.items() if not f.optional or k in (either, "label", "text_mask")}

    def one(field):
        shape = (b, *(4 * field.multiple if n is None else n for n in field.shape))
        if field.dtype == "bool":
            return rng.uniform(size=shape) < 0.8
        if field.dtype == "int32":
            return rng.integers(field.low, field.high + 1, shape).astype(np.int32)
        return rng.uniform(-1, 1, shape).astype(np.float32)

    return {k: one(field) for k, field in wanted.items()}


def losses_of(config, model, batch, key, step, train=True):
    """What the loss of each objective of a config gives, by name."""
    return losses(config.objectives(), forward_of(config), model, batch, key, step, train)


def with_aux(loss):
    """A loss for `jax.value_and_grad(..., has_aux=True)`: (loss, its whole `LossOutput`)."""
    return lambda *args: ((output := loss(*args)).loss, output)
