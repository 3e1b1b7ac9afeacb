"""The compiler's own flags, which users run with: other tests ask the compiler for less."""

import json

import numpy as np

from tests.fixtures.curves import FILE
from tests.fixtures.processes import outputs, started

NAMES = ("ar", "flow")


def test_families_train_and_sample_with_the_flags_of_users():
    (said,) = outputs(started(["-m", "tests.fixtures.user_flags", *NAMES], env={"XLA_FLAGS": ""}))
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [next(iter(each)) for each in found] == list(NAMES)
    recorded = json.loads(FILE.read_text())
    for name, each in zip(NAMES, found, strict=True):
        assert each["finite"], name
        for loss, values in each[name].items():
            np.testing.assert_allclose(values, recorded[f"{name}/{loss}"][:2], rtol=1e-3, atol=1e-6, err_msg=name)
