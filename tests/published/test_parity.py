"""Every published system whose outputs are at hand: weights through the converter, each array compared.

One a system that is kept in the project is quick; larger ones, where they lie beside it, and other configurations of
the same systems belong to the long tests.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from parity import FOLDERS, Oracle, check, systems

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
