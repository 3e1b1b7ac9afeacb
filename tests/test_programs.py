"""Programs that are kept: the same images without a trace, and never one of another key."""

import dataclasses
import json
import logging
import os
import pickle
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from t2i_jax import sampler
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.pipeline import Pipeline
from t2i_jax.sampling import solvers
from t2i_jax.storage import programs
from tests.fixtures import toys
from tests.fixtures.families import FAMILIES, fresh

pytest.importorskip("flatbuffers")
ONE = MeshConfig(1, 1, 1)


@pytest.fixture(autouse=True)
def kept(user_cache, monkeypatch):
    """The folder of kept programs, which are none; in it this process is as if it had just begun."""
    monkeypatch.setenv(programs.SWITCH, "on")
    for name in solvers.SOLVERS.keys() - solvers._OF_PACKAGE.keys():  # those of `examples/`, which other tests import
        monkeypatch.delitem(solvers.SOLVERS, name)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before or str(user_cache / "t2i_jax" / "xla"))  # it may be off
    begin()
    yield user_cache / "t2i_jax" / "programs"
    sampler._kept.cache_clear()
    jax.config.update("jax_compilation_cache_dir", before)


def begin():
    """What a new process knows of programs: nothing."""
    jax.clear_caches()
    sampler._kept.cache_clear()


def pipeline(name="gan-spatial", mesh=ONE):
    family = FAMILIES[name] if isinstance(name, str) else name
    return Pipeline.place(family, fresh(family), mesh=mesh)


def draw(name="gan-spatial", mesh=ONE, **options):
    return (
        pipeline(name, mesh).sampler().sample(["1", "2"])
        if not options
        else pipeline(name, mesh)(["1", "2"], **options)
    )


def untraceable(monkeypatch, name="gan-spatial"):
    def sample(*_, **__):
        raise AssertionError("it was traced")

    monkeypatch.setattr(type(FAMILIES[name]), "sample", sample)


@pytest.mark.parametrize("name", ["gan-spatial", "ar", "dit", "masked-mixture"])
def test_a_program_that_is_kept_draws_the_same_and_is_not_traced(name, kept, monkeypatch):
    monkeypatch.setenv(programs.SWITCH, "off")
    family = FAMILIES[name]
    run = lambda: Pipeline.place(family, fresh(family), mesh=ONE).sampler().generate(["1", "2"], [5, 6])
    if family.sample_spec().kind != "pixels":  # codes, which no codec decodes here
        monkeypatch.setattr(sampler, "_decode", lambda codec, model, codes: codes)
    plain = np.asarray(run())
    assert not kept.exists()
    monkeypatch.setenv(programs.SWITCH, "on")
    begin()
    np.testing.assert_array_equal(run(), plain)
    assert len(list(kept.iterdir())) == 1
    begin()
    untraceable(monkeypatch, name)
    np.testing.assert_array_equal(run(), plain)


def test_options_and_weights_are_arguments(kept, monkeypatch):
    first = draw(temperature=0.5)
    begin()
    untraceable(monkeypatch)
    assert (draw(temperature=1.0) != first).any()
    assert len(list(kept.iterdir())) == 1


