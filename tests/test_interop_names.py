"""Tables of names between published files and our models, in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.interop.names import CONV, LINEAR, POINTWISE, source, to_ours, to_theirs
from t2i_jax.nn.layers import Conv, Linear


class Small:
    """Linears of two layers, a convolution and a 1x1 convolution that is a matrix with us."""

    def __new__(cls, key):
        layers = jax.vmap(lambda k: Linear(3, 4, k))(jax.random.split(key, 2))
        return {"layers": layers, "conv": Conv(2, 5, key), "point": Linear(6, 7, key, bias=False)}


TABLE = {
    "layers.w": source("l.{}.a.weight", "l.{}.b.weight", layout="p f d -> d (p f)"),
    "layers.b": source("l.{}.bias"),
    "conv.w": source("conv.weight", layout=CONV),
    "conv.b": source("conv.bias"),
    "point.w": source("point.weight", layout=POINTWISE),
}
SHAPES = {f"l.{n}.{p}.weight": (2, 3) for n in (0, 1) for p in "ab"} | {
    "l.0.bias": (4,),
    "l.1.bias": (4,),
    "conv.weight": (5, 2, 3, 3),
    "conv.bias": (5,),
    "point.weight": (7, 6, 1, 1),
}


def filled(shapes):
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}


def test_layouts_invert_and_take_our_dtypes():
    tensors, abstract = filled(SHAPES), jax.eval_shape(Small, jax.random.key(0))
    model = to_ours(abstract, tensors, TABLE)
    assert model["layers"].w[...].dtype == jnp.float32
    np.testing.assert_array_equal(model["layers"].w[...][1][:, :2], tensors["l.1.a.weight"].T)
    np.testing.assert_array_equal(model["conv"].w[...], tensors["conv.weight"].transpose(2, 3, 1, 0))
    back = to_theirs(model, TABLE)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value)


def test_names_and_shapes_are_checked_without_memory():
    huge = {"w": source("weight", layout=LINEAR), "b": source("bias")}
    abstract = jax.eval_shape(lambda key: Linear(10**6, 10**6, key), jax.random.key(0))
    tensors = {
        "weight": jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32),
        "bias": jax.ShapeDtypeStruct((10**6,), "f4"),
    }
    assert jax.eval_shape(lambda t: to_ours(abstract, t, huge), tensors).w.shape == (10**6, 10**6)


def test_one_error_lists_every_misfit():
    shapes = SHAPES | {"l.1.bias": (9,), "l.2.bias": (4,), "extra": (1,), "conv.weight": (5, 2, 3), "ignored.x": ()}
    del shapes["l.0.b.weight"], shapes["point.weight"]
    table = TABLE | {"gone.w": source("gone")}
    del table["conv.b"]
    with pytest.raises(ValueError) as error:
        abstract = jax.eval_shape(Small, jax.random.key(0))
        to_ours(abstract, filled(shapes), table, ignore=r"^ignored", file="a.pt")
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert lines[0] == "a.pt does not fit this model:"
    assert sorted(lines[1:]) == [
        "conv.b: the table has no line for it",
        "conv.bias: unused",
        "conv.weight: [(5, 2, 3)] does not make conv.w (3, 3, 2, 5)",
        "extra: unused",
        "gone.w: a line of the table, but nothing in the model",
        "l.0.b.weight: missing",
        "l.1.bias: [(9,)] does not make layers.b (4,)",
        "l.2.bias: unused",
        "point.weight: missing",
    ]
