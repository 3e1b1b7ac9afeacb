"""Models in folders are found from wherever they are asked for."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

from t2i_jax.core.params import named
from t2i_jax.storage.artifacts import (
    Artifact,
    copy_artifact,
    find_artifact,
    load_artifact,
    resolve_files,
    save_artifact,
)
from t2i_jax.text.sentencepiece import SentencePiece
from tests.fixtures import toys


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


def test_a_released_model_has_half_the_bytes_in_bf16_and_so_has_its_codec(tmp_path):
    model = toys.Squares()
    codec = Artifact(model, model.init(jax.random.key(0)))
    save_artifact(codec, tmp_path / "codec", "", half=True)
    family = toys.Identity()
    whole = Artifact(family, family.init(jax.random.key(1)), codec=str(tmp_path / "codec"))
    save_artifact(whole, tmp_path / "whole", "")
    copy_artifact(tmp_path / "whole", tmp_path / "half", lambda _: "", half=True)
    rounded = {k: v[...].astype("bfloat16").astype(v[...].dtype) for k, v in named(whole.model).items()}
    read = named(load_artifact(tmp_path / "half").model)
    assert any(v.dtype == jnp.float32 for v in rounded.values())
    chex.assert_trees_all_equal({k: v[...] for k, v in read.items()}, rounded)
    size = lambda name: (tmp_path / name / "model.safetensors").stat().st_size
    assert size("half") < size("whole") - sum(2 * v.size for v in rounded.values() if v.dtype == jnp.float32) + 64
    assert size("half/codec") == size("whole/codec") == size("codec")
