"""Every family and codec computes the same loss, gradients and carried values on every mesh as on one device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.discriminator import DiscriminatorConfig
from t2i_jax.codecs.dvae import DVAE, DALLEPytorchVAE
from t2i_jax.codecs.kl import KL
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.core.sharding import MeshConfig, batch_sharding, shardings
from t2i_jax.core.types import Capabilities
from t2i_jax.heads import SoftmaxHead
from t2i_jax.models.any_order import AnyOrder
from t2i_jax.models.ar import AR
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.models.masked import Masked
from t2i_jax.models.vq_diffusion import VQDiffusion
from t2i_jax.networks.condition import CaptionEncoder
from t2i_jax.networks.dit import DiT
from t2i_jax.networks.unet import UNet
from t2i_jax.noise.discrete import Chain
from t2i_jax.noise.processes import Flow
from t2i_jax.sampling.orders import Permutation
from tests.fixtures.families import losses_of, with_aux

CODEC = VQGAN(
    AutoencoderConfig(16, (1, 2), blocks=1, latent=16, groups=4),
    QuantizerConfig(codes=32, decay=0.9),
    perceptual=0.0,
    start=0,
    discriminator=DiscriminatorConfig(width=8, layers=1),
)
LATENT = KL(
    AutoencoderConfig(16, (1, 2), blocks=1, latent=4, groups=4, moments=True),
    channels=4,
    perceptual=0.0,
    start=0,
    discriminator=DiscriminatorConfig(width=8, layers=1),
)
RELAXED = DVAE(32, DALLEPytorchVAE(channels=16, layers=2, blocks=1, code=8), pixels="l2", kl=0.1)
MODEL = AR(
    32,
    (4, 4),
    width=32,
    depth=3,
    heads=4,
    kv_heads=2,
    condition=CaptionEncoder(20, 6, width=32, depth=2, heads=4),
    remat="dots",
)
DISCRETE = VQDiffusion(
    Chain(32, 10),
    (4, 4),
    width=32,
    depth=3,
    heads=4,
    condition=CaptionEncoder(20, 6, width=32, depth=2, heads=4),
    remat="dots",
)

SHAPE = dict(grid=(4, 4), head=SoftmaxHead(32), width=32, depth=2, heads=4, remat="dots")
MASKED = Masked(**SHAPE, decoder_depth=3, condition=CaptionEncoder(20, 6, width=32, depth=2, heads=4))
ANY_ORDER = AnyOrder(**SHAPE, order=Permutation(), condition=CaptionEncoder(20, 6, width=32, depth=2, heads=4))
DENOISER = DiT(
    (4, 4),
    channels=3,
    patch=1,
    width=32,
    depth=3,
    heads=4,
    frequency_dim=32,
    condition=CaptionEncoder(20, 6, width=32, depth=2, heads=4),
    text="joint",
    learn_variance=False,
    remat="dots",
)


@dataclasses.dataclass(frozen=True)
class Shaken:
    """A diffusion model away from its zeros, through which no gradient comes."""

    family: Diffusion
    capabilities = Capabilities()

    def init(self, key):
        model = self.family.init(key)
        leaves, tree = jax.tree.flatten(model)
        keys = jax.random.split(key, len(leaves))
        shaken = [x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        return tree.unflatten(shaken)

    def objectives(self):
        return self.family.objectives()


FLOW = Shaken(Diffusion(DENOISER, Flow(), "velocity"))
SHAPE_OF_UNET = UNet(
    (4, 4), width=32, multipliers=(1, 2), blocks=1, attention=(1, 2), context=32, condition=DENOISER.condition
)
UNET = Shaken(Diffusion(SHAPE_OF_UNET))
LATENT_UNET = Shaken(Diffusion(dataclasses.replace(SHAPE_OF_UNET, transformers=2, scale_shift=False, pool="none")))


def batch_of(trainable):
    rng = np.random.default_rng(0)
    if isinstance(trainable, VQGAN | KL | DVAE):
        return {"image": rng.uniform(-1, 1, (16, 16, 16, 3)).astype(np.float32)}
    text = {"text": rng.integers(0, 20, (16, 6)), "text_mask": rng.uniform(size=(16, 6)) < 0.8}
    if isinstance(trainable, Shaken):
        return {"image": rng.uniform(-1, 1, (16, 4, 4, 3)).astype(np.float32)} | text
    return {"codes": rng.integers(0, 32, (16, 4, 4))} | text


def outcome(trainable, mesh):
    """Losses, gradients and metrics of all objectives on a mesh, on the host."""
    mesh = MeshConfig(*mesh).build()
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(trainable.init, jax.random.key(0))
        model = jax.jit(trainable.init, out_shardings=shardings(abstract, mesh))(jax.random.key(0))
        batch = jax.device_put(batch_of(trainable), batch_sharding(mesh))

        @jax.jit
        def run(model, batch):
            def one(name):
                loss = lambda m: losses_of(trainable, m, batch, jax.random.key(1), jax.numpy.int32(5))[name]
                return jax.value_and_grad(with_aux(loss), has_aux=True, allow_int=True)(model)

            return [one(name) for name in trainable.objectives()]

        return jax.device_get(run(model, batch))


TRAINABLES = {
    "ar": MODEL,
    "encoder-decoder": dataclasses.replace(MODEL, conditioning="cross_attention"),
    "vq-diffusion": DISCRETE,
    "masked": MASKED,
    "flow": FLOW,
    "unet": UNET,
    "unet of transformers": LATENT_UNET,
    "any-order": ANY_ORDER,
    "vqgan": CODEC,
    "kl": LATENT,
    "dvae": RELAXED,
}
MESHES = ((8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2))
QUICK = {("ar", (1, 8, 1)), *((name, (2, 2, 2)) for name in ("ar", "vq-diffusion", "masked"))}
CASES = [
    pytest.param(name, mesh, marks=() if (name, mesh) in QUICK else pytest.mark.slow, id=f"{name}-{mesh}")
    for name in TRAINABLES
    for mesh in MESHES
]


@functools.cache
def alone(name):
    return outcome(TRAINABLES[name], (1, 1, 1))


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_loss_and_gradients_agree(name, mesh):
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
    jax.tree.map(close, outcome(TRAINABLES[name], mesh), alone(name))
