"""The zoo: names that are read wherever a model is named, what lists them, and the files of the wheel."""

import json
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

import t2i_jax as t2i
from t2i_jax import zoo
from t2i_jax.cli import main
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.params import named
from t2i_jax.interop import tensorfile
from t2i_jax.storage.artifacts import Artifact, config_of, is_stored, load_artifact, open_artifact, save_artifact
from t2i_jax.storage.hub import readable
from tests.fixtures import zoo as fixture
from tests.fixtures.commands import refused
from tests.fixtures.families import FAMILIES, fresh

own_zoo = fixture.own_zoo
HOME = Path(__file__).parent.parent
MOST_BYTES = 12_000_000


def test_models_of_the_package_are_whole_and_small():
    found = zoo.models()
    assert sum(model.bytes for model in found.values()) <= MOST_BYTES
    for name, model in found.items():
        assert model.picture.is_file(), name
        assert config_of(model.folder).capabilities.family, name
        for text in model.folder.rglob("*.json"):
            assert "/home/" not in text.read_text() and "/root/" not in text.read_text(), text


def test_a_name_is_read_wherever_a_model_is(own_zoo):
    assert readable("tiny-8") == own_zoo / "tiny-8"
    assert is_stored("tiny-8") and config_of("tiny-8") == FAMILIES["gan-spatial"]
    assert t2i.load("tiny-8", t2i.Mesh(1, 1, 1)).family == FAMILIES["gan-spatial"]


def test_a_part_of_a_model_has_a_name(own_zoo):
    shutil.copytree(own_zoo / "tiny-8", own_zoo / "tiny-8" / "codec")
    assert readable("tiny-8/codec") == own_zoo / "tiny-8" / "codec"
    assert zoo.find("tiny-8/../tiny-8") is None and zoo.find("tiny-8/nothing") is None


def test_models_of_the_zoo_share_a_codec_and_others_have_their_own(own_zoo, tmp_path):
    codec = FAMILIES["gan-spatial"]  # any released folder will do
    save_artifact(Artifact(codec, fresh(codec)), own_zoo / "tiny-8" / "codec", "# a codec\n")
    model = Artifact(codec, fresh(codec), codec="tiny-8/codec")
    save_artifact(model, own_zoo / "other-8", "# a card\n")
    assert not (own_zoo / "other-8" / "codec").exists()
    assert Path(open_artifact(own_zoo / "other-8").artifact.codec).resolve() == own_zoo / "tiny-8" / "codec"
    for source, out in ((model, "direct"), (load_artifact(own_zoo / "other-8"), "again")):
        save_artifact(source, tmp_path / out, "# a card\n")
        assert (tmp_path / out / "codec" / "model.safetensors").is_file()


def test_what_is_in_the_working_directory_is_taken_first(own_zoo):
    Path("tiny-8").mkdir()
    assert readable("tiny-8") == Path("tiny-8")
    with pytest.raises(ConfigError, match=r"tiny-8: .* no config\.json in it"):
        load_artifact("tiny-8")
    Path("tiny-8").rmdir()
    assert readable("./tiny-8") == Path("./tiny-8")  # a path is no name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../zoo/tiny-8", "/tiny-8", "hf://a/b", "tiny-8\0", "~", "tiny"]
)
def test_other_words_are_no_models(own_zoo, name):
    assert zoo.find(name) is None


def test_a_wrong_name_suggests_the_nearest(own_zoo, capsys):
    assert "did you mean 'tiny-8'?" in refused(capsys, "sample", "tiny8", "a red heart")
    assert "did you mean 'tiny-8'?" in refused(capsys, "zoo", "tiny8")
    assert "did you mean" not in refused(capsys, "sample", "runs/tiny8", "a red heart")


def test_the_command_samples_a_model_by_name(own_zoo, capsys, monkeypatch):
    monkeypatch.setenv("T2I_TERMINAL", "blocks")
    main(["sample", "tiny-8", "1", "--out", "out", "--mesh", "data=1", "--show"])
    said = capsys.readouterr()
    assert "1 new images" in said.err and said.out.count("\N{UPPER HALF BLOCK}") == 8 * 4
    assert Path("out/00000.png").exists() and not Path("tiny-8").exists()


