"""Samplers on meshes that split weights over `fsdp`: no device ever holds a whole matrix, and the codes stay."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from t2i_jax.core.family import with_fields
from t2i_jax.core.sharding import MeshConfig, batch_sharding, shardings
from t2i_jax.heads import FlowHead, SoftmaxHead
from t2i_jax.models.any_order import AnyOrder
from t2i_jax.models.ar import AR
from t2i_jax.models.masked import Masked
from t2i_jax.models.stream import Stream, StreamText
from t2i_jax.networks.condition import CaptionEncoder, ClassEmbedder
from t2i_jax.nn.decode import int8_weights
from t2i_jax.nn.positions import LearnedPositions
from t2i_jax.nn.stationary import weight_stationary
from t2i_jax.plan.hlo_text import parse
from t2i_jax.sampling.orders import Permutation
from t2i_jax.training.trainer import with_shardings

ROWS = 16
CAPTIONS = CaptionEncoder(208, 5, width=72, depth=2, heads=4)
SHAPE = dict(width=320, depth=2, heads=8, mlp=896)
FAMILIES = {
    "ar": with_fields(AR(), vocabulary=608, grid=(2, 3), **SHAPE, kv_heads=4, condition=ClassEmbedder(8)),
    "ar tied": with_fields(
        AR(),
        vocabulary=608,
        grid=(2, 3),
        **SHAPE,
        positions=LearnedPositions(),
        tied=True,
        bias=True,
        output_bias=True,
    ),
    "encoder-decoder": with_fields(
        AR(), vocabulary=608, grid=(2, 3), **SHAPE, via="cross_attention", condition=CAPTIONS
    ),
    "stream": with_fields(Stream(), vocabulary=608, grid=(2, 3), condition=StreamText(208, 5), **SHAPE),
    "any-order": with_fields(
        AnyOrder(), grid=(2, 3), head=SoftmaxHead(608), order=Permutation(), **SHAPE, condition=CAPTIONS
    ),
    "any-order flow": with_fields(
        AnyOrder(), grid=(2, 3), head=FlowHead(16, 96, 2, 2), order=Permutation(), **SHAPE, condition=CAPTIONS
    ),
}
SHORT = ("ar", "any-order")


def inputs(family, rows):
    """A condition and keys, on the host."""
    rng = np.random.default_rng(0)
    spec = {k: f for k, f in family.condition_spec().items() if not f.optional}
    draw = lambda f: rng.random((rows, *f.shape)) < 0.7 if f.dtype == "bool" else rng.integers(0, 8, (rows, *f.shape))
    condition = {k: draw(f).astype(f.dtype) for k, f in spec.items()}
    return condition, jax.random.split(jax.random.key(3), rows)


def sampler(family, **options):
    """The family's sampler with its own options."""
    return jax.jit(lambda model, condition, keys: family.sample(model, condition, keys, family.options(), **options))


def compiled(family, mesh, rows=ROWS, int8=False, **options):
    """The sampler's program for a model that is placed on the mesh as in training."""
    init = lambda key: int8_weights(family.init(key)) if int8 else family.init(key)
    model = jax.eval_shape(init, jax.random.key(0))
    given = jax.eval_shape(lambda: inputs(family, rows)[1]), inputs(family, rows)[0]
    layout = batch_sharding(mesh) if rows % mesh.size == 0 else None  # as previews give them
    keys, condition = with_shardings(given, jax.tree.map(lambda _: layout, given))
    with jax.set_mesh(mesh):
        return (
            sampler(family, **options).lower(with_shardings(model, shardings(model, mesh)), condition, keys).compile()
        )


def matrices(family, mesh):
    """Sizes (d, f), in rising order, of the matrices that the mesh splits, all that are not small; and bytes of a share
    of all weights."""
    model = jax.eval_shape(family.init, jax.random.key(0))
    model = with_shardings(model, shardings(model, mesh))
    found, share = set(), 0
    for v in jax.tree.leaves(model, is_leaf=lambda v: isinstance(v, nnx.Variable)):
        part = v.get_value().sharding.shard_shape(v.shape)
        share += math.prod(part) * np.dtype(family.compute.dtype).itemsize
        if len(v.shape) > 1 and part[-2:] != v.shape[-2:] and min(v.shape[-2:]) > 16:  # else it is a row per place
            found.add(tuple(sorted(v.shape[-2:])))
    return found, share


