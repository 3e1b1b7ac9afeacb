"""Models in folders are found from wherever they are asked for."""

from pathlib import Path

import pytest

from t2i_jax.storage.artifacts import find_artifact, resolve_files
from t2i_jax.text.sentencepiece import SentencePiece


@pytest.fixture
def run(tmp_path):
    """A run that was trained in `project`, next to its codec."""
    folder = tmp_path / "project" / "runs" / "model"
    folder.mkdir(parents=True)
    (tmp_path / "project" / "runs" / "codec").mkdir()
    return folder


def test_paths_of_a_run_are_found_from_any_folder(run, tmp_path, monkeypatch):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder, name in ((project, "runs/model"), (elsewhere, "../project/runs/model"), (elsewhere, str(run))):
        monkeypatch.chdir(folder)
        assert Path(find_artifact("runs/codec", Path(name))).resolve() == project / "runs" / "codec"
    monkeypatch.chdir(project)
    assert find_artifact("runs/codec", Path("runs/model")) == "runs/codec"
    for path in ("runs/none", str(tmp_path / "gone"), "gs://bucket/codec", ""):
        assert find_artifact(path, run) == path


def test_a_vocabulary_is_found_from_any_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project" / "words.model").touch()
    assert resolve_files(SentencePiece("words.model"), run).path == str(tmp_path / "project" / "words.model")
    (run / "vocabulary.model").touch()
    assert resolve_files(SentencePiece("words.model"), run).path == str(run / "vocabulary.model")
    assert resolve_files(SentencePiece("none.model"), tmp_path).path == "none.model"
