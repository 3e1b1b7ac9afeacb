"""Every published system whose outputs are at hand: weights through the converter, each array compared."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from parity import FOLDERS, Oracle, check, systems

SMALL, LARGE = ({f.parent.name: f.parent for f in sorted(room.glob("*/meta.json"))} for room in FOLDERS)


@pytest.mark.parametrize("name", sorted(systems()))
def test_every_published_array(name):
    if name not in SMALL | LARGE:
        pytest.skip(f"no folder {name}")
    lines = list(check(Oracle((LARGE | SMALL)[name])))
    assert lines and all(line.passed for line in lines), "\n" + "\n".join(map(str, lines))
