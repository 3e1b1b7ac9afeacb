"""What holds of every condition: it gives what its `spec` and `length` say, and any such goes into every family."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t2i_jax import heads
from t2i_jax.core.conditions import ConditionSpec
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.specs import FieldSpec
from t2i_jax.models.any_order import AnyOrder
from t2i_jax.models.ar import AR
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.models.masked import Masked
from t2i_jax.models.var import VAR
from t2i_jax.models.vq_diffusion import VQDiffusion
from t2i_jax.networks.condition import (
    ClassEmbedder,
    CrossAttnFeatures,
    PooledAndTokenFeatures,
    PooledFeatures,
    PrefixTokens,
    SentenceAndWords,
    TextFeatures,
)
from t2i_jax.networks.dit import DiT
from t2i_jax.networks.glide_captions import GlideCaptions
from t2i_jax.networks.imagen import AttentionPooledFeatures
from t2i_jax.networks.unclip import CaptionAndTokens, ImageAndCaption, NoisedImageAndTokens
from t2i_jax.networks.unet import UNet
from t2i_jax.nn.layers import Linear
from t2i_jax.noise.discrete import Chain
from t2i_jax.noise.processes import Discrete
from t2i_jax.sampling.orders import Permutation
from tests.fixtures.families import CAPTIONS, DENOISER, SCALES, SMALL, UNET, batch_for

WIDTH = 16


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A condition of a user, which has only what the Protocol says: two numbers of an image, a token each."""

    length = 2
    spec = ConditionSpec()

    def batch_spec(self):
        return {"sizes": FieldSpec((2,), "float32")}

    def token_width(self, width):
        return width

    def init(self, key, width):
        return SizeTokens(key, width)


class SizeTokens(nnx.Module):
    def __init__(self, key, width):
        self.out = Linear(1, width, key, axes=(None, "embed"))

    def __call__(self, batch, drop, dtype):
        tokens = self.out(jnp.where(drop[:, None], 0, batch["sizes"])[..., None]).astype(dtype)
        return tokens, jnp.ones(tokens.shape[:2], bool)


CONDITIONS = {
    "classes": ClassEmbedder(3),
    "classes without null": ClassEmbedder(3, null=False),
    "unconditional": ClassEmbedder(0),
    "captions": CAPTIONS,
    "features": TextFeatures(5, 6),
    "features to the right": TextFeatures(5, 6, left=True, null_keeps_mask=True, trained_null=False),
    "vector": PooledFeatures(5),
    "encoded": CrossAttnFeatures(5, 6),
    "encoded, null kept": CrossAttnFeatures(5, 6, trained_null=False, kept_null=True),
    "encoded, null of the batch": CrossAttnFeatures(5, 6, trained_null=False),
    "sentence and words": SentenceAndWords(5, 6),
    "paired": PooledAndTokenFeatures(CrossAttnFeatures(5, 6), 4),
    "paired, null of the batch": PooledAndTokenFeatures(CrossAttnFeatures(5, 6, trained_null=False), 4),
    "a caption for a prior": CaptionAndTokens(CrossAttnFeatures(5, 6)),
    "an image and a caption": ImageAndCaption(CrossAttnFeatures(5, 6), summary=12),
    "an image and a caption, null of the batch": ImageAndCaption(CrossAttnFeatures(5, 6, trained_null=False)),
    "a noised image and tokens": NoisedImageAndTokens(CrossAttnFeatures(5, 6), 4, 12, Discrete("cosine", 20)),
    "pooled by attention": AttentionPooledFeatures(CrossAttnFeatures(6, 5), 2, 12),
    "pooled by attention, as they are": AttentionPooledFeatures(
        CrossAttnFeatures(6, 5, trained_null=False), 3, 12, projected=False
    ),
    "padded captions": GlideCaptions(20, 6, 16, 1, 2),
    "padding read as it is": GlideCaptions(20, 6, 16, 1, 2, padding=False),
    "a start token": PrefixTokens(1),
    "a prefix": PrefixTokens(3),
    "a user's": Sizes(),
}


