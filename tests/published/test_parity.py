"""Every published system whose outputs are at hand: weights through the converter, each array compared.

One a system that is kept in the project is quick; larger ones, where they lie beside it, and other configurations of
the same systems belong to the long tests.
"""

import numpy as np
import pytest

from tests.published.parity import FOLDERS, InDouble, Oracle, check, compare, systems

SMALL, LARGE = ({f.parent.name: f.parent for f in sorted(room.glob("*/meta.json"))} for room in FOLDERS)


CASES = [
    pytest.param(name, marks=() if name in SMALL.keys() & systems().keys() else pytest.mark.slow)
    for name in sorted(systems().keys() | SMALL.keys())
]


@pytest.mark.parametrize("name", CASES)
def test_every_published_array(name):
    if name not in SMALL | LARGE:
        pytest.skip(f"no folder {name}")
    lines = list(check(Oracle((LARGE | SMALL)[name])))
    assert lines and all(line.passed for line in lines), "\n" + "\n".join(map(str, lines))


def test_limits_are_those_of_fp32_where_fp32_is_less_exact():
    exact, noise = np.random.default_rng(0).normal(size=(2, 1000))
    noise = noise / np.linalg.norm(noise) * np.linalg.norm(exact)
    off = lambda x: (exact + x * noise).astype(np.float32)
    assert np.isclose(InDouble(exact, exact + 5e-5 * noise).noise, 5e-5)
    for error, single, passes in ((5e-5, 0, True), (3e-4, 0, False), (3e-4, 1e-5, False), (3e-4, 5e-5, True)):
        assert compare("x", exact, off(error), noise=single).passed == passes
    assert not compare("x", exact, off(2e-3), noise=1e-2).passed
    assert not compare("x", exact, off(0) + 0.05 * (np.arange(1000) == 7).astype(np.float32), noise=1e-4).passed
