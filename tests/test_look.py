"""What is seen of pictures: each one once, upright, and what is wrong with each by its name."""

import json

import numpy as np
import pytest
from PIL import Image

from t2i_jax.cli import main
from t2i_jax.data import DataError
from t2i_jax.data.look import look
from tests.fixtures import odd_pictures
from tests.fixtures.commands import refused


def named(several):
    return {one.key.rpartition("/")[2] for one in several}


def test_an_odd_folder(tmp_path):
    found = look(str(odd_pictures.odd(tmp_path)))
    report = found.report()
    assert found.records == len(odd_pictures.ODD) + 6
    assert named(found.broken) == {"zero.png", "cut.jpg", "page.jpg", "gone.png"}
    assert all(one.fault for one in found.broken) and report["broken"].keys() == {one.key for one in found.broken}
    assert named(found.uncaptioned) == {"A.JPG", "b.jpeg", "copy.JPG", "link.png"}
    sizes = {one.key.removeprefix(f"{tmp_path}/"): one.size for one in found.usable}
    assert sizes["h.jpg"] == (16, 24) and sizes["A.JPG"] == sizes["sub/deep er/f.png"] == (24, 16)
    assert found.sizes() == {"24x16": 13, "16x24": 1} and sum(found.shapes().values()) == 14
    assert {frozenset(k.rpartition("/")[2] for k in group) for group in found.duplicates()} == {
        frozenset(("A.JPG", "copy.JPG")),
        frozenset(("e.png", "link.png")),
    }
    assert len(found.captions) == 2 * 10 and found.words()["least"] == 3
    assert any("of no picture (of nothing.txt)" in line for line in found.about)
    assert any("film.mp4" in note for note in found.notes)
    json.dumps(report)


def test_near_duplicates(tmp_path):
    odd_pictures.plain(tmp_path, 6)
    odd_pictures.pixels(0, 48, 32).save(tmp_path / "again.jpg", quality=95, subsampling=0)
    found = look(str(tmp_path))
    assert [sorted(k.rpartition("/")[2] for k in group) for group in found.near()] == [["00.png", "again.jpg"]]
    assert not found.duplicates()


def test_evenly_spaced_ones_of_many(tmp_path):
    odd_pictures.plain(tmp_path, 12)
    seen = []
    found = look(str(tmp_path), 4, lambda done, total: seen.append((done, total)))
    assert found.records == 12 and seen == [(n, 4) for n in (1, 2, 3, 4)]
    assert [one.captions[0] for one in found.seen] == [f"a picture of {n}" for n in (0, 4, 7, 11)]


def test_what_has_no_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of 1 records.*a\.png .*an empty file"):
        look(str(tmp_path))


def test_the_command(tmp_path, monkeypatch, capsys):
    odd_pictures.odd(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    main(["data", "look", "set", "--out", "seen"])
    out, err = capsys.readouterr()
    assert "zero.png" in out and "24x16" in out
    assert "the model draws by captions, which 10 of 14 pictures have" in " ".join(err.split())
    report = json.loads((tmp_path / "seen" / "look.json").read_text())
    assert report["pictures"] == 14 and len(report["broken"]) == 4
    with Image.open(tmp_path / "seen" / "contact.png") as sheet:
        assert np.asarray(sheet).std() > 10
    main(["data", "look", "set", "--out", "seen"])  # over its own files
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "look.json").write_text("mine")
    assert "will not be written over" in refused(capsys, "data", "look", "set", "--out", "mine")
    assert (tmp_path / "mine" / "look.json").read_text() == "mine"
