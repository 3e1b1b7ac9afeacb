"""A process that loads a model holds its own share of the averaged weights, and hardly more while it reads them."""

import json
import re

import numpy as np
import pytest

from t2i_jax.core.params import named
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.pipeline import Pipeline
from t2i_jax.storage.artifacts import load_artifact
from tests.fixtures import loading_memory
from tests.fixtures.processes import outputs, started

MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of 96 MiB of weights, and a small one."""
    room = tmp_path_factory.mktemp("models")
    loading_memory.make(room / "small", 1)
    loading_memory.make(room / "run", 96)
    return room


def load(folder, action="load", mesh=(1, 1, 1), devices=1, held=8 * MIB, count=1):
    """What each process says. Threads share one heap: each with its own keeps what it freed, up to 80 MB by chance."""
    arguments = ["-m", "tests.fixtures.loading_memory", folder, action, list(mesh), held]
    processes = started(arguments, count, devices, {"MALLOC_ARENA_MAX": "1"})
    return [json.loads(re.findall(r"^\{.*\}$", text, re.M)[-1]) for text in outputs(processes)]


def test_a_run_is_read_onto_the_mesh_and_then_released_within_its_share(folder):
    (loaded,) = load(folder / "run", mesh=(1, 4, 2), devices=8)
    assert loaded["share"] > 90 * MIB and loaded["peak"] < 1.5 * loaded["share"] + 64 * MIB, loaded
    (released,) = load(folder / "run", "release")
    assert released["share"] < 24 * MIB and released["peak"] < 4 * released["share"] + 64 * MIB, released
    (loaded,) = load(folder / "released", mesh=(1, 4, 2), devices=8)
    assert loaded["share"] > 90 * MIB and loaded["peak"] < 1.5 * loaded["share"] + 64 * MIB, loaded


def test_a_pipeline_holds_weights_as_they_are_computed_with_and_saves_them_as_they_were(tmp_path):
    loading_memory.make(tmp_path / "run", 1, dtype="bfloat16")
    pipeline = Pipeline.load(tmp_path / "run", MeshConfig(1, 4, 2))
    held = named(pipeline.model)
    assert {str(v[...].dtype) for v in held.values()} == {"bfloat16"}
    pipeline.save(tmp_path / "saved")
    saved = named(load_artifact(tmp_path / "saved").model)
    for name, v in saved.items():
        np.testing.assert_array_equal(v[...], loading_memory.fill(name, v[...]))
        np.testing.assert_array_equal(np.asarray(v[...].astype(held[name][...].dtype)), np.asarray(held[name][...]))


@pytest.mark.slow
def test_each_of_several_processes_reads_its_own_share(folder):
    for result in load(folder / "run", mesh=(1, 2, 1), count=2):
        assert 45 * MIB < result["share"] < 51 * MIB and result["peak"] < 1.5 * result["share"] + 112 * MIB, result


@pytest.mark.slow
def test_a_share_of_a_gibibyte(tmp_path):
    loading_memory.make(tmp_path / "small", 1)
    loading_memory.make(tmp_path / "run", 1100)
    (result,) = load(tmp_path / "run", "sample", held=2**27)
    assert result["share"] > 2**30 and result["peak"] < 1.3 * result["share"] + 2**30, result