CHANGES = {
    "source": lambda p: p.setattr(programs, "_source", lambda: "another"),
    "version": lambda p: p.setitem(programs.PACKAGES, "jaxlib", "0.0"),
    "machine": lambda p: p.setattr(programs, "_machine", lambda: ["another"]),
    "flags": lambda p: p.setenv("LIBTPU_INIT_ARGS", "--another"),
    "setting": lambda p: p.setattr(programs, "UNRELATED", (*programs.UNRELATED, "threefry_partitionable")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_program_of_another_key_is_not_read(what, kept, monkeypatch):
    draw()
    (old,) = kept.iterdir()
    begin()
    CHANGES[what](monkeypatch)
    draw()
    (new,) = set(kept.iterdir()) - {old}
    # Not even where it has the name of the right one.
    new.write_bytes(old.read_bytes())
    begin()
    untraceable(monkeypatch)
    with pytest.raises(AssertionError, match="it was traced"):
        draw()


def test_another_config_batch_or_structure_is_another_program(kept):
    draw()
    pipeline().sampler().sample(["1", "2", "0"])
    wider = dataclasses.replace(FAMILIES["gan-spatial"], alternating=not FAMILIES["gan-spatial"].alternating)
    Pipeline.place(wider, fresh(FAMILIES["gan-spatial"]), mesh=ONE).sampler().sample(["1", "2"])
    assert len(list(kept.iterdir())) == 3


SPOILT = {
    "cut": lambda data: data[:-7],
    "empty": lambda data: b"",
    "flipped": lambda data: data[:-50] + bytes([data[-50] ^ 1]) + data[-49:],
    "header": lambda data: b"{}" + data[data.index(b"\n") :],
    "noise": lambda data: np.random.default_rng(0).integers(0, 256, 500).astype(np.uint8).tobytes(),
    "pickle": lambda data: pickle.dumps({"sha256": "x"}),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_damaged_file_is_set_aside_and_traced_anew(how, kept, caplog):
    images = draw()
    (path,) = kept.iterdir()
    spoilt = SPOILT[how](path.read_bytes())
    path.write_bytes(spoilt)
    begin()
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(draw(), images)
    assert "set aside" in caplog.text
    assert path.with_suffix(".damaged").read_bytes() == spoilt and path.exists()
    begin()
    caplog.clear()
    draw()
    assert not caplog.text


def test_nothing_is_unpickled(kept, monkeypatch):
    images = draw()
    begin()

    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    np.testing.assert_array_equal(draw(), images)


def test_code_of_a_user_is_traced_each_time(kept, monkeypatch):
    family = toys.Histogram()
    codec = toys.Squares()
    assert sampler._kept.cache_info().currsize == 0
    about = sampler.Program(family, codec, None)
    with pytest.raises(programs.CannotKeep, match="tests.fixtures.toys:Histogram"):
        sampler._about(about, None)
    monkeypatch.setitem(solvers.SOLVERS, "own", solvers.SOLVERS["euler"])
    with pytest.raises(programs.CannotKeep, match="other solvers"):
        sampler._about(sampler.Program(FAMILIES["dit"], None, None), None)
    draw("dit")
    assert not kept.exists()


def test_several_devices_are_traced_each_time(kept):
    draw(mesh=MeshConfig(2, 1, 1))
    assert not kept.exists()


def test_a_cache_that_cannot_be_written_costs_no_image(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "under"))
    assert draw().shape == (2, 8, 8, 3)


def test_a_program_without_a_stable_form_is_noted_once(kept, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("no stable form")

    images = draw()
    (path,) = kept.iterdir()
    path.unlink()
    begin()
    monkeypatch.setattr(programs.export, "export", lambda *_, **__: refuse)
    np.testing.assert_array_equal(draw(), images)
    head, _, payload = path.read_bytes().partition(b"\n")
    assert payload == b"" and json.loads(head)["made_by"] == "t2i_jax"
    begin()
    monkeypatch.setattr(programs.export, "export", lambda *_, **__: pytest.fail("tried again"))
    np.testing.assert_array_equal(draw(), images)


def test_the_folder_is_bounded(tmp_path):
    for n in range(10):
        path = tmp_path / f"{n}"
        path.write_bytes(bytes(100))
        os.utime(path, (n, n))
    programs.trim(tmp_path, 350)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["7", "8", "9"]
    programs.trim(tmp_path / "nowhere", 0)


def test_without_a_listener_the_program_has_no_callback(kept):
    draw("dit")
    data = next(kept.iterdir()).read_bytes().partition(b"\n")[2]
    calls = lambda text: re.search(r"custom_call @\w*callback", text)  # places in the source have such names too
    text = jax.export.deserialize(bytearray(data)).mlir_module()
    assert "stablehlo" in text and not calls(text)
    assert calls(jax.jit(lambda x: jax.debug.callback(print, x)).lower(1.0).as_text())


def test_shapes_alone_make_a_program_ready(kept, monkeypatch):
    one = pipeline().sampler()
    one.warm(["1", "2"])
    (path,) = kept.iterdir()
    untraceable(monkeypatch)
    images = one.sample(["1", "2"])
    assert images.shape == (2, 8, 8, 3) and list(kept.iterdir()) == [path]


def test_the_identity_of_files_is_that_of_their_content(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    assert programs.identity(str(a)) == programs.identity(str(b)) != programs.identity("")
    (b / "config.json").write_text("{ }")
    assert programs.identity(str(a)) != programs.identity(str(b))
    assert programs.identity(str(Path(a, "config.json"))) != programs.identity(str(Path(b, "config.json")))
