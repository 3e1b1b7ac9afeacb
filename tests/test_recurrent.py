"""Bidirectional LSTM and GRU over padded rows against a loop over the words of each, in PyTorch's order of gates."""

import jax
import numpy as np
import pytest

from t2i_jax.nn.recurrent import Bidirectional

LENGTHS = (3, 6, 0, 1)
sigmoid = lambda x: 1 / (1 + np.exp(-x))


def by_loop(cell, x, w, u, b, v):
    """Outputs (n, h) of one direction over n words; w, u and the biases b, v of all gates."""
    h = c = np.zeros(len(u))
    found = []
    for word in x:
        left, right = word @ w + b, h @ u + v
        if cell == "lstm":
            i, f, g, o = np.split(left + right, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            (r, z, n), (r2, z2, n2) = np.split(left, 3), np.split(right, 3)
            n, z = np.tanh(n + sigmoid(r + r2) * n2), sigmoid(z + z2)
            h = (1 - z) * n + z * h
        found.append(h)
    return np.array(found)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_rows_of_any_length_and_order_are_read_from_their_ends(cell):
    model = Bidirectional(5, 4, jax.random.key(0), cell)
    keys = iter(jax.random.split(jax.random.key(1), 4))
    model = jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape), model)  # biases too
    inner, again = model.directions.inner, model.directions.again
    weights = [np.asarray(p[...], np.float64) for p in (inner.w, again.w, inner.b, again.b)]
    x = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
    words, last = jax.jit(lambda m, x, mask: m(x, mask))(model, x, np.arange(6) < np.array(LENGTHS)[:, None])
    for row, n in enumerate(LENGTHS):
        assert not words[row, n:].any()
        if not n:
            assert not last[row].any()
            continue
        forward = by_loop(cell, x[row, :n], *(p[0] for p in weights))
        backward = by_loop(cell, x[row, :n][::-1], *(p[1] for p in weights))[::-1]
        np.testing.assert_allclose(words[row, :n], np.concatenate([forward, backward], 1), atol=1e-5)
        np.testing.assert_allclose(last[row], np.concatenate([forward[-1], backward[0]]), atol=1e-5)
