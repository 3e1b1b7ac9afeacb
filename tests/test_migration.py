"""Stored configs of earlier versions: renamed classes, fields and words are read at any depth, those of later versions
refused."""

import dataclasses
import json
import sys

import pytest

from t2i_jax.core import config, migration
from t2i_jax.core.config import ConfigError
from t2i_jax.core.migration import VERSION, Step, migrated
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import Folder
from t2i_jax.text.sentencepiece import SentencePiece
from tests.fixtures import toys
from tests.fixtures.families import CODECS, FAMILIES


@dataclasses.dataclass(frozen=True)
class Execution:
    remat: str = "none"
    chunk: int = 0


@dataclasses.dataclass(frozen=True)
class Embedder:
    """Was `Reader`, with `size`."""

    width: int = 1
    mode: str = "padded"


@dataclasses.dataclass(frozen=True)
class Net:
    """Was `Netz`, with `remat` and `gone`."""

    embedder: object = None
    kinds: tuple[str, ...] = ()
    compute: Execution = Execution()
    total: int = 0


HERE = __name__
FIRST = Step(
    classes={"old.place:Netz": f"{HERE}:Net", f"{HERE}:Reader": f"{HERE}:Middle"},
    fields={
        "old.place:Netz": {"reader": "embedder", "remat": "compute.remat", "gone": ""},
        f"{HERE}:Reader": {"size": "extent"},
    },
    parts={"old.place:Netz": {"compute": f"{HERE}:Execution"}},
    values={f"{HERE}:Reader": {"mode": {"pad": "padding"}}, "old.place:Netz": {"kinds": {"row": "rows"}}},
    rewrites={"old.place:Netz": lambda net: {**net, "total": 7}},
)
SECOND = Step(
    classes={f"{HERE}:Middle": f"{HERE}:Embedder"},
    fields={f"{HERE}:Middle": {"extent": "width"}},
    values={f"{HERE}:Middle": {"mode": {"padding": "padded"}}},
)
NET = {"type": "old.place:Netz", "remat": "full", "gone": 3, "kinds": ["row", "none"]}
NET |= {"reader": {"type": f"{HERE}:Reader", "size": 5, "mode": "pad"}}
MADE = Net(Embedder(5), ("rows", "none"), Execution("full"), 7)


@pytest.fixture
def steps(monkeypatch):
    """Two versions before this one, whose steps rename."""
    monkeypatch.setattr(config, "migrated", lambda content: migrated(content, (FIRST, SECOND)))


def stored(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("within", [lambda x: {"model": x}, lambda x: {"model": [x, 1]}, lambda x: {"a": {"b": x}}])
def test_old_names_are_read_at_any_depth(tmp_path, steps, within):
    path = stored(tmp_path / "config.json", within(NET))
    assert config.read_stored(path) == config.from_json(config.to_json(within(MADE)))


def test_old_names_are_read_from_the_top_and_from_each_version(tmp_path, steps):
    assert config.read_stored(stored(tmp_path / "config.json", NET)) == MADE
    assert config.read_stored(stored(tmp_path / "config.json", {"version": 1, **NET})) == MADE
    newer = {"version": 2, "type": f"{HERE}:Middle", "extent": 4, "mode": "padding"}
    assert config.read_stored(stored(tmp_path / "config.json", newer)) == Embedder(4)


def test_a_migrated_config_is_left_as_it_is(steps):
    new = config.to_json(MADE)
    assert config.migrated({"version": 3, **new}) == new


def test_modules_move_with_all_that_is_in_them():
    step = Step(modules={"a.nn": "a.layers", "a.nn.heads": "a.heads"}, classes={"a.nn.x:Old": "a.new:New"})
    kinds = ["a.nn:A", "a.nn.y:A.B", "a.nn.heads.softmax:S", "a.nnx:A", "a.nn.x:Old", "b:C"]
    found = step([{"type": kind} for kind in kinds])
    moved = ["a.layers:A", "a.layers.y:A.B", "a.heads.softmax:S", "a.nnx:A", "a.new:New", "b:C"]
    assert found == [{"type": kind} for kind in moved]


def test_fields_that_become_one_are_refused():
    with pytest.raises(ConfigError, match="both 'x' and 'y'"):
        Step(fields={"m:C": {"x": "y"}})({"type": "m:C", "y": 1, "x": 2})
    with pytest.raises(ConfigError, match="'x' belongs into 'y', which holds 1"):
        Step(fields={"m:C": {"x": "y.z"}})({"type": "m:C", "y": 1, "x": 2})


@pytest.mark.parametrize(("version", "says"), [(VERSION + 1, "newer t2i_jax"), ("x", "whole number"), (0, "whole")])
def test_a_file_of_another_kind_of_version_is_one_clear_error(tmp_path, version, says):
    path = stored(tmp_path / "config.json", {"version": version, "type": "t2i_jax.made.later:Thing"})
    with pytest.raises(ConfigError, match=rf"config\.json: .*{says}") as error:
        config.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FAMILIES | CODECS)
def test_what_is_written_says_its_version_and_is_read_as_it_was(tmp_path, name):
    experiment = dataclasses.replace(toys.experiment((FAMILIES | CODECS)[name]), text=SentencePiece("words.model"))
    path = tmp_path / "config.json"
    config.write_stored(path, experiment)
    assert json.loads(path.read_text())["version"] == VERSION == len(migration.STEPS) + 1
    assert config.load(path) == experiment
    config.write_stored(path, {"model": experiment.model, "step": 3})
    assert config.read_stored(path) == {"model": experiment.model, "step": 3}


def test_each_class_that_tables_name_now_exists():
    """A step names classes of its time; those of the last one are today's, or user files could not be read."""
    step = migration.STEPS[-1]
    for kind in step.classes.values():
        module, _, name = kind.partition(":")
        __import__(module)
        assert dataclasses.is_dataclass(getattr(sys.modules[module], name)), kind


# The parser takes the first, and the migration does not: from Python 3.12 on a level of it is fewer calls.
@pytest.mark.parametrize("depth", [900 if sys.version_info < (3, 12) else 2000, 100_000])
def test_a_file_that_is_nested_too_deeply_is_one_clear_error(tmp_path, depth):
    (tmp_path / "config.json").write_text('{"a": ' * depth + "1" + "}" * depth)
    with pytest.raises(config.ConfigError, match="config.json: nested too deeply"):
        config.read_stored(tmp_path / "config.json")


def test_earlier_defaults_of_the_fields_of_data_are_the_one_of_today():
    """A run that left the default goes on, though records may have more fields today."""
    assert list(Data(Folder("")).fields) == migration.FIELDS, (
        "a new field: a step of the migration for the default before"
    )
    for missing in ({"image_features"}, {"low_codes", "image_features"}):
        stored = {"type": "t2i_jax.data.pipeline:Data", "fields": [f for f in migration.FIELDS if f not in missing]}
        assert migrated({"version": 3, "data": stored})["data"]["fields"] == migration.FIELDS
    some = {"type": "t2i_jax.data.pipeline:Data", "fields": ["codes"]}
    assert migrated({"version": 3, "data": some})["data"] == some
