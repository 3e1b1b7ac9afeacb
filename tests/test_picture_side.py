"""`t2i convert --codec`: every family takes a codec of its codes and no other, and knows the size of its images."""

import contextlib

import jax
import numpy as np
import pytest

from t2i_jax import heads
from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.dvae import DVAE, DALLEPytorchVAE, OpenAIdVAE
from t2i_jax.codecs.kl import KL
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.convert.folders import image_side
from t2i_jax.core.config import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.data import ArrayRecord, Data
from t2i_jax.models.any_order import AnyOrder
from t2i_jax.models.ar import AR
from t2i_jax.models.clip import CLIP
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.models.masked import Masked
from t2i_jax.models.stream import Stream, StreamText
from t2i_jax.models.vq_diffusion import VQDiffusion
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.networks.dit import DiT
from t2i_jax.noise.discrete import Chain
from t2i_jax.storage.artifacts import Artifact, save_artifact
from t2i_jax.training.experiment import Experiment, frozen_parts

SMALL = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "groups": 4}
PLAIN = {"adversarial": 0.0, "perceptual": 0.0}
CODECS = {
    "vqgan": VQGAN(AutoencoderConfig(**SMALL, latent=4), QuantizerConfig(20, 4), **PLAIN),
    "vqgan of 30": VQGAN(AutoencoderConfig(**SMALL, latent=4), QuantizerConfig(30, 4), **PLAIN),
    "dvae": DVAE(20, OpenAIdVAE(channels=8, groups=3, blocks=1, code=4)),
    "strided": DVAE(30, DALLEPytorchVAE(channels=8, layers=2, blocks=1, code=4), pixels="l2"),
    "kl": KL(AutoencoderConfig(**SMALL, latent=4, moments=True), **PLAIN),
    "kl of 16": KL(AutoencoderConfig(**SMALL, latent=16, moments=True), **PLAIN),
}
SIZES = {"width": 16, "depth": 1, "heads": 2, "condition": ClassEmbedder(3)}
FAMILIES = {
    "ar": (with_fields(AR(), vocabulary=20, grid=(2, 3), **SIZES), {"vqgan", "dvae"}),
    "stream": (
        with_fields(Stream(), vocabulary=30, grid=(3, 2), condition=StreamText(10, 4), width=16, depth=1, heads=2),
        {"vqgan of 30", "strided"},
    ),
    "vq_diffusion": (with_fields(VQDiffusion(), chain=Chain(20), grid=(2, 2), **SIZES), {"vqgan", "dvae"}),
    "masked": (
        with_fields(Masked(), grid=(2, 2), head=heads.SoftmaxHead(30), buffer=1, **SIZES),
        {"vqgan of 30", "strided"},
    ),
    "any_order": (with_fields(AnyOrder(), grid=(2, 2), head=heads.SoftmaxHead(20), **SIZES), {"vqgan", "dvae"}),
    "diffusion": (
        Diffusion(with_fields(DiT(), size=(4, 6), channels=4, width=16, depth=1, heads=2, condition=ClassEmbedder(3))),
        {"kl"},
    ),
}
for patch, dim, codec in ((1, 4, "kl"), (1, 16, "kl of 16"), (2, 16, "kl"), (2, 64, "kl of 16")):
    for head in (heads.DiffusionHead(dim, 8, 1), heads.FlowHead(dim, 8, 1), heads.MixtureHead(dim, 2)):
        name = f"{type(head).__name__} {patch} {dim}"
        FAMILIES[f"masked {name}"] = (
            with_fields(Masked(), grid=(2, 2), patch=patch, head=head, buffer=1, **SIZES),
            {codec},
        )
        FAMILIES[f"any_order {name}"] = (
            with_fields(AnyOrder(), grid=(2, 2), patch=patch, head=head, **SIZES),
            {codec},
        )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    room = tmp_path_factory.mktemp("codecs")
    for name, config in CODECS.items():
        model = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(config.init, jax.random.key(0)))
        save_artifact(Artifact(config, model), room / name, "")
    return room


def drawn(family, codec):
    """The shape of the image that the codec makes of what the family draws."""
    condition = {"label": np.zeros(1, np.int32)}
    if isinstance(family, Stream):
        condition = {"text": np.zeros((1, 4), np.int32), "text_mask": np.ones((1, 4), bool)}

    def draw(key):
        codes = family.sample(family.init(key), condition, key[None], family.options().arrays())
        return codec.decode(codec.init(key), codes)

    return jax.eval_shape(draw, jax.random.key(0)).shape


@pytest.mark.parametrize("name", FAMILIES)
def test_the_side_is_that_of_what_is_drawn_and_other_codecs_are_refused(folders, name):
    family, fitting = FAMILIES[name]
    for codec, config in CODECS.items():
        if codec in fitting:
            assert image_side(family, str(folders / codec)) == drawn(family, config)[1]
        else:
            with pytest.raises(ConfigError, match="this is not its codec"):
                image_side(family, str(folders / codec))
            mine, its = family.sample_spec().code, config.spec.code
            larger = bool(mine.sizes) and (mine.shape == its.shape) and mine.sizes > its.sizes > ()
            refused = contextlib.nullcontext() if larger else pytest.raises(ConfigError, match="this is not its codec")
            with refused:  # a run may have more code numbers than its codec
                frozen_parts(Experiment(family, Data(ArrayRecord("nowhere")), codec=str(folders / codec)))
    assert image_side(family, "") == 0


def test_what_draws_nothing_takes_no_codec(folders):
    for config in (CLIP(), CODECS["vqgan"]):
        with pytest.raises(ConfigError, match="draws no images, so it takes no codec"):
            image_side(config, str(folders / "vqgan"))