def test_no_report_is_written_into_the_zoo(own_zoo, capsys):
    assert "name a folder by --out" in refused(capsys, "evaluate", "tiny-8")


def test_the_list_has_pictures_where_a_terminal_draws_them(own_zoo, capsys, monkeypatch):
    monkeypatch.delenv("T2I_TERMINAL", raising=False)
    main(["zoo"])
    plain = capsys.readouterr().out
    assert "tiny-8  Three classes" in plain and "GAN, 8x8 pixels" in plain and "grid.png" in plain.replace("\n", "")
    monkeypatch.setenv("T2I_TERMINAL", "blocks")
    main(["zoo", "tiny-8"])
    drawn = capsys.readouterr().out
    assert drawn.count("\N{UPPER HALF BLOCK}") == 8 * 4 and "top1: 0.5" in drawn and "picture:" not in drawn


def test_an_empty_zoo_says_so(own_zoo, capsys):
    shutil.rmtree(own_zoo)
    main(["zoo"])
    assert "There are no models in this copy" in capsys.readouterr().out
    assert "it has none yet" in refused(capsys, "zoo", "tiny-8")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"title": ""}, "title: a text"),
        ({"size": [8]}, "size: rows and columns"),
        ({"size": [8, -1]}, "size: rows and columns"),
        ({"figures": {"top1": "much"}}, "figures: a number"),
        ({"figurs": {}}, "no field 'figurs'; did you mean 'figures'"),
        ({"needs": 3}, "needs: a text"),
    ],
)
def test_a_faulty_card_is_named(own_zoo, change, said):
    card = own_zoo / "tiny-8" / zoo.CARD
    card.write_text(json.dumps(fixture.CARD | change))
    with pytest.raises(ConfigError, match=said) as error:
        zoo.models()
    assert str(card) in str(error.value)
    card.write_text("{")
    with pytest.raises(ConfigError, match="cut short, or no JSON"):
        zoo.models()


def test_int8_weights_are_those_of_the_model_but_for_rounding(own_zoo, tmp_path):
    main(["release", str(own_zoo / "tiny-8"), "--out", str(tmp_path / "small"), "--int8"])
    whole, small = load_artifact(own_zoo / "tiny-8"), load_artifact(tmp_path / "small")
    assert small.config == whole.config
    theirs = named(small.model)
    for name, v in named(whole.model).items():
        x, y = np.asarray(v[...], np.float64), np.asarray(theirs[name][...], np.float64)
        most = np.abs(x).max() / 254 if x.ndim > 1 else 0  # half a step of the largest scale
        assert theirs[name].dtype == v.dtype and np.abs(x - y).max() <= most * 1.001, name
    size = lambda folder: (folder / "model.safetensors").stat().st_size
    assert size(tmp_path / "small") < size(own_zoo / "tiny-8")
    stored = tensorfile.SafeTensors(tmp_path / "small" / "model.safetensors").shapes
    assert {str(x.dtype) for name, x in stored.items() if name + tensorfile.SCALE in stored} == {"int8"}


def test_the_wheel_holds_the_models(tmp_path):
    """A wheel of a copy of the sources, built by the backend of the project, has every file of the zoo."""
    source = tmp_path / "source"
    shutil.copytree(HOME / "t2i_jax", source / "t2i_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(HOME / name, source)
    for part in ("", "codec", "text"):
        folder = source / "t2i_jax" / "zoo" / "models" / "other-8" / part
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors", "grid.png", "card.json", "vocabulary.model", "README.md"):
            (folder / name).write_bytes(b"x")
    if int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("setuptools 77 or newer builds the wheel")
    build = "from setuptools import build_meta; print(build_meta.build_wheel('made'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = (source / "made").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(p.relative_to(source)) for p in (source / "t2i_jax" / "zoo" / "models").rglob("*") if p.is_file()}
    assert len(wanted) >= 18 and wanted <= held and "t2i_jax/py.typed" in held
