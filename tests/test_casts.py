"""Weights are cast where they are loaded exactly where the sampler would cast them before it computes with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.core.casts import cast_dtypes, cast_first
from t2i_jax.core.family import with_fields
from t2i_jax.core.params import named, rebuild
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import ClassEmbedder
from tests.fixtures import families


def program(a, b, c, d, e, f, x):
    narrow = lambda w: w.astype(jnp.bfloat16)
    y, _ = jax.lax.scan(lambda y, w: (jnp.tanh(y @ narrow(w.T)), None), x, a)  # a: a layer at a time
    y = y @ narrow(b.reshape(4, 4)[:, ::-1]) + narrow(c + 1) + narrow(d)  # c: computed with; d: cast and computed with
    return y + jax.jit(lambda e: e[1])(e).astype(jnp.bfloat16) + jnp.sum(d) + narrow(f).astype(jnp.float32).sum()


def test_what_is_cast_before_all_else_is_found_through_loops_calls_and_moves():
    shapes = [(3, 4, 4), (16,), (4,), (4,), (2, 4), (4,)]
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes] + [jax.ShapeDtypeStruct((2, 4), jnp.bfloat16)]
    jaxpr = jax.make_jaxpr(program)(*arguments).jaxpr
    assert cast_first(jaxpr, jnp.bfloat16) == [True, True, False, False, True, True, False]
    assert not any(cast_first(jaxpr, jnp.float16))


@pytest.mark.parametrize("name", ["stream", pytest.param("ar-captions", marks=pytest.mark.slow)])
def test_codes_of_narrow_weights_are_those_of_the_wide(name):
    """Stream adds tables to each other before it casts them: these stay."""
    family = with_fields(families.FAMILIES[name], dtype="bfloat16")
    model = jax.jit(family.init)(jax.random.key(0))
    dtypes = cast_dtypes(family)
    assert "blocks.mlp.out.w" in dtypes and "image_tokens.w" not in dtypes
    cast = rebuild(model, {k: v.replace(v[...].astype(dtypes.get(k, v[...].dtype))) for k, v in named(model).items()})
    batch = {k: np.ones((4, *f.shape), f.dtype) for k, f in family.condition_spec().items()}
    draw = jax.jit(lambda m: family.sample(m, batch, jax.random.split(jax.random.key(1), 4), family.options()))
    np.testing.assert_array_equal(draw(cast), draw(model))


def test_nothing_is_cast_for_a_family_that_computes_in_fp32():
    assert not cast_dtypes(families.FAMILIES["ar"])
    wide, deep = (
        cast_dtypes(
            with_fields(
                AR(),
                vocabulary=16,
                grid=(2, 2),
                width=16,
                depth=1,
                heads=2,
                condition=ClassEmbedder(3),
                dtype="bfloat16",
            )
        ),
        families.FAMILIES["dit"],
    )
    assert "blocks.mlp.into.w" in wide and "tokens.w" in wide
    assert not any(name.startswith("network.time") for name in cast_dtypes(with_fields(deep, dtype="bfloat16")))
