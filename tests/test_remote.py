"""Runs in object stores: a store in memory stands in for the real ones."""

import dataclasses
import importlib.machinery
import shutil
import sys
import time
import types
from pathlib import Path
from typing import Annotated, ClassVar

import fsspec
import jax
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from jax.experimental.compilation_cache import compilation_cache

from t2i_jax.core.config import ConfigError
from t2i_jax.core.fields import ENCODER
from t2i_jax.core.platform import CACHE, local_cache, shared_cache
from t2i_jax.storage import artifacts, checkpoints
from t2i_jax.storage.checkpoints import Checkpoints
from t2i_jax.storage.remote import download, resolve_path, staged_dir
from t2i_jax.training import loop, records
from t2i_jax.training.optimizer import Optimizer
from tests.fixtures import toys


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
    return resolve_path("s3://bucket/run")


def test_places(store, tmp_path):
    assert resolve_path(tmp_path) == tmp_path and isinstance(resolve_path("a/b"), Path)
    assert isinstance(store, epath.Path) and str(resolve_path(Path("s3://bucket/run"))) == "s3://bucket/run"
    with pytest.raises(ConfigError, match="ftp://(.|\\n)*gs:// or s3://"):
        resolve_path("ftp://host/run")


def test_a_missing_package_is_named():
    with pytest.raises(ConfigError, match=r"gs://bucket/run: needs the package gcsfs: pip install 't2i_jax\[gcs\]'"):
        loop.train(toys.experiment(), "gs://bucket/run")


def test_files_that_grow_are_copied_when_they_changed(store):
    (store / "config.json").parent.mkdir(parents=True)
    (store / "config.json").write_text("{}")
    with staged_dir(store, every=0.02) as folder:
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
    assert sorted(p.name for p in download(store).iterdir()) == ["config.json", "last"]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A text encoder that is a folder."""

    folder: Annotated[str, ENCODER]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two texts as one, whose files differ by the names of their fields."""

    first: Encoder
    second: Encoder


def test_a_model_in_a_store_brings_its_text_encoders(store, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "weights").write_text(name)
    text = Pair(Encoder(str(tmp_path / "one")), Encoder(str(tmp_path / "two")))
    model = toys.Identity()
    released = artifacts.Artifact(model, model.init(jax.random.key(0)), text)
    artifacts.save_artifact(released, tmp_path / "released", "# a model\n")
    for file in (p for p in (tmp_path / "released").rglob("*") if p.is_file()):
        target = store / file.relative_to(tmp_path / "released")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    shutil.rmtree(tmp_path)
    found = artifacts.load_artifact("s3://bucket/run").text
    assert [(Path(t.folder) / "inner" / "weights").read_text() for t in (found.first, found.second)] == ["one", "two"]


MIN_TIME = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def compiles(monkeypatch):
    """No folder for compiled programs is set, each program is kept; the events of the cache, and a way to forget."""
    events, before = [], {name: getattr(jax.config, name) for name in (CACHE, MIN_TIME)}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    jax.config.update(CACHE, None)
    jax.config.update(MIN_TIME, 0.0)
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
    yield events
    jax.monitoring.clear_event_listeners()
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_run_in_a_store_keeps_its_programs_there(store, tmp_path, monkeypatch, compiles):
    """A run that goes on, on this host or another, reads them; a copy of its model leaves them out."""
    monkeypatch.setattr(loop, "Checkpoints", lambda folder, *a, **k: Checkpoints(tmp_path / "local", *a, **k))
    experiment = toys.experiment(steps=2)
    for local in (None, local_cache()):
        jax.config.update(CACHE, local)
        loop.train(experiment, "s3://bucket/run")
        assert getattr(jax.config, CACHE) == local
        first = sorted(p.name for p in (store / "xla").iterdir())
        assert "jit_step" in {name.partition("-")[0] for name in first}
        assert not (download(store) / "xla").exists()
        jax.clear_caches()
        shutil.rmtree(tmp_path / "local")
        compiles.clear()
        loop.train(experiment, "s3://bucket/run")
        assert compiles.count("cache_hits") >= len(first)
        steps = lambda names: [name for name in names if name.startswith("jit_step-")]
        assert steps(sorted(p.name for p in (store / "xla").iterdir())) == steps(first)
        (store / "xla").rmtree()
        shutil.rmtree(tmp_path / "local")
        jax.clear_caches()


def test_a_cache_that_is_set_stays(store, tmp_path, monkeypatch, compiles):
    monkeypatch.setattr(loop, "Checkpoints", lambda folder, *a, **k: Checkpoints(tmp_path / "local", *a, **k))
    jax.config.update(CACHE, str(tmp_path / "mine"))
    compilation_cache.reset_cache()
    loop.train(toys.experiment(steps=1), "s3://bucket/run")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", local_cache())
    jax.config.update(CACHE, local_cache())
    with shared_cache("s3://bucket/run/xla"):
        assert getattr(jax.config, CACHE) == local_cache()
    assert not (store / "xla").exists()


def test_a_local_run_keeps_its_programs_on_the_machine(tmp_path, compiles):
    loop.train(toys.experiment(steps=1), tmp_path / "run")
    assert not (tmp_path / "run" / "xla").exists()


def test_a_run_in_a_store_goes_on_and_is_read(store, tmp_path, monkeypatch):
    """Checkpoints are the business of their library, which has no store in memory: here they are in a local folder."""
    local = lambda folder, *a, **k: Checkpoints(tmp_path / "local", *a, **k)
    monkeypatch.setattr(loop, "Checkpoints", local)
    monkeypatch.setattr(checkpoints, "Checkpoints", local)  # imported where it is used
    experiment = toys.experiment(optimizer=Optimizer(schedule="constant"))
    short = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, steps=3))
    loop.train(short, "s3://bucket/run")
    state = loop.train(experiment, "s3://bucket/run")
    (tmp_path / "metrics.jsonl").write_text((store / "metrics.jsonl").read_text())
    assert [line["step"] for line in records.read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    found = artifacts.load_artifact("s3://bucket/run")
    assert found.step == 6
    np.testing.assert_array_equal(found.model.layers.w[...], state.ema["layers.w"][...])
