"""Runs in object stores: a store in memory stands in for the real ones."""

import dataclasses
import importlib.machinery
import sys
import time
import types
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import toys
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from t2i_jax.config import ConfigError
from t2i_jax.training import artifacts, loop, records
from t2i_jax.training.checkpoints import Checkpoints
from t2i_jax.training.remote import fetched, place, worked_in


class Store(MemoryFileSystem):
    """A bucket in memory."""

    protocol = "s3"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("s3://"))


@pytest.fixture
def store(monkeypatch):
    fsspec.register_implementation("s3", Store, clobber=True)
    there = types.ModuleType("s3fs")
    there.__spec__ = importlib.machinery.ModuleSpec("s3fs", None)
    monkeypatch.setitem(sys.modules, "s3fs", there)
    Store.store.clear()
    Store.clear_instance_cache()
    return place("s3://bucket/run")


def test_places(store, tmp_path):
    assert place(tmp_path) == tmp_path and isinstance(place("a/b"), Path)
    assert isinstance(store, epath.Path) and str(place(Path("s3://bucket/run"))) == "s3://bucket/run"
    with pytest.raises(ConfigError, match="ftp://(.|\\n)*gs:// or s3://"):
        place("ftp://host/run")


def test_a_missing_package_is_named():
    with pytest.raises(ConfigError, match=r"gs://bucket/run: needs the package gcsfs: pip install 't2i_jax\[gcs\]'"):
        loop.train(toys.experiment(), "gs://bucket/run")


def test_files_that_grow_are_copied_when_they_changed(store):
    (store / "config.json").parent.mkdir(parents=True)
    (store / "config.json").write_text("{}")
    with worked_in(store, every=0.02) as folder:
        assert (folder / "config.json").read_text() == "{}"
        (folder / "samples").mkdir()
        for text in ("one", "one and two"):
            (folder / "samples" / "a").write_text(text)
            for _ in range(500):
                if (store / "samples" / "a").exists() and (store / "samples" / "a").read_text() == text:
                    break
                time.sleep(0.01)
            assert (store / "samples" / "a").read_text() == text
        (folder / "last").write_text("3")
    assert (store / "last").read_text() == "3" and not folder.exists()
    assert sorted(p.name for p in fetched(store).iterdir()) == ["config.json"]


def test_a_run_in_a_store_goes_on_and_is_read(store, tmp_path, monkeypatch):
    """Checkpoints are the business of their library, which has no store in memory: here they lie beside."""
    local = lambda folder, *a: Checkpoints(tmp_path / "beside", *a)
    monkeypatch.setattr(loop, "Checkpoints", local)
    monkeypatch.setattr(artifacts, "Checkpoints", local)
    experiment = toys.experiment()
    short = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, steps=3))
    loop.train(short, "s3://bucket/run")
    (store / "config.json").unlink()
    state = loop.train(experiment, "s3://bucket/run")
    (tmp_path / "metrics.jsonl").write_text((store / "metrics.jsonl").read_text())
    assert [line["step"] for line in records.read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    found = artifacts.load_artifact("s3://bucket/run")
    assert found.step == 6
    np.testing.assert_array_equal(found.model.layers.w[...], state.ema["layers.w"][...])
