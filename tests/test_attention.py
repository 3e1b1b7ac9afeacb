"""Attention, rotary positions and the Transformer block, by what must hold for any weights."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.core import flops
from t2i_jax.core.family import with_fields
from t2i_jax.core.sharding import MeshConfig, shardings
from t2i_jax.nn import attention, transformer
from t2i_jax.nn.attention import causal, frequencies, rotary_2d, with_prefix
from t2i_jax.nn.transformer import REMAT, Block, Cache, Transformer, drop, unstack

KEY = jax.random.key(0)
attend, rotate = jax.jit(attention.attend), jax.jit(attention.rotate)
scan_stack = jax.jit(transformer.scan_stack, static_argnames="remat")
apply_layers = jax.jit(transformer.apply_layers)


@functools.cache
def stack(config, depth):
    return jax.jit(partial(transformer.stack, with_fields(config, depth=depth)))(KEY)


def random(shape, n=0):
    return jax.random.normal(jax.random.fold_in(KEY, n), shape)


def line(length, head_dim):
    """Angles of positions 0 .. length - 1."""
    return jnp.arange(length)[:, None] * frequencies(head_dim // 2)


def qkv(n=6, m=6, t=5, s=7):
    return random((2, t, n, 4), 1), random((2, s, m, 4), 2), random((2, s, m, 4), 3)


@pytest.mark.parametrize("shape", [(2, 1, 5, 7), (1, 6, 5, 7), (2, 6, 5, 7), (1, 1, 5, 7)])
def test_attention_is_the_softmax_average(shape):
    q, k, v = qkv()
    mask = random(shape, 4) > -0.5
    weights = np.where(mask, np.exp(np.einsum("btnh,bsnh->bnts", q, k) / 2), 0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    np.testing.assert_allclose(attend(q, k, v, mask), np.einsum("bnts,bsnh->btnh", weights, v), atol=1e-6)


@pytest.mark.parametrize("m", [1, 2, 3, 6])
@pytest.mark.parametrize("heads_of_mask", [1, 6])
def test_grouped_queries_are_repeated_keys_and_values(m, heads_of_mask):
    q, k, v = qkv(m=m)
    mask = random((2, heads_of_mask, 5, 7), 4) > -0.5
    repeated = attend(q, *(np.repeat(x, 6 // m, 2) for x in (k, v)), mask)
    np.testing.assert_allclose(attend(q, k, v, mask), repeated, atol=1e-6)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="6 query heads cannot be shared by 4"):
        attend(*qkv(m=4))


def test_a_query_that_may_look_nowhere_gives_zeros_and_finite_gradients():
    q, k, v = qkv()
    mask = jnp.ones((2, 1, 5, 7), bool).at[0, :, 2].set(False)
    out = attend(q, k, v, mask)
    assert not out[0, 2].any() and out[0, 1].any()
    gradients = jax.jit(jax.grad(lambda *x: (attend(*x, mask) ** 2).sum(), (0, 1, 2)))(q, k, v)
    assert all(jnp.isfinite(g).all() for g in gradients) and not gradients[0][0, 2].any()


def test_softmax_survives_large_logits_in_half_precision():
    q, k, v = (x.astype(jnp.bfloat16) * 100 for x in qkv())
    out = attend(q, k, v)
    assert out.dtype == jnp.bfloat16 and jnp.isfinite(out).all()


def test_rotation_multiplies_adjacent_pairs_as_complex_numbers():
    x, angles = random((2, 6, 3, 8)), rotary_2d((2, 3), 8)
    pairs = np.asarray(x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * np.asarray(angles))[:, None]
    turned = rotate(x, jnp.cos(angles), jnp.sin(angles))
    np.testing.assert_allclose(turned[..., ::2], pairs.real, atol=1e-6)
    np.testing.assert_allclose(turned[..., 1::2], pairs.imag, atol=1e-6)


def test_rotation_of_every_platform_and_its_gradient():
    angles = rotary_2d((2, 3), 8)[:, None]
    for dtype in (jnp.float32, jnp.bfloat16):
        x = random((2, 6, 3, 8)).astype(dtype)
        ways = [jax.jit(way)(x, jnp.cos(angles), jnp.sin(angles)) for way in (attention._paired, attention._swapped)]
        np.testing.assert_array_equal(*ways)
    x, table = random((2, 6, 3, 8)), (jnp.cos(angles), jnp.sin(angles))
    one, other = (lambda x, way=way: (way(x) ** 3).sum() for way in (
        lambda x: attention.rotate(x, *(a[:, 0] for a in table)), lambda x: attention._paired(x, *table)
    ))  # fmt: skip
    np.testing.assert_allclose(jax.jit(jax.grad(one))(x), jax.jit(jax.grad(other))(x), atol=1e-5)
    assert flops.count(attention.rotate, x, *(a[:, 0] for a in table)) == 0


def test_rotary_angles():
    frequency = 100.0 ** (-2 * np.arange(2) / 4)  # half of a head of 8 turns with the row, half with the column
    expected = [np.concatenate([i * frequency, j * frequency]) for i in range(2) for j in range(3)]
    np.testing.assert_allclose(rotary_2d((2, 3), 8, base=100.0), np.stack(expected), rtol=1e-6)
    np.testing.assert_allclose(line(3, 4)[2], [2, 0.02], rtol=1e-6)
    with pytest.raises(ValueError, match="head_dim 6"):
        rotary_2d((2, 2), 6)


@pytest.mark.parametrize("kind", ["line", "grid"])
def test_rotated_products_depend_on_the_distance_only(kind):
    angles = line(36, 16) if kind == "line" else rotary_2d((6, 6), 16)
    q, k = (
        rotate(jnp.broadcast_to(random((16,), n), (1, 36, 1, 16)), jnp.cos(angles), jnp.sin(angles)) for n in (1, 2)
    )
    products = jnp.einsum("btnh,bsnh->ts", q, k)
    move = 7  # one row down and one column right
    here, there = (products[a : a + 29, a : a + 29] for a in (0, move))
    column = np.arange(29) % 6
    same_move = column < 5 if kind == "grid" else column >= 0  # the last column has nothing to its right
    np.testing.assert_allclose(here[same_move][:, same_move], there[same_move][:, same_move], atol=1e-4)


def test_rotation_keeps_lengths_and_takes_positions_per_row():
    x, angles = random((2, 6, 3, 8)), jnp.stack([line(6, 8), line(6, 8) + 1])
    turned = rotate(x, jnp.cos(angles), jnp.sin(angles))
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    alone = rotate(x[1:], jnp.cos(angles[1]), jnp.sin(angles[1]))
    np.testing.assert_allclose(turned[1:], alone, atol=1e-6)


def test_prefix_rows_leave_tokens_alone_or_zero_them():
    angles = rotary_2d((2, 2), 8)
    x = random((1, 7, 2, 8))
    for zero, expected in ((False, x[:, :3]), (True, jnp.zeros_like(x[:, :3]))):
        turned = rotate(x, *with_prefix(jnp.cos(angles), jnp.sin(angles), 3, zero))
        np.testing.assert_array_equal(turned[:, :3], expected)
        np.testing.assert_array_equal(turned[:, 3:], rotate(x[:, 3:], jnp.cos(angles), jnp.sin(angles)))


LAYERS = {
    "llama": Transformer(32, 1, 4),
    "grouped": Transformer(32, 1, 4, kv_heads=2, qk_norm=True, head_dim=12),
    "gpt": Transformer(32, 1, 4, norm="layer", activation="gelu", bias=True),
    "bert": Transformer(32, 1, 4, norm="layer", activation="gelu_tanh", bias=True, post_norm=True),
}
T = 7
ROTARY = {name: (jnp.cos(a), jnp.sin(a)) for name, c in LAYERS.items() for a in [line(T, c.head_size)]}


@pytest.mark.parametrize("kind", ["grouped", "bert"])
def test_cached_steps_equal_the_whole_forward(kind):
    config, (cos, sin), x = LAYERS[kind], ROTARY[kind], random((2, T, 32))
    blocks = stack(config, 3)
    whole = scan_stack(blocks, x, rotary=(cos, sin), mask=causal(T))
    blocks = unstack(blocks)
    caches, parts = tuple(Cache.empty(config, 2, 9) for _ in blocks), []
    for start, stop in ((0, 3), (3, 4), (4, 7)):  # several tokens at once, and one
        y, caches = apply_layers(
            blocks,
            x[:, start:stop],
            caches,
            rotary=(cos[start:stop], sin[start:stop]),
            mask=causal(stop - start, 9, start),
        )
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)
    assert caches[0].at == T


def test_a_cache_grows_in_place():
    cache = Cache.empty(LAYERS["llama"], 2, 3)
    cache = cache._replace(k=cache.k + 1).grow(5)
    assert cache.k.shape == cache.v.shape == (2, 4, 5, 8)
    assert cache.k[..., :3, :].all() and not cache.k[..., 3:, :].any()


def test_nothing_sees_what_comes_later():
    blocks, x = stack(LAYERS["grouped"], 2), random((1, T, 32))
    out = lambda x: scan_stack(blocks, x, rotary=ROTARY["grouped"], mask=causal(T)).sum(-1)[0]
    influence = np.abs(jax.jit(jax.jacobian(out))(x)[:, 0]).sum(-1) > 0
    np.testing.assert_array_equal(influence, np.tril(np.ones((T, T), bool)))


@pytest.mark.parametrize("remat", [r for r in REMAT if r != "none"])
def test_rematerialisation_changes_no_gradient(remat):
    config = Transformer(32, 1, 4, dropout=0.3)
    blocks, x = stack(config, 2), random((2, T, 32))
    loss = lambda blocks, remat: (scan_stack(blocks, x, key=KEY, remat=remat) ** 2).sum()
    expected, found = (jax.tree.leaves(jax.jit(jax.grad(lambda b, r=r: loss(b, r)))(blocks)) for r in ("none", remat))
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_unknown_choices_name_the_right_ones():
    with pytest.raises(ValueError, match="'some': it is one of none, full, dots, branches"):
        scan_stack(stack(LAYERS["llama"], 1), random((1, 2, 32)), remat="some")
    with pytest.raises(ValueError, match="activation 'tanh'"):
        Transformer(32, 1, 4, activation="tanh")
    with pytest.raises(ValueError, match="width 30 cannot be split into heads 4"):
        Transformer(30, 1, 4)
    with pytest.raises(ValueError, match="heads 4 is not a multiple of kv_heads 3"):
        Transformer(32, 1, 4, kv_heads=3)


def test_dropout_keeps_the_mean_and_needs_a_key():
    x = jnp.ones((100, 100))
    dropped = drop(x, 0.25, KEY)
    assert set(np.unique(dropped).round(5)) == {0.0, np.float32(1 / 0.75).round(5)}
    assert abs(dropped.mean() - 1) < 0.02
    assert drop(x, 0.25, None) is x


def test_blocks_compute_in_the_dtype_of_their_input():
    x = random((2, T, 32)).astype(jnp.bfloat16)
    for config in LAYERS.values():
        y, _ = jax.eval_shape(lambda x, config=config: Block(config, KEY)(x), x)
        assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)])
def test_meshes_agree(sizes):
    config, x = LAYERS["grouped"], random((8, 6, 32))
    blocks = stack(config, 2)

    def run(blocks, x):
        return jax.value_and_grad(lambda b: (scan_stack(b, x, mask=causal(6)) ** 2).mean())(blocks)

    expected = jax.jit(run)(blocks, x)
    mesh = MeshConfig(*sizes).build()
    with jax.set_mesh(mesh):
        found = jax.jit(run)(jax.device_put(blocks, shardings(blocks, mesh)), x)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
