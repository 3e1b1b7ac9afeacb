"""The compiler's own flags, which users run with: other tests ask the compiler for less."""

import json

import numpy as np
import pytest

from tests.fixtures.curves import FILE
from tests.fixtures.processes import outputs, started


@pytest.mark.parametrize("name", ["ar", pytest.param("flow", marks=pytest.mark.slow)])
def test_families_train_and_sample_with_the_flags_of_users(name):
    (said,) = outputs(started(["-m", "tests.fixtures.user_flags", name], env={"XLA_FLAGS": ""}))
    (found,) = (json.loads(line) for line in said.splitlines() if line.startswith("{"))
    recorded = json.loads(FILE.read_text())
    assert found["finite"] and found[name]
    for loss, values in found[name].items():
        np.testing.assert_allclose(values, recorded[f"{name}/{loss}"][:2], rtol=1e-3, atol=1e-6)
