"""Every family and codec computes the same loss, gradients and carried values on every mesh as on one device."""

import functools

import jax
import numpy as np
import pytest

from t2i_jax.core.sharding import MeshConfig, batch_sharding, shardings
from tests.fixtures.families import batch_for, losses_of, with_aux
from tests.fixtures.meshes import TRAINABLES

MESHES = ((8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2))
CASES = [
    pytest.param(name, mesh, marks=() if mesh == (2, 2, 2) else pytest.mark.slow, id=f"{name}-{mesh}")
    for name in TRAINABLES
    for mesh in MESHES
]


@functools.cache
def start(name):
    """A model, and a batch, on the host."""
    return jax.device_get(jax.jit(TRAINABLES[name].init)(jax.random.key(0))), batch_for(TRAINABLES[name], 8)


def outcome(name, mesh):
    """Losses, gradients and metrics of all objectives on a mesh, on the host."""
    trainable, mesh = TRAINABLES[name], MeshConfig(*mesh).build()
    model, batch = start(name)
    with jax.set_mesh(mesh):
        model = jax.device_put(model, shardings(model, mesh))
        batch = jax.device_put(batch, batch_sharding(mesh))

        @jax.jit
        def run(model, batch):
            def one(name):
                loss = lambda m: losses_of(trainable, m, batch, jax.random.key(1), jax.numpy.int32(5))[name]
                return jax.value_and_grad(with_aux(loss), has_aux=True, allow_int=True)(model)

            return [one(name) for name in trainable.objectives()]

        return jax.device_get(run(model, batch))


@functools.cache
def alone(name):
    return outcome(name, (1, 1, 1))


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_loss_and_gradients_agree(name, mesh):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)

    jax.tree.map(close, outcome(name, mesh), alone(name))