def whole(text, sizes):
    """Instructions of a program that give an array with both sides of one of these matrices."""
    computations, _ = parse(text)
    for computation in computations.values():
        for i in computation.values():
            for _, shape, _ in i.arrays:
                if tuple(sorted(n for n in shape if n > 1))[-2:] in sizes:
                    yield f"{i.op} {i.type[:100]}"


def activations(family, rows=ROWS):
    """Bytes of what one layer makes of all rows at most: of the branches that guidance draws, and the whole prefix."""
    tokens = 2 * rows * family.conditioning.what.length
    inner = family.transformer.mlp_dim * (2 if family.transformer.activation == "swiglu" else 1)
    return tokens * (inner + 4 * family.transformer.width) * np.dtype(family.compute.dtype).itemsize


def cache(family, mesh, rows=ROWS):
    """Bytes of keys and values of a share of the rows."""
    b = 2 * rows // (mesh.shape["data"] * mesh.shape["fsdp"])
    heads = max(family.transformer.num_kv_heads // mesh.shape["tensor"], 1)
    places = family.conditioning.what.length + family.length
    return (
        2
        * family.transformer.depth
        * b
        * heads
        * places
        * family.transformer.head_size
        * np.dtype(family.compute.dtype).itemsize
    )


CASES = [
    pytest.param(name, mesh, marks=() if mesh[1] == 8 and name in SHORT else pytest.mark.slow, id=f"{name}-{mesh}")
    for name in FAMILIES
    for mesh in ((1, 8, 1), (2, 2, 2))
]


@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_no_device_holds_a_whole_matrix_and_the_codes_are_those_of_one_device(name, sizes):
    family, mesh = FAMILIES[name], MeshConfig(*sizes).build()
    options = {} if isinstance(family, AnyOrder) else {"segments": 1}
    program = compiled(family, mesh, **options)
    split, share = matrices(family, mesh)
    assert len(split) > 3 and not set(whole(program.as_text(), split))
    assert program.memory_analysis().temp_size_in_bytes < 1.5 * share + cache(family, mesh) + activations(family)

    condition, keys = inputs(family, ROWS)
    model = jax.jit(family.init)(jax.random.key(0))
    alone = sampler(family, **options)(model, condition, keys)
    with jax.set_mesh(mesh):
        placed = jax.device_put((model, condition, keys), program.input_shardings[0])
        found = program(*placed)
    np.testing.assert_allclose(found, alone, atol=2e-3)


@pytest.mark.parametrize("rows", [pytest.param(16, marks=pytest.mark.slow), 6])
def test_temporaries_of_a_large_model_are_one_copy_of_its_share(rows):
    family = with_fields(FAMILIES["ar"], width=2048, mlp=8192, heads=16, kv_heads=16, vocabulary=12288)
    mesh = MeshConfig(1, 8, 1).build()
    program = compiled(family, mesh, rows, segments=1)
    split, share = matrices(family, mesh)
    assert share >= 2**26 and not set(whole(program.as_text(), split))
    more = 8 if rows == 6 else 1  # of rows that are not split, each device keeps all keys and values
    least = cache(family, mesh, rows) * more + activations(family, rows)
    assert program.memory_analysis().temp_size_in_bytes - least < 1.5 * share


@pytest.mark.slow
def test_a_model_that_reads_all_tokens_gathers_a_layer_at_a_time():
    family = with_fields(
        Masked(),
        grid=(3, 3),
        head=SoftmaxHead(1536),
        width=1024,
        depth=8,
        heads=8,
        condition=ClassEmbedder(8),
        size_buckets=2,
        buffer=3,
    )
    mesh = MeshConfig(1, 8, 1).build()
    share = matrices(family, mesh)[1]
    assert share >= 2**26 and compiled(family, mesh).memory_analysis().temp_size_in_bytes < share


def test_weights_of_one_device_are_left_as_they_are():
    model = jax.eval_shape(FAMILIES["ar"].init, jax.random.key(0))
    assert weight_stationary(model) is model
    with jax.set_mesh(MeshConfig(8).build()):
        assert weight_stationary(model) is model
