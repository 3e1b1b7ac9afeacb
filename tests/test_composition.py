"""One Transformer config for every family: each trains and samples with each kind of block and position it has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.heads import SoftmaxHead
from t2i_jax.models.any_order import AnyOrder
from t2i_jax.models.ar import AR
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.models.masked import Masked
from t2i_jax.models.stream import Stream, StreamText
from t2i_jax.models.vq_diffusion import VQDiffusion
from t2i_jax.networks.condition import ClassEmbedder, Conditioning
from t2i_jax.networks.dit import DiT
from t2i_jax.networks.unet import UNet
from t2i_jax.nn.positions import RotaryPositions
from t2i_jax.nn.transformer import Transformer
from t2i_jax.noise.discrete import Chain
from t2i_jax.presets import PRESETS, preset
from tests.fixtures.families import batch_for, with_aux

LLAMA = Transformer(16, 2, 4, kv_heads=2, qk_norm=True)
"""RMSNorm, SwiGLU, grouped queries and normalised queries and keys."""
CLASSES = Conditioning(ClassEmbedder(3))
TURNED = RotaryPositions()
FAMILIES = {
    "ar": AR(16, (2, 2), LLAMA, CLASSES),
    "stream": Stream(16, (2, 2), StreamText(20, 6), LLAMA),
    "masked": Masked((2, 2), head=SoftmaxHead(16), transformer=LLAMA, positions=TURNED, conditioning=CLASSES, buffer=2),
    "masked-decoder": Masked(
        (2, 2), head=SoftmaxHead(16), transformer=LLAMA, decoder=Transformer(8, 1, 2), conditioning=CLASSES, buffer=2
    ),
    "any-order": AnyOrder((2, 2), head=SoftmaxHead(16), transformer=LLAMA, conditioning=CLASSES),
    "vq-diffusion": VQDiffusion(Chain(16, 10), (2, 2), LLAMA, conditioning=CLASSES, positions=TURNED),
    "dit": Diffusion(DiT((4, 4), 3, 2, LLAMA, conditioning=CLASSES, positions=TURNED)),
}


def shaken(config):
    """A model whose parameters are all in use: fresh ones have matrices of zeros."""
    shapes = jax.eval_shape(config.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), shapes)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_takes_the_whole_transformer(name):
    config = FAMILIES[name]
    batch, model = batch_for(config, 2), shaken(config)
    run = jax.jit(jax.value_and_grad(with_aux(config.loss), has_aux=True, allow_int=True))
    (loss, _), slopes = run(model, batch, jax.random.key(0))
    norms = [jnp.linalg.norm(x) for x in jax.tree.leaves(slopes.blocks if "masked" not in name else slopes.decoder)]
    assert np.isfinite(loss) and all(np.isfinite(n) for n in norms) and sum(n > 0 for n in norms) > len(norms) // 2
    condition = {k: v for k, v in batch.items() if k in config.condition_spec()}
    images = config.sample(model, condition, jax.random.split(jax.random.key(1), 2), config.options())
    assert images.shape == (2, *config.sample_spec().shape)


def test_rotary_positions_are_those_of_the_tokens_that_the_encoder_reads():
    """The encoder reads the visible tokens alone: what it gives does not depend on how many places it has for them."""
    config = FAMILIES["masked"]
    batch, model = jax.tree.map(jnp.asarray, batch_for(config, 2)), shaken(config)
    hidden = jnp.array([[True, False, True, False], [False, True, True, False]])
    z = [model(batch, hidden, visible=n) for n in (2, 3, 4)]
    np.testing.assert_allclose(z[1], z[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(z[2], z[0], rtol=1e-4, atol=1e-5)
    moved = model(batch, hidden[:, ::-1], visible=2)
    assert np.abs(moved[:, ::-1] - z[0]).max() > 1e-3


@pytest.mark.parametrize("name", ["vq-diffusion", "dit"])
def test_rotary_positions_tell_places_apart(name):
    """Nothing else in these networks does: the same input at several places has another output at each."""
    config = FAMILIES[name]
    model = shaken(config)
    if name == "dit":
        context = model.read({"label": jnp.zeros(1, jnp.int32)}, jnp.zeros(1, bool))
        flat = model(jnp.zeros((1, 4, 4, 3)).at[0, 0, 0].set(1), jnp.ones(1), context)[0]
        alike = np.asarray([flat[2:, :2], flat[:2, 2:], flat[2:, 2:]])
    else:
        embedded = model.read({"label": jnp.zeros(1, jnp.int32)}, jnp.zeros(1, bool))
        alike = np.asarray(model.logits(model(jnp.array([[3, 5, 5, 5]]), jnp.zeros(1, jnp.int32), embedded))[0, 1:])
    assert np.abs(alike - alike[0]).max() > 1e-3


def test_fields_that_blocks_do_not_have_are_refused():
    for fields in ({"post_norm": True}, {"sandwich_norm": True}, {"layer_scale": True}, {"pb_relax": True}):
        name = next(iter(fields))
        for family in (FAMILIES["dit"], FAMILIES["vq-diffusion"]):
            with pytest.raises(ConfigError, match=rf"transformer\.{name} True: blocks of \w+ have no such part"):
                with_fields(family, **fields)
    with pytest.raises(ConfigError, match="at least one block"):
        jax.eval_shape(with_fields(FAMILIES["ar"], depth=0).init, jax.random.key(0))
    with pytest.raises(ConfigError, match="via 'joint': AR has prefix, cross_attention"):
        with_fields(FAMILIES["ar"], via="joint")
    with pytest.raises(ConfigError, match=r"compute\.remat 'branches': this model has none, full, dots"):
        with_fields(preset("dit-s"), network=UNet((8, 8), width=32), remat="branches")


def test_fields_go_where_they_belong_by_their_own_names():
    config = preset("llamagen-b", grid=(4, 4), heads=6, dtype="bfloat16", condition=ClassEmbedder(7), rotary_base=100.0)
    assert config.transformer.heads == 6 and config.transformer.depth == 12 and config.compute.dtype == "bfloat16"
    assert config.conditioning.what == ClassEmbedder(7) and config.positions.base == 100
    both = with_fields(AR(), rotary_base=50.0, positions=RotaryPositions(prefix="zero"))
    assert both.positions == RotaryPositions(50.0, "zero")
    assert with_fields(PRESETS["dit-s"], condition_dropout=0.3).network.conditioning.dropout == 0.3
    with pytest.raises(ConfigError, match="no field 'condition_dropout'"):  # of a network without a condition
        with_fields(Diffusion(UNet((8, 8), width=32, conditioning=None)), condition_dropout=0.0)
    with pytest.raises(ConfigError, match="no field 'hads'; did you mean 'heads'"):
        preset("1M", hads=3)
    with pytest.raises(ConfigError, match="preset 'llamagen-x'"):
        preset("llamagen-x")
