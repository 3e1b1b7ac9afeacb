"""`t2i fit`: a folder of pictures to a released model, by the other commands in turn."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from t2i_jax.cli.data import look_into
from t2i_jax.core.config import ConfigError, parse, read_json
from t2i_jax.core.console import console
from t2i_jax.core.fields import Checked, Positive, Range, Size, values
from t2i_jax.core.outputs import check_utf8, local, whole_file, write_json, write_text
from t2i_jax.core.written import config_file
from t2i_jax.fit import recipes
from t2i_jax.fit.measure import measure
from t2i_jax.fit.plan import Condition, FitPlan, Kind, Wishes, make_plan
from t2i_jax.fit.schedule import Clock, codec_length, model_length
from t2i_jax.storage.artifacts import is_stored
from t2i_jax.text.sentencepiece import SentencePiece
from t2i_jax.training.experiment import Experiment, load_experiment

STATE = "fit.json"
PROMPTS = 16
"""Prompts, or images, of the samples at the end."""


@dataclasses.dataclass(frozen=True)
class FitArguments(Checked):
    """Train a model on pictures as they are: look, choose, encode, train, release and draw, by the other commands.

    It prints each command that it runs. After any stop the same command goes on. OUT/model is the released model, and
    OUT/codec.py and OUT/model.py are its configs, which may be edited before the stage that reads them.
    Example: t2i fit photos/ --out runs/photos --size 64 --minutes 60
    """

    data: tyro.conf.Positional[str]
    """a folder of pictures (captions in .txt, .caption, .json, metadata.jsonl or .csv), of tar files or of parquet
    files; such a file or a glob; a data set of `t2i data build` or tfds"""
    out: Path
    """folder of everything that is made"""
    size: Annotated[int | None, Range(8, 4096)] = None
    """side of the images in pixels; 64 unless given, or that of --from"""
    minutes: Positive = 60.0
    """about how long it takes; sizes and steps are chosen for it, from the speed of this machine"""
    family: Kind | None = None
    """next codes, masked codes, diffusion or GAN; chosen unless given"""
    condition: Condition | None = None
    """what images are drawn of; chosen unless given: captions, else classes by folders, else nothing"""
    codec: str = ""
    """run or released codec to take, or the published files of one: FOLDER of a TAESD, or FORMAT:PATH as of t2i
    convert; else one is trained"""
    start: Annotated[str, tyro.conf.arg(name="from")] = ""
    """run or released model whose weights, codec and text encoder the model begins with"""
    steps: Size | None = None
    """steps of codec and model, in place of --minutes"""


class Fit:
    """The folder of a fit, and its stages; each is passed over where it is done."""

    def __init__(self, args: FitArguments):
        self.args, self.folder = args, Path(local(args.out))
        check_utf8(self.folder)
        said = {k: str(v) if isinstance(v, Path) else v for k, v in values(args).items() if k != "out"}
        path = self.folder / STATE
        if path.exists():
            self.state = read_json(path)
            before = self.state.get("arguments")
            before = before if isinstance(before, dict) else {}
            changed = [k for k in said if before.get(k) != said[k]]
            if changed:
                k = changed[0]
                flag = "from" if k == "start" else k
                raise ConfigError(
                    f"{self.folder}: was begun with --{flag} {before.get(k)}, and is given {said[k]}: say the same, or "
                    "choose another --out"
                )
        else:
            if os.path.lexists(self.folder) and not (self.folder.is_dir() and not any(self.folder.iterdir())):
                raise ConfigError(f"{self.folder}: is there, and was not made by this command; choose another --out")
            self.state = {"arguments": said, "seconds": 0.0, "commands": []}
        self.clock = Clock(60 * args.minutes, float(self.state.get("seconds", 0.0)))
        self._plan: FitPlan | None = None

    def at(self, *names: str) -> str:
        return str(self.folder.joinpath(*names))

    def there(self, *names: str) -> bool:
        return self.folder.joinpath(*names).exists()

    def save(self) -> None:
        write_json(self.folder / STATE, self.state | {"seconds": round(self.clock.spent, 1)})

    def say(self, text: str, style: str = "") -> None:
        console.print(text, style=style or None, markup=False, highlight=False, soft_wrap=True)

    def run(self, *words: str, done: bool = False) -> None:
        """Print a command and run it, unless it is done."""
        commands = self.state["commands"]
        line = "t2i " + shlex.join(words)
        if line not in commands:
            commands.append(line)
        if done:
            return
        self.save()
        self.say(f"$ {line}", "bold")
        importlib.import_module(f"t2i_jax.cli.{words[0]}").run(list(words[1:]))
        self.save()

    # -- stages

    def __call__(self) -> None:
        args = self.args
        codec = self.codec_taken()
        if not self.there("model.py") or not self.there("look", "look.json"):
            self.plan = self.choose(codec)
        if self.there("codec.py") or (self._plan is not None and self._plan.trains):
            codec = self.codec_trained()
        self.encoded(codec)
        self.model_trained(codec)
        self.run("release", self.at("runs", "model"), "--out", self.at("model"), done=self.there("model"))
        self.drawn()
        self.card()
        self.save()
        self.say(
            f"{args.out}: done; model/ is the released model, model/README.md its card, samples/grid.png its images"
        )

    @property
    def plan(self) -> FitPlan:
        """What is to be trained; looked for again where a stop was before its configs were written."""
        if self._plan is None:
            self._plan = self.choose(self.codec_taken())
        return self._plan

    @plan.setter
    def plan(self, plan: FitPlan) -> None:
        self._plan = plan

    def codec_taken(self) -> str:
        """The codec that the user has named, converted if it is a published file."""
        named = self.args.codec
        if not named or is_stored(named):
            return named
        name, colon, path = named.partition(":")
        name, path = (name, path) if colon and not os.path.exists(named) else ("taesd", named)
        self.run("convert", name, path, "--out", self.at("codec"), done=self.there("codec"))
        return self.at("codec")

    def choose(self, codec: str) -> FitPlan:
        """Look at the data, and choose."""
        args = self.args
        words = ["data", "look", args.data, "--out", self.at("look")]
        words += ["--condition", "classes"] if args.condition == "classes" else []
        line = "t2i " + shlex.join(words)
        self.say(f"$ {line}", "bold")
        look = look_into(args.data, Path(self.at("look")), captions=args.condition != "classes")
        self.state["commands"] = [line, *(c for c in self.state["commands"] if c != line)]
        plan = make_plan(look, Wishes(args.size, args.family, args.condition, codec, args.start))
        for sentence in plan.why:
            self.say(f"- {sentence}")
        self.save()
        return plan

    def codec_trained(self) -> str:
        """The codec that is trained here: its config, its run, and its release, with the scale of its codes."""
        config = self.at("codec.py")
        if not self.there("codec.py"):
            plan, steps, channels = self.plan, self.args.steps, 32
            if steps is None:
                self.say("measuring the speed of the codec")
                rate = measure(recipes.codec_experiment(plan, 1000))
                steps, channels = codec_length(rate, self.clock, plan)
            experiment = recipes.codec_experiment(plan, steps, channels)
            self.write("codec.py", experiment, "The codec of the images, trained on them: codes that the model draws.")
        self.run("train", config, "--run", self.at("runs", "codec"), done=self.there("codec"))
        scale = ["--scale"] if load_experiment(config).model.capabilities.measures_scale else []
        out = self.at("codec")
        self.run("release", self.at("runs", "codec"), "--out", out, *scale, done=self.there("codec"))
        return out

    def encoded(self, codec: str) -> None:
        """Codes and features of the pictures, computed once."""
        if not self.there("encode.py") and not self.there("model.py"):
            plan = self.plan
            if plan.text == "learned":
                self.vocabulary()
            if not recipes.is_encoded(plan):
                return
            experiment = recipes.model_experiment(plan, recipes.USUAL, 1, codec or plan.codec, "", *self.words())
            about = "What `t2i encode` reads: the pictures, and the codec and the text encoder of the model."
            self.write("encode.py", experiment, about)
        if self.there("encode.py"):
            words = ("encode", self.at("encode.py"), "--out", self.at("codes"), "--splits", "train")
            self.run(*words, done=self.there("codes", "index.json"))

    def vocabulary(self) -> None:
        """The vocabulary of captions, where no text encoder is installed."""
        name = "codec.py" if self.there("codec.py") else "pictures.py"
        if not self.there(name):
            experiment = Experiment(recipes.family_of(self.plan, recipes.USUAL, 1000), recipes.pictures_of(self.plan))
            self.write(name, experiment, "The pictures and captions, for `t2i data vocab`; the model is not trained.")
        texts = self.plan.look.captions
        size = 1000 + len(set("".join(texts))) + (3000 if len(texts) > 20_000 else 0)
        words = ("data", "vocab", self.at(name), "--out", self.at("vocabulary.model"), "--size", str(size))
        self.run(*words, done=self.there("vocabulary.model"))

    def words(self) -> tuple[str, int]:
        """The vocabulary, and how many pieces it has; neither where there is none."""
        if not self.there("vocabulary.model"):
            return "", 0
        file = self.at("vocabulary.model")
        return file, SentencePiece(file, 8).pieces

    def model_trained(self, codec: str) -> None:
        """The model: its config, of the size and length that this machine and the time allow, and its run."""
        if not self.there("model.py"):
            plan, steps, shape = self.plan, self.args.steps, recipes.USUAL
            encoded = self.at("codes") if self.there("codes", "index.json") else ""
            codec = codec or plan.codec
            make = lambda shape, steps: recipes.model_experiment(plan, shape, steps, codec, encoded, *self.words())
            if steps is None:
                self.say("measuring the speed of the model")
                rate = measure(make(shape, 1000))
                steps, shape = model_length(rate, self.clock, plan)
            self.write("model.py", make(shape, steps), "The model, by the choices of `t2i fit`; see look/look.json.")
            self.prompts()
        self.run("train", self.at("model.py"), "--run", self.at("runs", "model"), done=self.there("model"))

    def write(self, name: str, experiment: Experiment, about: str) -> None:
        """Write a config file that builds the experiment."""
        notes = {"train": "The steps were chosen for the time; the learning rate falls to its end with them."}
        notes |= {"data": "The held-out images are those of the training: previews alone are drawn of them."}
        write_text(self.folder / name, config_file(experiment, about, **notes))
        self.save()
        trained = name in ("codec.py", "model.py")
        steps = f", {experiment.train.steps} steps of {experiment.data.batch_size} images" if trained else ""
        self.say(f"{self.at(name)}: {type(experiment.model).__name__}{steps}")

    def prompts(self) -> None:
        """What is drawn at the end: captions of the data, or classes."""
        plan = self.plan
        if plan.condition == "classes":
            lines = [str(n) for n in range(min(plan.classes, PROMPTS))]
        else:
            captioned = [one.captions[0] for one in plan.look.usable if one.captions]
            captions = list(dict.fromkeys(" ".join(caption.split()) for caption in captioned))
            lines = captions[:: max(1, -(-len(captions) // PROMPTS))] if plan.condition == "captions" else []
        write_text(self.folder / "prompts.txt", "".join(line + "\n" for line in lines))

    def drawn(self) -> None:
        """Samples of the released model."""
        given = self.there("prompts.txt") and Path(self.at("prompts.txt")).read_text("utf-8").strip()
        what = ["--prompts", self.at("prompts.txt")] if given else ["", "--count", str(PROMPTS)]
        size = read_json(Path(self.at("model", "config.json"))).get("image_size") or 64
        scale = ["--scale", str(max(1, 256 // int(size)))]
        self.run("sample", self.at("model"), *what, "--out", self.at("samples"), *scale)

    def card(self) -> None:
        """The model card: what the release says, then the samples, the data and the commands."""
        look: Mapping[str, object] = read_json(Path(self.at("look", "look.json")))
        file, mark = Path(self.at("model", "README.md")), "\n## Samples\n"
        head = file.read_text("utf-8").partition(mark)[0]
        with whole_file(file.with_name("samples.png")) as copy:
            copy.write_bytes(Path(self.at("samples", "grid.png")).read_bytes())
        names = look.get("classes")
        classes = "".join(f"\n- {n}: {name}" for n, name in enumerate(names)) if isinstance(names, dict) else ""
        several = "".join(f"\n- {line}" for line in _strings(look.get("about")))
        captions = f"{look.get('captions')} captions ({look.get('different_captions')} different)"
        commands = "\n".join(_strings(self.state.get("commands")))
        drawn = "Drawn by the released model for captions of its training data, or its classes."
        text = f"{mark}\n{drawn}\n\n![samples](samples.png)\n"
        text += f"\n## Data\n\n{look.get('pictures')} pictures, {captions}.\n{several}\n"
        text += f"\nClasses:\n{classes}\n" if classes else ""
        text += f"\n## How it was made\n\n```\n{commands}\n```\n"
        write_text(file, head.rstrip("\n") + "\n" + text)


def _strings(value: object) -> Sequence[str]:
    return [str(one) for one in value] if isinstance(value, list | tuple) else []


def run(arguments: list[str]) -> None:
    Fit(parse(FitArguments, arguments, "t2i fit"))()
