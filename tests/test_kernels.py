"""Attention by kernels is attention written out: what each may look at, heads in groups, lengths, gradients, meshes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.core import flops
from t2i_jax.core.family import with_fields
from t2i_jax.core.sharding import MeshConfig, shardings
from t2i_jax.core.types import Compute
from t2i_jax.heads import SoftmaxHead
from t2i_jax.models.any_order import AnyOrder
from t2i_jax.models.ar import AR
from t2i_jax.models.masked import Masked
from t2i_jax.networks.condition import CaptionEncoder, ClassEmbedder, TextFeatures
from t2i_jax.networks.dit import DiT
from t2i_jax.nn import kernels
from t2i_jax.nn.attention import Causal, Padding, attend, plain
from t2i_jax.nn.transformer import Cache, Transformer, apply_layers, scan_stack, stack, unstack

KEY = jax.random.key(0)
PADDING = jnp.arange(140)[None] >= jnp.array([[0], [5]])  # the second row begins with five tokens of padding
RULES = {
    "all": None,
    "causal": Causal(),
    "padding before": Causal(PADDING, 8),
    "both ways": Causal(None, 3, 3),
    "padding": Padding(PADDING.at[0].set(False)),  # of the first row there is nothing but padding
}


def qkv(t=140, n=4, m=2, h=16, dtype=jnp.float32):
    one = lambda i, n: jax.random.normal(jax.random.fold_in(KEY, i), (2, t, n, h)).astype(dtype)
    return one(0, n), one(1, m), one(2, m)


@pytest.fixture
def xla(monkeypatch):
    """cuDNN's way of asking, with XLA to answer."""
    monkeypatch.setattr(kernels, "cudnn", partial(kernels.cudnn, implementation="xla"))
    monkeypatch.setattr(kernels, "unfit", lambda *_: "")


@pytest.mark.parametrize("kind", ["cudnn", "splash"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_kernels_give_what_is_written_out(rule, kind, xla):
    def run(kind, q, k, v):
        """Outputs of real places and the gradients of their squares."""
        real = PADDING[..., None, None] if rule == RULES["padding before"] else True

        def loss(*x):
            y = jnp.where(real, attend(*x, rule, kind=kind), 0)
            return (y.astype(jnp.float32) ** 2).sum(), y

        gradients, y = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return y, *gradients

    run = jax.jit(run, static_argnums=0)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)):
        x = qkv(dtype=dtype)
        expected = run("plain", *(a.astype(jnp.float32) for a in x))
        for a, b in zip(expected, run(kind, *x), strict=True):
            assert b.dtype == dtype
            scale = np.abs(a).max()
            np.testing.assert_allclose(b.astype(jnp.float32) / scale, a / scale, atol=tolerance)


def test_rules_in_words_are_masks():
    mask = np.asarray(Causal(PADDING, 8).dense(140))
    assert mask.shape == (2, 1, 140, 140) and mask[0, 0].sum() == 140 * 141 // 2
    assert not mask[1, 0, 5:, :5].any() and mask[1, 0].diagonal().all()
    assert Causal(None, 3, 3).dense(5)[0, 0, 0].tolist() == [True] * 3 + [False] * 2
    q, k, v = qkv()
    np.testing.assert_array_equal(attend(q, k, v, Causal(PADDING, 8)), plain(q, k, v, Causal(PADDING, 8).dense(140)))


@pytest.mark.slow
def test_splash_works_on_a_mesh_within_a_stack():
    config = Transformer(32, 2, 4, kv_heads=2)
    blocks, x = jax.jit(lambda key: stack(config, key, "splash"))(KEY), jax.random.normal(KEY, (4, 128, 32))
    loss = lambda b, x, rule: (scan_stack(b, x, mask=rule, remat="full") ** 2).mean()
    run = jax.jit(jax.value_and_grad(loss))
    expected = run(with_kernel(blocks, "plain"), x, Causal())
    mesh = MeshConfig(2, 2, 2).build()
    with jax.set_mesh(mesh):
        found = run(jax.device_put(blocks, shardings(blocks, mesh)), x, Causal())
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def with_kernel(blocks, kernel):
    same = jax.tree.map(lambda x: x, blocks)
    same.attention.kernel = kernel
    return same


def test_products_inside_the_kernel_are_counted():
    shape = jax.ShapeDtypeStruct((8, 256, 4, 16), jnp.float32)
    counted = lambda kind: flops.count(lambda *x: attend(*x, Causal(), kind=kind), shape, shape, shape)
    with jax.set_mesh(MeshConfig(2, 2, 2).build()):
        assert counted("splash") == pytest.approx(counted("plain"))


def test_steps_with_a_cache_are_written_out_whatever_the_kernel():
    config = Transformer(32, 1, 4)
    blocks = unstack(jax.jit(lambda key: stack(config, key, "splash"))(KEY))
    step = lambda x: apply_layers(blocks, x, (Cache.empty(config, 1, 8),), mask=jnp.ones((1, 1, 1, 8), bool))[0]
    assert "pallas" not in str(jax.make_jaxpr(step)(jnp.ones((1, 1, 32))))


