"""From pictures to a released model: what is chosen for which data, and that a stop at any stage loses nothing."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from t2i_jax.cli import fit as command
from t2i_jax.cli import main
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.taesd import TAESD, DecoderLevels, EncoderLevels
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.core import config
from t2i_jax.core.config import ConfigError
from t2i_jax.core.narrow import check_codes
from t2i_jax.core.params import abstract
from t2i_jax.core.written import config_file
from t2i_jax.data import Folder
from t2i_jax.data.look import look
from t2i_jax.fit import plan as planning
from t2i_jax.fit import recipes
from t2i_jax.fit.measure import StepRate
from t2i_jax.fit.plan import Wishes, make_plan
from t2i_jax.fit.schedule import ENOUGH, LEAST_STEPS, Clock, codec_length, model_length
from t2i_jax.pipeline import Pipeline
from t2i_jax.storage.artifacts import Artifact, config_of, load_artifact, save_artifact
from t2i_jax.training.experiment import load_experiment
from t2i_jax.training.trainer import Trainer
from tests.fixtures import odd_pictures
from tests.fixtures.commands import refused

KINDS = ("ar", "masked", "diffusion", "gan")
NEVER = -(10**6)
TAKEN = (("vectors", "diffusion"), ("vectors", "masked"), ("numbers", "ar"), ("numbers", "masked"))


@pytest.fixture(scope="module")
def looks(tmp_path_factory):
    made = {
        "captions": odd_pictures.plain(tmp_path_factory.mktemp("a") / "set"),
        "classes": odd_pictures.classes(tmp_path_factory.mktemp("b")),
        "none": odd_pictures.plain(tmp_path_factory.mktemp("c") / "set", caption=""),
    }
    return {name: look(str(path)) for name, path in made.items()}


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    """Released codecs of vectors and of numbers, of 8 and of 4 pixels a code."""
    folder = tmp_path_factory.mktemp("codecs")
    levels = EncoderLevels((8, 8, 8, 8), (1, 1, 1, 1)), DecoderLevels((8, 8, 8, 8), (1, 1, 1, 1))
    sizes = dataclasses.replace(command.recipes.AutoencoderConfig(16, (1,), blocks=1, latent=8, groups=8), patch=4)
    plain = dataclasses.replace(sizes, attention=(), middle_attention=False)
    made = {"vectors": TAESD(6, *levels), "numbers": VQGAN(plain, QuantizerConfig(codes=20, dim=4), perceptual=0.0)}
    for name, codec in made.items():
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract(codec))
        save_artifact(Artifact(codec, zeros), folder / name, "")
    return {name: str(folder / name) for name in made}


def experiments(plan, codec=""):
    """The experiments of a plan, as they are written."""
    found = [recipes.codec_experiment(plan, 100)] if plan.trains else []
    return [*found, recipes.model_experiment(plan, recipes.SHAPES[0], 100, codec or plan.codec, "", "words", 300)]


@pytest.mark.parametrize("minilm", [True, False])
@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("condition", ["captions", "classes", "none"])
def test_every_family_of_every_condition_is_a_config(family, condition, minilm, looks, tmp_path, monkeypatch):
    """The configs are files that build the same again; the model draws the codes of its codec."""
    monkeypatch.setattr(planning, "has_minilm", lambda: minilm)
    plan = make_plan(looks[condition], Wishes(64, family))
    assert (plan.condition, plan.family) == (condition, family)
    assert plan.text == ("" if condition != "captions" else "minilm" if minilm else "learned")
    for n, experiment in enumerate(experiments(plan)):
        (tmp_path / f"{n}.py").write_text(config_file(experiment, "About this.", train="how long"))
        assert load_experiment(tmp_path / f"{n}.py") == experiment
        abstract(experiment.model)
    codecs = [e.model for e in experiments(plan) if e.model.capabilities.codec]
    model = experiments(plan)[-1].model
    assert np.prod(model.sample_spec().grid) == (plan.size // plan.factor) ** 2
    for codec in codecs:
        check_codes(model, codec, "codec")
    draws_pixels = family == "gan" or (family == "diffusion" and plan.size <= planning.PIXELS)
    assert bool(codecs) != draws_pixels


@pytest.mark.parametrize(("kind", "family"), TAKEN)
def test_a_codec_that_is_there(kind, family, looks, codecs):
    plan = make_plan(looks["captions"], Wishes(32, None if family != "masked" else family, codec=codecs[kind]))
    (experiment,) = experiments(plan)
    assert plan.family == family and experiment.codec == codecs[kind] and not plan.trains
    check_codes(experiment.model, config_of(codecs[kind]), "codec")


def test_from_a_model(looks, codecs, tmp_path):
    """Codec, size and condition are those of the model; the classes are those of the data."""
    zeros = lambda model: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract(model))
    taken = make_plan(looks["classes"], Wishes(32, codec=codecs["numbers"]))
    model = experiments(taken)[-1].model
    save_artifact(Artifact(model, zeros(model), None, codecs["numbers"], 7, 32), tmp_path / "base", "")
    plan = make_plan(looks["classes"], Wishes(start=str(tmp_path / "base")))
    (experiment,) = experiments(plan)
    assert (plan.size, plan.condition, experiment.model) == (32, "classes", model)
    assert experiment.codec == str(tmp_path / "base" / "codec") and experiment.train.start == str(tmp_path / "base")
    for wishes, message in (({"size": 64}, "draws 32"), ({"family": "gan"}, "--family with --from")):
        with pytest.raises(ConfigError, match=message):
            make_plan(looks["classes"], Wishes(start=str(tmp_path / "base"), **wishes))
    with pytest.raises(ConfigError, match="draws by class, and .* has no classes"):
        make_plan(looks["captions"], Wishes(start=str(tmp_path / "base")))


@pytest.mark.parametrize("size", [8, 16, 24, 32, 40, 48, 64, 96, 128, 256, 512])
@pytest.mark.parametrize("family", ["ar", "diffusion"])
def test_sizes(size, family, looks):
    plan = make_plan(looks["none"], Wishes(size, family))
    for experiment in experiments(plan):
        abstract(experiment.model)
    assert 4 <= plan.grid[0] <= 32 or plan.factor == 1


@pytest.mark.parametrize(
    ("data", "wishes", "message"),
    [
        ("none", {"condition": "captions"}, "--condition captions: .* has none; the first: there is no "),
        ("captions", {"condition": "classes"}, "has no classes"),
        ("captions", {"size": 30}, "--size 30: a multiple of 4"),
        ("captions", {"size": 100}, "--size 100: a multiple of 8"),
        ("captions", {"codec": "vectors", "family": "ar"}, "its codes are vectors"),
        ("captions", {"codec": "numbers", "family": "diffusion"}, "its codes are numbers"),
        ("captions", {"codec": "numbers", "family": "gan"}, "draws pixels"),
        ("captions", {"codec": "vectors", "size": 28}, "--size 28: a multiple of 8"),
        ("captions", {"start": "vectors"}, "draws no images"),
    ],
)
def test_what_does_not_go_together(data, wishes, message, looks, codecs):
    wishes = {k: codecs.get(v, v) for k, v in wishes.items()}
    with pytest.raises(ConfigError, match=message):
        make_plan(looks[data], Wishes(**wishes))


def test_what_is_said_of_the_data(tmp_path):
    plan = make_plan(look(str(odd_pictures.odd(tmp_path))), Wishes())
    said = "\n".join(plan.why)
    for words in ("10 of 14 pictures", "4 of 18 cannot be read", "2 pictures are there twice", "by heart", "enlarged"):
        assert words in said
    # The broken ones, and those without a caption, do not stop the training.
    assert plan.pictures.broken_share > 4 / 18 and plan.pictures.empty_captions


def test_steps_fill_the_time(looks, monkeypatch):
    """Stages at the measured speed end in time, whatever the speed, and small data sets end earlier."""
    plan = make_plan(looks["captions"], Wishes(64))
    for minutes, step in itertools.product((5, 20, 60), (0.001, 0.1, 1.0)):
        now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: now)  # noqa: B023
        clock, rate = Clock(60.0 * minutes), StepRate(20.0, step)
        steps, channels = codec_length(rate, clock, plan)
        now += rate.first + steps * step * (0.25 if channels == 16 else 1.0)
        assert now < 0.55 * clock.seconds
        steps, shape = model_length(rate, clock, plan)
        now += 2 * rate.first + steps * step * shape.cost / recipes.USUAL.cost
        assert steps >= LEAST_STEPS and now < clock.seconds
        assert steps > 100 and (step > 0.01 or steps == ENOUGH[plan.family])


def test_larger_models_for_more_pictures_and_time():
    costs = [recipes.choose_shape(steps, 10**6).cost for steps in (100, 1000, 10_000, 100_000, 10**6)]
    assert costs == sorted(costs) and len(set(costs)) > 3
    assert recipes.choose_shape(10**6, 100) == recipes.USUAL


@pytest.mark.parametrize(("pictures", "devices"), [(3, 1), (12, 8), (200, 6), (10**6, 1)])
def test_a_batch_is_divided_by_the_devices(pictures, devices):
    for accelerated in (False, True):
        size = recipes.batch_size(pictures, devices, accelerated)
        assert size % devices == 0 and size >= devices


class Commands:
    """Stands for the commands of a fit: each writes what the next one needs. `stop` is the call that is cut short."""

    def __init__(self, monkeypatch):
        self.calls, self.stop, self.seen = [], NEVER, 0
        for name in ("train", "release", "encode", "sample"):
            monkeypatch.setattr(f"t2i_jax.cli.{name}.run", lambda words, name=name: self(name, words))

    def __call__(self, name, words):
        self.seen += 1
        if self.seen - 1 == self.stop:
            raise KeyboardInterrupt
        out = Path(words[words.index("--run" if name == "train" else "--out") + 1])
        if name == "train":
            load_experiment(Path(words[0]))
        out.mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "README.md", "index.json"):
            (out / file).write_text('{"image_size": 64}' if file == "config.json" else "# card\n")
        Image.new("RGB", (8, 8)).save(out / "grid.png")
        self.calls.append((name, *words))
        if self.seen == -self.stop:  # after its work
            raise KeyboardInterrupt


@pytest.mark.parametrize("family", ["ar", "diffusion", "gan"])
def test_a_stop_at_any_stage_repeats_nothing(family, tmp_path, monkeypatch):
    """Cut short in and after each command in turn, and called again, a fit runs what it runs at once."""
    odd_pictures.plain(tmp_path / "set")
    words = ["--size", "64", "--family", family, "--steps", "7"]
    commands = Commands(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "has_minilm", lambda: True)
    command.run(["set", "--out", "whole", *words])
    whole, count = [[w.replace("whole", "run") for w in call] for call in commands.calls], commands.seen
    assert [call[0] for call in whole][-3:] == ["train", "release", "sample"]
    card = (tmp_path / "whole" / "model" / "README.md").read_text()
    assert all("t2i " + " ".join(call[:2]) in card.replace("'", "") for call in commands.calls)
    for n, stop in enumerate([*range(count), *range(-count, 0)]):
        out = f"run{n}"
        commands.calls, commands.seen, commands.stop = [], 0, stop
        with pytest.raises(KeyboardInterrupt):
            command.run(["set", "--out", out, *words])
        commands.seen, commands.stop = 0, NEVER
        command.run(["set", "--out", out, *words])
        calls = [[w.replace(out, "run") for w in call] for call in commands.calls]
        # A run of `train` that is whole may be called again: it returns at once.
        assert [c for c, _ in itertools.groupby(calls) if c[0] != "sample"] == [c for c in whole if c[0] != "sample"]
        for name in ("model.py", "prompts.txt"):
            texts = [(tmp_path / at / name).read_text().replace(at, "") for at in ("whole", out)]
            assert texts[0] == texts[1]


def test_a_config_may_be_edited_before_its_stage(tmp_path, monkeypatch):
    odd_pictures.plain(tmp_path / "set")
    commands = Commands(monkeypatch)
    monkeypatch.chdir(tmp_path)
    words = ["set", "--out", "run", "--family", "gan", "--condition", "none", "--steps", "7"]
    commands.stop = 0
    with pytest.raises(KeyboardInterrupt):
        command.run(words)
    file = tmp_path / "run" / "model.py"
    file.write_text(file.read_text().replace("steps=7", "steps=9"))
    commands.stop = NEVER
    command.run(words)
    assert load_experiment(file).train.steps == 9


def test_what_is_refused(tmp_path, monkeypatch, capsys):
    Commands(monkeypatch)
    monkeypatch.chdir(tmp_path)
    odd_pictures.plain(tmp_path / "set")
    base = ["fit", "set", "--family", "gan", "--condition", "none", "--steps", "2"]
    assert "there is no such file or folder" in refused(capsys, "fit", "nothing", "--out", "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("mine")
    assert "was not made by this command" in refused(capsys, *base, "--out", "mine")
    main([*base, "--out", "run"])
    assert "was begun with --size None, and is given 32" in refused(capsys, *base, "--out", "run", "--size", "32")
    assert "written to this machine alone" in refused(capsys, *base, "--out", "gs://b/run")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["x"]


def fitted(tmp_path, *words):
    """A real fit; gives its released model."""
    main(["fit", str(tmp_path / "set"), "--out", str(tmp_path / "run"), *words])
    run = tmp_path / "run"
    card = (run / "model" / "README.md").read_text()
    assert "## Samples" in card and f"t2i train {run}/model.py --run {run}/runs/model" in card
    with Image.open(run / "model" / "samples.png") as image:
        image.load()
    return Pipeline.load(run / "model")


@pytest.mark.slow
def test_twelve_pictures_without_captions(tmp_path, capsys):
    odd_pictures.plain(tmp_path / "set", 12, "")
    pipe = fitted(tmp_path, "--size", "8", "--family", "diffusion", "--steps", "2")
    said = " ".join(capsys.readouterr().err.split())
    assert "the model draws without a prompt" in said and "will learn them by heart" in said
    assert pipe("").shape == (1, 8, 8, 3)


@pytest.mark.slow
def test_classes_by_folders(tmp_path, capsys):
    odd_pictures.classes(tmp_path / "set")
    pipe = fitted(tmp_path, "--size", "8", "--family", "diffusion", "--steps", "2")
    assert "by class, of 3" in " ".join(capsys.readouterr().err.split())
    assert pipe([0, 1, 2]).shape == (3, 8, 8, 3)
    assert "- 0: Birds of prey" in (tmp_path / "run" / "model" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("make", ["three_kinds", "hub", "tars", "imagefolder", "odd"])
def test_each_kind_of_data(make, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "has_minilm", lambda: False)
    getattr(odd_pictures, make)(tmp_path / "set")
    pipe = fitted(tmp_path, "--size", "8", "--family", "diffusion", "--steps", "2")
    assert pipe("a picture of 3").shape == (1, 8, 8, 3)


@pytest.mark.slow
def test_from_a_model_the_loss_begins_where_it_ended(tmp_path):
    odd_pictures.classes(tmp_path / "set")
    fitted(tmp_path, "--size", "8", "--family", "diffusion", "--steps", "4")
    first = load_artifact(tmp_path / "run" / "model")
    words = ["--from", str(tmp_path / "run" / "model"), "--steps", "2"]
    main(["fit", str(tmp_path / "set"), "--out", str(tmp_path / "next"), *words])
    experiment = load_experiment(tmp_path / "next" / "model.py")
    assert experiment.model == first.config and experiment.train.start == str(tmp_path / "run" / "model")
    trainer = Trainer(experiment, tmp_path / "x")
    begun = trainer.model(trainer.start(trainer.begin()))
    for a, b in zip(jax.tree.leaves(first.model), jax.tree.leaves(begun), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_kills_at_any_time(tmp_path):
    """Killed again and again, at whatever it does, the same command ends with the model of a whole run."""
    odd_pictures.plain(tmp_path / "set")
    words = ["fit", "set", "--size", "16", "--family", "ar", "--condition", "none", "--steps", "30"]
    start = lambda out: subprocess.Popen(
        [sys.executable, "-m", "t2i_jax.cli", *words, "--out", out], cwd=tmp_path, stderr=subprocess.PIPE
    )
    assert start("whole").wait(600) == 0
    wait, kills = 8.0, 0
    while True:
        process = start("run")
        try:
            assert process.wait(wait) == 0
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills, wait = kills + 1, wait * 1.3
    assert kills
    whole, mine = (config.read_stored(tmp_path / at / "model" / "config.json") for at in ("whole", "run"))
    assert whole["model"] == mine["model"]
    for a, b in zip(
        *(jax.tree.leaves(load_artifact(tmp_path / at / "model").model) for at in ("whole", "run")), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert json.loads((tmp_path / "run" / "fit.json").read_text())["commands"] == [
        line.replace("whole", "run") for line in json.loads((tmp_path / "whole" / "fit.json").read_text())["commands"]
    ]


@pytest.mark.parametrize("path", ['it\'s a "name"', "back\\slash", "line\nbreak", "猫 é", "{0}", "tab\t", "a" * 200])
def test_a_config_file_holds_any_name(path, tmp_path, looks):
    """Strings of any kind, long ones too, are in the file as they are."""
    (experiment,) = experiments(make_plan(looks["none"], Wishes(8, "gan")))
    data = dataclasses.replace(experiment.data, source=Folder(path, (f"folder:{path}", "txt"), (0.5, 1e-7), True))
    odd = dataclasses.replace(experiment, data=data, codec=path)
    (tmp_path / "odd.py").write_text(config_file(odd, f"About {path!r}.", data="a note"), "utf-8")
    assert load_experiment(tmp_path / "odd.py") == odd
