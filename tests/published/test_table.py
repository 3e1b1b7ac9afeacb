"""What the table of systems claims is what tests check."""

import importlib

import pytest
import test_meshes

from tests.published import table


@pytest.mark.parametrize("family", table.SHARDED)
def test_what_is_called_sharded_has_a_test_of_meshes(family):
    module, _, names = table.SHARDED[family].partition(": ")
    tests = importlib.import_module(module)
    assert hasattr(tests, family)
    for name in names.split(", "):
        if tests is test_meshes:
            trainable = tests.TRAINABLES[name]
            assert type(getattr(trainable, "family", trainable)).__name__ == family
        else:
            assert callable(getattr(tests, name))


def test_every_family_on_meshes_is_in_the_table():
    tested = {type(getattr(t, "family", t)).__name__ for t in test_meshes.TRAINABLES.values()}
    assert tested <= table.SHARDED.keys()


def test_old_lines_stay_and_columns_are_explained(tmp_path):
    line = dict.fromkeys(table.COLUMNS, "yes") | {"system": "new", "arrays": "2 of 2", "worst error": "1.0e-06"}
    table.write(tmp_path / "t.md", {"old": line | {"system": "old", "original": "a/old"}})
    rows = table.write(tmp_path / "t.md", {"new": line | {"original": "a/new"}})
    assert [row["system"] for row in rows] == ["new", "old"]
    for text in ((tmp_path / "t.md").read_text(), table.summary(rows)):
        assert all(
            f"{column}: " in text or f"{column}, " in text for column in ("loads", "scores", "trains", "sharded")
        )