@pytest.mark.parametrize(
    "kind, shapes, message",
    [
        ("flash", {}, "'flash': it is one of auto, plain, cudnn, splash"),
        ("cudnn", {}, "cuDNN computes in bfloat16 and float16, not in float32"),
        ("cudnn", {"dtype": jnp.bfloat16, "h": 12}, "multiples of 8, not of 12"),
        ("splash", {"m": 3}, "4 query heads cannot be shared by 3"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused(kind, shapes, message):
    with pytest.raises(ValueError, match=message):
        attend(*qkv(**shapes), kind=kind)


@pytest.mark.parametrize("platform, kernel", [("tpu", kernels.splash), ("gpu", kernels.cudnn), ("cpu", None)])
def test_the_platform_chooses(platform, kernel, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "platform", lambda: platform)
    whole, short = (jax.ShapeDtypeStruct((2, t, 4, 64), jnp.bfloat16) for t in (256, 77))
    chosen = kernels.choose("auto", whole, whole)
    assert getattr(chosen, "func", chosen) is kernel
    assert kernels.choose("auto", short, short) is None
    wide = jax.ShapeDtypeStruct((2, 256, 4, 256), jnp.float32)
    if platform == "gpu":
        kernels._tell.cache_clear()
        assert kernels.choose("auto", wide, wide) is None and "written out in place of cudnn" in caplog.text


NARROW = dict(head=SoftmaxHead(13), width=16, depth=1, heads=2, attention="splash")


def test_a_mesh_of_other_devices_chooses():
    assert kernels.platform() == "cpu"
    with jax.set_mesh(MeshConfig(8).build()):
        assert jax.jit(lambda x: x + (kernels.platform() == "cpu"))(0) == 1


@pytest.mark.parametrize(
    "family",
    [
        with_fields(Masked(), grid=(16, 16), condition=ClassEmbedder(5), **NARROW),
        with_fields(AnyOrder(), grid=(8, 16), condition=ClassEmbedder(5), **NARROW),
        with_fields(AnyOrder(), grid=(8, 16), condition=TextFeatures(3, 6), **NARROW),
    ],
)
def test_masked_and_any_order_models_learn_the_same_by_a_kernel(family):
    family = with_fields(family, dropout=0.0)
    batch = {"codes": jax.random.randint(KEY, (2, *family.grid), 0, 13), "label": jnp.arange(2)}
    batch |= {"features": jax.random.normal(KEY, (2, 6, 3)), "text_mask": jnp.arange(6) < jnp.array([[2], [6]])}
    model = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(KEY, x.shape), family.init(KEY))
    run = lambda family: jax.jit(jax.value_and_grad(lambda m: family.loss(m, batch, KEY).loss))
    assert "pallas_call" in str(jax.make_jaxpr(run(family))(model))
    plain = with_fields(family, attention="plain")
    expected = run(plain)(jax.tree.unflatten(jax.tree.structure(plain.init(KEY)), jax.tree.leaves(model)))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(run(family)(model)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * float(jnp.abs(a).max()))


@pytest.mark.parametrize("text", ["context", "joint"])
def test_a_diffusion_transformer_reads_text_by_the_kernel_it_is_told(text):
    features = TextFeatures(6, 5)
    network = with_fields(
        DiT(),
        size=(16, 16),
        channels=3,
        patch=2,
        width=16,
        depth=1,
        heads=2,
        condition=features,
        via=text,
    )
    batch = {"features": jnp.ones((2, 5, 6)), "text_mask": jnp.arange(5)[None] < jnp.array([[2], [5]])}

    def paint(model):
        return model(jnp.ones((2, 16, 16, 3)), jnp.ones(2), model.read(batch, jnp.zeros(2, bool)))

    weights = lambda kind: jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), network.init(KEY, Compute(attention=kind))
    )
    assert "pallas_call" in str(jax.make_jaxpr(paint)(weights("splash")))
    np.testing.assert_allclose(paint(weights("splash")), paint(weights("plain")), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("condition", [ClassEmbedder(5), CaptionEncoder(11, length=4, width=8, depth=1, heads=2)])
def test_the_next_token_model_learns_by_the_kernel_it_is_told(condition):
    config = with_fields(
        AR(), vocabulary=13, grid=(8, 16), width=32, depth=1, heads=2, condition=condition, attention="splash"
    )
    batch = {"codes": jnp.zeros((2, 8, 16), int), "label": jnp.arange(2), "text": jnp.ones((2, 4), int)}
    batch["text_mask"] = jnp.ones((2, 4), bool)
    model = jax.eval_shape(config.init, KEY)
    program = str(jax.make_jaxpr(lambda m: config.loss(m, batch, KEY).loss)(model))
    assert "pallas_call" in program
