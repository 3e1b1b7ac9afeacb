"""Every published system whose outputs are at hand: weights through the converter, each array compared.

Folders in tests/published/oracles are compared in `make test`. Larger ones, and other configurations of the same
systems, lie in the folder that the environment variable T2I_ORACLES names; they are slow tests.
"""

from pathlib import Path

import numpy as np
import pytest

from t2i_jax.codecs.discriminator import DiscriminatorConfig, StyleDiscriminatorConfig
from tests.fixtures.families import ALL, SYSTEMS
from tests.fixtures.released import MISSING, OUTPUTS
from tests.published.parity import SMALL, InDouble, Oracle, check, compare, systems
from tests.published.table import converted


def folders(parent: Path | None) -> dict[str, Path]:
    """The folders of published outputs in a folder, by name."""
    return {file.parent.name: file.parent for file in sorted(parent.glob("*/meta.json"))} if parent else {}


KEPT, LARGE = folders(SMALL), folders(OUTPUTS)

JUDGES = (DiscriminatorConfig, StyleDiscriminatorConfig)
"""Configurations of networks that are no models."""

CASES = [
    pytest.param(name, marks=() if name in KEPT.keys() & systems().keys() else pytest.mark.slow)
    for name in sorted(systems().keys() | KEPT.keys())
]


@pytest.mark.parametrize("name", CASES)
def test_every_published_array(name):
    if name not in KEPT | LARGE:
        pytest.skip(f"no folder {name}: {MISSING if OUTPUTS is None else OUTPUTS}")
    oracle = Oracle((LARGE | KEPT)[name])
    with converted() as seen:
        lines = list(check(oracle))
    assert lines and all(line.passed for line in lines), "\n" + "\n".join(map(str, lines))
    cases = [ALL[case] for case in SYSTEMS[oracle.meta["system"]]]
    claims = lambda config: (type(config), config.capabilities.family, config.capabilities.likelihood)
    models = {claims(config) for _, config in seen if not isinstance(config, JUDGES)}
    assert models <= {claims(case) for case in cases}


def test_limits_are_those_of_fp32_where_fp32_is_less_exact():
    exact, noise = np.random.default_rng(0).normal(size=(2, 1000))
    noise = noise / np.linalg.norm(noise) * np.linalg.norm(exact)
    off = lambda x: (exact + x * noise).astype(np.float32)
    assert np.isclose(InDouble(exact, exact + 5e-5 * noise).noise, 5e-5)
    for error, single, passes in ((5e-5, 0, True), (3e-4, 0, False), (3e-4, 1e-5, False), (3e-4, 5e-5, True)):
        assert compare("x", exact, off(error), noise=single).passed == passes
    assert not compare("x", exact, off(2e-3), noise=1e-2).passed
    assert not compare("x", exact, off(0) + 0.05 * (np.arange(1000) == 7).astype(np.float32), noise=1e-4).passed
