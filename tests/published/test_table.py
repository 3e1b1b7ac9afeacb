"""What the table of systems claims is what tests check."""

from tests.fixtures.families import ALL, SYSTEMS
from tests.fixtures.meshes import sharded
from tests.published import table
from tests.published.parity import systems


def test_every_system_names_its_cases_of_the_contract():
    """That each is what the converter makes of the published weights is seen where they are converted: test_parity."""
    assert SYSTEMS.keys() == systems().keys()
    assert {name for names in SYSTEMS.values() for name in names} <= ALL.keys()


def test_every_family_and_codec_is_compared_over_meshes():
    assert {type(config) for config in ALL.values()} == sharded()


def test_old_lines_stay_and_columns_are_explained(tmp_path):
    line = dict.fromkeys(table.COLUMNS, "yes") | {"system": "new", "arrays": "2 of 2", "worst error": "1.0e-06"}
    table.write(tmp_path / "t.md", {"old": line | {"system": "old", "original": "a/old"}})
    rows = table.write(tmp_path / "t.md", {"new": line | {"original": "a/new"}})
    assert [row["system"] for row in rows] == ["new", "old"]
    for text in ((tmp_path / "t.md").read_text(), table.summary(rows)):
        assert all(
            f"{column}: " in text or f"{column}, " in text for column in ("loads", "scores", "trains", "sharded")
        )