def batch_of(condition, b=4):
    """A random batch of all that a condition reads; ids of the image's own vocabulary are below 9."""
    spec = {k: dataclasses.replace(f, optional=False, high=f.high or 9) for k, f in condition.batch_spec().items()}
    return batch_for(dataclasses.make_dataclass("Reads", [], namespace={"batch_spec": lambda _: spec})(), b)


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_gives_what_it_declares(name):
    condition = CONDITIONS[name]
    spec, batch, model = condition.spec, batch_of(condition), condition.init(jax.random.key(0), WIDTH)
    none, two = jnp.zeros(4, bool), jnp.asarray([False, True, False, True])
    tokens, mask = model(batch, none, jnp.float32)
    width = () if spec.gives_ids else (condition.token_width(WIDTH),)
    assert tokens.shape == (4, condition.length, *width) and mask.shape == (4, condition.length)
    assert jnp.issubdtype(tokens.dtype, jnp.integer if spec.gives_ids else jnp.float32) and mask.dtype == bool
    assert bool(mask.all()) != spec.has_padding
    assert spec.classes == (condition.count if isinstance(condition, ClassEmbedder) else None)
    if not spec.gives_ids:
        assert model(batch, none, jnp.bfloat16)[0].dtype == jnp.bfloat16

    dropped = model(batch, two, jnp.float32)[0]
    np.testing.assert_array_equal(dropped[0], tokens[0])
    if getattr(condition, "null", True):
        np.testing.assert_array_equal(
            dropped[1], dropped[3] if spec.has_null else model(batch, ~none, jnp.float32)[0][1]
        )
    alone = {k: v for k, v in batch.items() if k != "null_features"}
    assert ("null_features" in batch) != spec.has_null
    found = model(alone, two, jnp.float32)[0]
    assert np.array_equal(found, dropped) == spec.has_null
    if spec.gives_summary:
        assert model.whole(batch, two).shape == (4, spec.summary_width or condition.token_width(WIDTH))


FAMILIES = {
    "ar": lambda c: with_fields(AR(), vocabulary=16, **SMALL, condition=c),
    "ar by cross-attention": lambda c: with_fields(AR(), vocabulary=16, **SMALL, condition=c, via="cross_attention"),
    "masked": lambda c: with_fields(Masked(), **SMALL, head=heads.SoftmaxHead(16), condition=c, buffer=4),
    "any-order": lambda c: with_fields(
        AnyOrder(), **SMALL, head=heads.SoftmaxHead(16), order=Permutation(), condition=c
    ),
    "vq-diffusion": lambda c: with_fields(VQDiffusion(), chain=Chain(16, 10), **SMALL, condition=c),
    "unet": lambda c: Diffusion(with_fields(UNet(), **UNET, channels=3, context=WIDTH, condition=c)),
    "dit": lambda c: Diffusion(with_fields(DiT(), size=(4, 4), channels=3, **DENOISER, condition=c)),
    "var": lambda c: with_fields(
        VAR(), quantizer=SCALES, width=WIDTH, depth=1, heads=2, condition=c, via="cross_attention"
    ),
}


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_condition_goes_into_any_family_or_is_refused(family, name):
    """Shapes of the loss and of the sampler alone; what is refused is refused where the config is made."""
    try:
        config = FAMILIES[family](CONDITIONS[name])
    except ConfigError as error:
        assert "condition" in str(error)
        return
    except ValueError as error:
        assert "unconditional" in str(error) or "context" in str(error)
        return
    spec = batch_for(config, 2) | batch_of(CONDITIONS[name], 2)
    key = jax.random.key(0)
    jax.eval_shape(
        lambda m, b: config.objectives()["model"].loss(m, b, key, jnp.zeros((), int), True),
        model := jax.eval_shape(config.init, key),
        spec,
    )
    condition = {k: v for k, v in spec.items() if k in config.condition_spec()}
    sample = lambda m, c: config.sample(m, c, jax.random.split(key, 2), config.options())
    assert jax.eval_shape(sample, model, condition).shape == (2, *config.sample_spec().shape)


@pytest.mark.parametrize("family", ["masked", "any-order"])
def test_ids_and_vectors_of_another_width_are_refused_where_none_can_be_read(family):
    for condition in (PrefixTokens(1), CrossAttnFeatures(5, 6)):
        with pytest.raises(ConfigError, match="condition"):
            FAMILIES[family](condition)
