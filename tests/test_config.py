"""Config files: what they build, how they are overridden, and what a wrong one says."""

import dataclasses
import io
import sys
from pathlib import Path

import pytest

from t2i_jax.core import config
from t2i_jax.core.config import ConfigError
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.sampling.options import ARSampler
from t2i_jax.training.optimizer import Optimizer
from tests.fixtures import toys

FILE = """
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.ar import AR
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer
data = Data(ArrayRecord("nowhere"))
experiment = Experiment(AR(), data, Train(steps=7, {field}optimizer=Optimizer(learning_rate=1e-3)))
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(FILE.format(field=""))
    return path


def test_overrides_replace_single_fields(file):
    experiment = config.load(file, ["--train.steps=9", "--train.optimizer.learning-rate", "0.5", "--mesh.fsdp=2"])
    assert experiment.train.steps == 9 and experiment.train.optimizer.learning_rate == 0.5
    assert experiment.mesh == MeshConfig(fsdp=2) and experiment.train.optimizer.b2 == Optimizer().b2


def test_json_round_trip_is_the_same_value():
    experiment = toys.experiment(toys.Game(), optimizers={"critic": Optimizer("sgd", options={"momentum": 0.9})})
    again = config.from_json(config.to_json(experiment))
    assert again == experiment and config.differences(config.to_json(experiment), config.to_json(again)) == []


def test_differences_name_the_field():
    old, new = Optimizer(), dataclasses.replace(Optimizer(), warmup=7)
    assert config.differences(config.to_json(old), config.to_json(new)) == ["warmup: 100 -> 7"]


def test_unknown_field_in_a_file_names_the_nearest(file):
    file.write_text(FILE.format(field="stepz=3, "))
    with pytest.raises(ConfigError, match=r"experiment\.py.*stepz.*did you mean 'steps'"):
        config.load(file)


@pytest.mark.parametrize(
    ("line", "near"),
    [
        ("from t2i_jax.models.diffusion import Diffusion; Diffusion(solvr=1)", "solver"),
        ("from t2i_jax.models.diffusion import Diffusion as D; x = [D(None, *[], solvr=1)]", "solver"),
        ("from t2i_jax import heads; heads.DiffusionHead(1, wdth=1)", "width"),
        ("from t2i_jax.heads import FlowHead; FlowHead(tims=1)", "dim"),
        ("from t2i_jax.noise.processes import Flow; Flow(tims=1)", "times"),
        ("import dataclasses; from t2i_jax.models.ar import AR; dataclasses.replace(AR(), tid=1)", "tied"),
        ("from t2i_jax.nn.transformer import Transformer; (lambda kind: kind(\n  dpth=3))(Transformer)", "depth"),
        ("dict(solvr=1)['solver'](x=1)", None),
        ("from functools import partial; from t2i_jax.models.ar import AR; partial(AR, wdth=1)()", None),
        ("(lambda x: x)(y=1)", None),
    ],
)
def test_a_wrong_field_is_one_of_the_class_that_was_called(tmp_path, line, near):
    """Whatever its name is there, and whichever others have that name."""
    path = tmp_path / "experiment.py"
    path.write_text("import t2i_jax.models.diffusion, t2i_jax.heads\n" + line)
    with pytest.raises(ConfigError, match=r"experiment\.py, line ") as error:
        config.load(path)
    assert (f"did you mean '{near}'?" in str(error.value)) if near else "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "says"), [("--train.stepz=3", "train.steps"), ("--train.steps=many", "train.steps")]
)
def test_unknown_override_and_wrong_type_name_the_field(file, argument, says):
    with pytest.raises(ConfigError, match=says) as error:
        config.load(file, [argument])
    assert "\n" not in str(error.value) and "--help" not in str(error.value)


def test_errors_are_the_same_where_no_boxes_can_be_drawn(file, monkeypatch):
    for encoding in ("utf-8", "latin-1"):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        with pytest.raises(ConfigError, match=r"^--train\.steps -1: 1 to 2147483647$"):
            config.load(file, ["--train.steps=-1"])


def test_missing_file_names_the_nearest(file):
    with pytest.raises(ConfigError, match=r"did you mean 'experiment\.py'"):
        config.load(file.with_name("experimant.py"))


def test_a_file_without_experiment_says_so(file):
    file.write_text("x = 1")
    with pytest.raises(ConfigError, match="`experiment`"):
        config.load(file)


def test_json_names_only_classes_of_the_library():
    with pytest.raises(ConfigError, match="import its module"):
        config.from_json({"type": "some_other_package.module:Thing"})
    with pytest.raises(ConfigError, match="no dataclass"):
        config.from_json({"type": "t2i_jax.core.config:load"})
    with pytest.raises(ConfigError, match="did you mean 'warmup'"):
        config.from_json({"type": "t2i_jax.training.optimizer:Optimizer", "warmupp": 3})


def test_options_that_may_be_arrays_are_numbers_on_the_command_line():
    options = config.override(ARSampler(), ["--guidance=2", "--top-k", "5", "--greedy"])
    assert options == ARSampler(guidance=2.0, top_k=5, greedy=True)
    assert config.override(ARSampler(greedy=True), ["--greedy", "false"]) == ARSampler()


CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
OF_RUNS = [file for file in CONFIGS if not file.stem.startswith("compare_")]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_every_file_of_configs_builds_what_it_is_run_for(file):
    found = config.load(file)
    assert type(found).__name__ == ("Comparison" if file.stem.startswith("compare_") else "Experiment")


@pytest.mark.parametrize("file", OF_RUNS, ids=lambda f: f.stem)
def test_fields_of_every_config_can_be_given(file):
    """Whatever its parts are: the families of an unCLIP are of a Protocol that is made of others."""
    assert config.load(file, ["--train.steps=7"]).train.steps == 7
