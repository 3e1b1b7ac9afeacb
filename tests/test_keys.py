"""Random keys: all bits of a seed count, and no two draws of a step are the same numbers."""

import jax
import numpy as np
import pytest

from t2i_jax.core.keys import apart, seed_key
from t2i_jax.training.step import step_keys

data = lambda key: np.asarray(jax.random.key_data(key)).tobytes()


def test_all_bits_of_a_seed_count():
    seeds = [0, 1, 5, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**40 + 5, 2**63 - 1, 2**64 - 1]
    assert len({data(seed_key(s)) for s in seeds}) == len(seeds)
    assert len({data(step_keys(s, 3)[0]) for s in seeds}) == len(seeds)
    assert data(seed_key(7)) == data(jax.random.key(7))


@pytest.mark.parametrize("step", [0, 1, 2, 1000])
def test_what_prepare_draws_is_nothing_that_a_loss_draws(step):
    """Losses split the key of a step; what they draw from the parts has the shape of latents too."""
    key, draw = step_keys(3, step)
    assert data(draw) == data(apart(key))
    parts = [part for n in range(1, 17) for part in jax.random.split(key, n)]
    parts += [jax.random.fold_in(key, i) for i in range(100)] + [key]
    assert data(draw) not in set(map(data, parts))
    noise = jax.random.normal(draw, (4096,))
    for part in jax.random.split(key, 5):
        assert abs(np.corrcoef(noise, jax.random.normal(part, (4096,)))[0, 1]) < 0.1
