"""A folder of tiny models and real files, and the command called in it: what `test_fuzz.py` tries wrong inputs on."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import itertools
import os
import re
import shutil
import signal
import tarfile
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

import grain
import jax
import numpy as np
from PIL import Image
from safetensors.numpy import save_file
from test_weights import MODEL, random

from t2i_jax import cli
from t2i_jax.bench import measure
from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.convert import find, hints
from t2i_jax.core import config
from t2i_jax.data import TarShards, glyphs, write_records
from t2i_jax.pipeline import Pipeline
from t2i_jax.storage.artifacts import Artifact, save_artifact
from t2i_jax.text.sentencepiece import train_vocabulary
from t2i_jax.training import loop

LIMIT = int(os.environ.get("T2I_FUZZ_SECONDS", "60"))
"""Seconds of computing that one input may take, and a fifth of those by the clock: other work slows down the latter."""

HEAD = """
from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.comparison import Comparison, Variant
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord, Folder
from t2i_jax.models.ar import AR
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.networks.condition import CaptionEncoder, ClassEmbedder
from t2i_jax.networks.dit import DiT
from t2i_jax.noise.processes import Flow
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.text.sentencepiece import SentencePiece
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

train = Train(steps=1, optimizer=Optimizer(warmup=0), save_every=2, log_every=1, evaluate_every=0, preview_every=0)
data = Data(ArrayRecord("{0}/records"), image_size=8, batch_size=4, threads=1, prefetch=1)
one = MeshConfig(1, 1, 1)
diffusion = lambda condition: Diffusion(
    DiT((8, 8), 3, patch=4, width=16, depth=1, heads=2, condition=condition, learn_variance=False),
    Flow(), predicts="velocity", solver="euler", sampling=DiffusionSampler(steps=2, guidance=2.0))
"""
CONFIGS = {
    "classes": "experiment = Experiment(diffusion(ClassEmbedder(3)), data, train, one)",
    "words": 'text = SentencePiece("{0}/words.model", 8)\n'
    "experiment = Experiment(diffusion(CaptionEncoder(300, 8, width=16, depth=1, heads=2)), data, train, one, "
    "text=text)",
    "codec": "experiment = Experiment(VQGAN(AutoencoderConfig(8, (1, 2), blocks=1, latent=4, attention=(), "
    "middle_attention=False, groups=4), QuantizerConfig(codes=16, dim=4), perceptual=0.0, adversarial=0.0), data, "
    "train, one)",
    "codes": "experiment = Experiment(AR(16, (4, 4), width=16, depth=1, heads=2, condition=ClassEmbedder(3), "
    'dropout=0.0), data, train, one, codec="{0}/codec")',
    "pictures": 'text = SentencePiece("{0}/words.model", 8)\nfolder = Data(Folder("odd"), image_size=8, batch_size=4, '
    "threads=1, prefetch=1)\n"
    "experiment = Experiment(diffusion(CaptionEncoder(300, 8, width=16, depth=1, heads=2)), folder, train, one, "
    "text=text)",
    "picture_codes": 'folder = Data(Folder("odd"), image_size=8, batch_size=4, threads=1)\n'
    'experiment = Experiment(AR(16, (4, 4), width=16, depth=1, heads=2), folder, train, one, codec="{0}/codec")',
    "comparison": "experiment = Comparison('Title', 'About.', {{'a': Experiment(diffusion(ClassEmbedder(3)), data, "
    "train, one)}}, Experiment(diffusion(ClassEmbedder(3)), data, train, one), flops=3e6, count=4, batch_size=2)",
}


def leaves() -> dict[tuple[str, ...], Any]:
    """Every command, with the words that choose among its parts: -> the dataclass of its arguments."""
    found: dict[tuple[str, ...], Any] = {}
    for name in cli.COMMANDS:
        module = importlib.import_module(f"t2i_jax.cli.{name}")
        words = [(name, word) for word in module.KINDS] if hasattr(module, "KINDS") else [(name,)]
        for leaf in words:
            found[leaf] = _arguments_of(leaf)
    return found


class _Found(Exception):
    pass


def _arguments_of(leaf: tuple[str, ...]) -> Any:
    def parse(kind: Any, *_: Any, **__: Any) -> Any:
        raise _Found(kind)

    real, config.parse = config.parse, parse
    try:
        importlib.import_module(f"t2i_jax.cli.{leaf[0]}").run([*leaf[1:], "x"])
    except _Found as found:
        return found.args[0]
    finally:
        config.parse = real
    raise AssertionError(f"{leaf}: its arguments were not parsed by `config.parse`")


LEAVES = leaves()

W = "{w}"
"""Stands for the folder of the world in arguments."""
CONFIG = f"{W}/classes.py"
BASE: dict[tuple[str, ...], list[str]] = {
    ("train",): [CONFIG, "--run=run"],
    ("encode",): [f"{W}/codes.py", "--out=codes", "--splits=train", "--batch-size=4"],
    ("sample",): [f"{W}/run", "1", "--out=out", "--mesh=data=1"],
    ("evaluate",): [f"{W}/run", "--out=report", "--count=4", "--batch-size=4", "--spaces=pixels"],
    ("compare",): [f"{W}/comparison.py", "--out=page", "--runs=runs"],
    ("convert",): ["dit", f"{W}/dit.safetensors", "--heads=1", "--out=model"],
    ("release",): [f"{W}/run", "--out=model"],
    ("plan",): [CONFIG, "--topology=h100:1", "--mesh=data=1", "--encoded", "--out=plan.json"],
    ("data", "build"): ["glyphs", "--out=glyphs", "--size=8"],
    ("data", "vocab"): [CONFIG, "--out=words.model", "--size=300"],
    ("data", "index"): [f"{W}/shards"],
    ("bench", "sample"): [f"{W}/codes.py", "--batch=1", "--repeats=1", "--out=bench.json"],
    ("bench", "train"): [CONFIG, "--encoded", "--repeats=1", "--out=bench.json"],
    ("bench", "codec"): [f"{W}/codec.py", "--batch=1", "--repeats=1", "--out=bench.json"],
    ("bench", "data"): [
        "--side=16",
        "--image-size=8",
        "--pictures=4",
        "--records=8",
        "--repeats=1",
        "--chips=h100",
        "--shapes=1M",
        "--out=bench.json",
    ],
    ("bench", "check"): ["--tiny", "--batches=1", "--train-batch=1", "--repeats=1", "--out=bench.json"],
    ("bench", "plan"): [CONFIG, "--encoded", "--repeats=1", "--out=bench.json"],
    ("bench", "solvers"): ["--steps=1", "--std=0.5", "--out=solvers.md"],
}
"""A call of every command that does its work, in little time."""
CONFIGURED = {
    leaf: "codes" if "codes" in base[0] else "codec" if "codec" in base[0] else "classes" for leaf, base in BASE.items()
}
CONFIGURED = {k: v for k, v in CONFIGURED.items() if k[-1] in ("train", "encode", "plan", "vocab", "sample", "codec")}
del CONFIGURED["sample",]
"""Commands that take fields of a config as flags -> the config."""


def flags(leaf: tuple[str, ...]) -> dict[str, Any]:
    """The flags of a command, those of fields of its config, model or format too -> the type of each."""
    found = {f"--{name.replace('_', '-')}": kind for name, kind in get_type_hints(LEAVES[leaf]).items()}
    if leaf in CONFIGURED:
        more = fields(_experiment(CONFIGURED[leaf]))
        # Of data and training nothing is read by a benchmark of the model.
        found |= {k: v for k, v in more.items() if leaf[0] != "bench" or k.startswith("--model.")}
    if leaf in (("sample",), ("evaluate",)):
        found |= fields(_experiment("classes").model.options())
    if leaf == ("convert",):
        found |= {f"--{name.replace('_', '-')}": kind for name, kind in hints.takes(find("dit")).items()}
    return found


@functools.cache
def _experiment(name: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return config.load(write_configs(Path(folder), name)[name])


def fields(value: Any, at: str = "--") -> dict[str, Any]:
    """The fields of a dataclass and of its parts as flags -> their types."""
    found = {}
    for name, kind in get_type_hints(type(value)).items():
        if name in {f.name for f in dataclasses.fields(value)}:
            inner = getattr(value, name)
            flag = f"{at}{name.replace('_', '-')}"
            found |= fields(inner, f"{flag}.") if dataclasses.is_dataclass(inner) else {flag: kind}
    return found


def write_configs(folder: Path, *names: str) -> dict[str, Path]:
    paths = {name: folder / f"{name}.py" for name in names}
    for name, path in paths.items():
        path.write_text((HEAD + CONFIGS[name] + "\n").format(folder))
    return paths


class TooLong(BaseException):
    """An input took longer than `LIMIT`; nothing in the library catches this."""


@dataclasses.dataclass
class Result:
    """What a call of the command came to."""

    argv: list[str]
    status: int
    out: str
    err: str
    fault: str = ""
    """a traceback, or that it took too long"""


class World:
    """The folder, what of it must never change, and the command called in an empty folder beside it."""

    def __init__(self, folder: Path):
        self.folder, self.work, self.made = folder, folder.parent / "work", {}
        self.work.mkdir()
        self._fill()
        self.before = self._state()
        self.result: Any = None

    def _fill(self) -> None:
        w = self.folder
        rng = np.random.default_rng(0)
        rows = [
            {
                "image": rng.integers(0, 256, (8, 8, 3)).astype(np.uint8),
                "captions": [f"a {colour} square {n}"],
                "key": f"k{n}",
                "label": n % 3,
                "split": "train" if n < 8 else "val",
            }
            for n, colour in enumerate(("red", "green", "blue") * 4)
        ]
        write_records(w / "records", rows)
        train_vocabulary([r["captions"][0] for r in rows], w / "words.model", 300)
        write_configs(w, *CONFIGS)
        (w / "pictures").mkdir()
        for n, row in enumerate(rows):
            Image.fromarray(row["image"]).save(w / "pictures" / f"{n}.png")
            (w / "pictures" / f"{n}.txt").write_text(row["captions"][0])
        (w / "shards").mkdir()
        with tarfile.open(w / "shards" / "0.tar", "w") as tar:
            for name in ("0.png", "0.txt", "1.png", "1.txt"):
                tar.add(w / "pictures" / name, name)
        TarShards(str(w / "shards")).open()  # its index is no change of what is there
        Image.fromarray(np.arange(64).reshape(8, 8) < 30).save(w / "mask.png")
        (w / "prompts.txt").write_text("1\n2\n")
        save_file(random("dit", MODEL), w / "dit.safetensors")
        parts = AutoencoderConfig(8, (1, 2), blocks=1, latent=4, attention=(), middle_attention=False, groups=4)
        codec = VQGAN(parts, QuantizerConfig(codes=16, dim=4), perceptual=0.0, adversarial=0.0)
        save_artifact(Artifact(codec, jax.jit(codec.init)(jax.random.key(0))), w / "codec", "# A codec\n")
        for name in ("classes", "words"):
            self._ready("train", f"{W}/{name}.py", f"--run={W}/{'run' if name == 'classes' else name}")
        self._ready("release", f"{W}/run", f"--out={W}/released")
        self._spoil()

    def _ready(self, *argv: str) -> None:
        result = self.call(*argv)
        assert result.status == 0 and not result.fault, f"{result.err}\n{result.fault}"

    def _spoil(self) -> None:
        """Files and folders that are not what they are taken for."""
        w = self.folder
        bad = w / "bad"
        bad.mkdir()
        (bad / "folder").mkdir()
        (bad / "foreign").mkdir()
        for name in ("00000.png", "grid.png", "report.json", "report.md", "samples.png", "index.json", "notes.txt"):
            (bad / "foreign" / name).write_bytes(b"somebody's own work")
        Image.new("RGB", (8, 8), "red").save(bad / "foreign" / "00000.png")
        noise = np.random.default_rng(1).integers(0, 256, 300).astype(np.uint8).tobytes()
        for suffix in ("", ".py", ".json", ".png", ".safetensors", ".pt", ".model", ".md", ".txt"):
            (bad / f"noise{suffix}").write_bytes(noise)
            (bad / f"empty{suffix}").write_bytes(b"")
        (bad / "cut.json").write_text('{"type": "t2i_jax.trai')
        (bad / "list.json").write_text("[]")
        (bad / "deep.json").write_text("[" * 100_000)
        (bad / "odd.json").write_text('{"type": "t2i_jax.training.experiment:Experiment", "model": 3, "data": 4}')
        (bad / "type.json").write_text('{"type": "os:system"}')
        for name, code in {
            "none": "",
            "raises": "1/0",
            "stops": "raise SystemExit",
            "syntax": "experiment = (",
        }.items():
            (bad / f"{name}.py").write_text(code)
        (bad / "number.py").write_text("experiment = 3")
        Image.new("RGB", (8, 8)).save(bad / "picture.png")
        for name in ("white space", "ünïcode ✓", "new\nline", "comma,name", "-dash", "--out=x"):
            shutil.copyfile(w / "classes.py", bad / f"{name}.py")
        (bad / "loop").symlink_to(bad / "loop")
        (bad / "dangling").symlink_to(bad / "nowhere")
        for name, change in {
            "unset": lambda p: (p / "config.json").unlink(),
            "garbled": lambda p: (p / "config.json").write_bytes(noise),
            "cut": lambda p: (p / "config.json").write_bytes((p / "config.json").read_bytes()[:100]),
            "renamed": lambda p: (p / "config.json").write_text((p / "config.json").read_text().replace("DiT", "DoT")),
            "changed": lambda p: (p / "config.json").write_text(
                (p / "config.json").read_text().replace('"width": 16', '"width": 32')
            ),
            "odd": lambda p: (p / "config.json").write_text(
                (p / "config.json").read_text().replace('"width": 16', '"width": "x"')
            ),
            "untrained": lambda p: shutil.rmtree(p / "checkpoints"),
            "spoilt": lambda p: [f.write_bytes(noise) for f in (p / "checkpoints").rglob("*") if f.is_file()],
            "halved": lambda p: [f.unlink() for f in sorted((p / "checkpoints").rglob("*"))[::2] if f.is_file()],
        }.items():
            change(Path(shutil.copytree(w / "run", bad / name)))
        for name in ("model.safetensors", "config.json"):
            copy = Path(shutil.copytree(w / "released", bad / f"released {name}"))
            (copy / name).write_bytes((copy / name).read_bytes()[:50])

    def paths(self) -> list[str]:
        """Whatever a path can be: good files and folders of every kind, bad ones, and what is none."""
        found = [f"{W}/{p.relative_to(self.folder)}" for p in sorted(self.folder.iterdir())]
        found += [f"{W}/bad/{p.name}" for p in sorted((self.folder / "bad").iterdir())]
        found += [f"{W}/{name}" for name in ("nowhere", "nowhere/deeper", "words.model/under", "bad/loop/x", "x" * 300)]
        found += ["", " ", ".", "..", "/", "~", "/dev/null", "a\0b", "caf\udce9", "./", "//", "*", "-", "--", "-1"]
        found += ["gs://bucket/x", "s3://bucket/x", "https://some.where/x", "ftp://x", "file:///x", "C:\\x", "x:y"]
        return [*found, "new/deep/er", "new.md", "new.json", "new.png", "new.safetensors", "x" * 5000, "x/" * 3000]

    def call(self, *argv: str, files: Mapping[str, bytes] = MappingProxyType({})) -> Result:
        """Call the command in a folder that holds these files alone, as from a shell."""
        shutil.rmtree(self.work)
        self.work.mkdir()
        for name, content in files.items():
            path = self.work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        given = [word.replace(W, str(self.folder)) for word in argv]
        out, err = (
            io.TextIOWrapper(io.BytesIO(), "utf-8", errors=errors, write_through=True)
            for errors in ("strict", "backslashreplace")
        )
        status, fault, here = 0, "", os.getcwd()

        def late(*_: Any) -> None:
            raise TooLong

        handled = {s: signal.getsignal(s) for s in (*STOPPING, signal.SIGALRM, signal.SIGPROF)}
        for number in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(number, late)
        signal.alarm(5 * LIMIT)
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        os.chdir(self.work)
        try:
            with self._tiny(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                cli.main(given)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except TooLong:
            fault = f"took longer than {LIMIT} seconds:\n{traceback.format_exc()}"
        except BaseException:
            fault = traceback.format_exc()
        finally:
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            for number, handler in handled.items():
                signal.signal(number, handler)
            os.chdir(here)
        said = [stream.buffer.getvalue().decode("utf-8") for stream in (out, err)]  # pyright: ignore
        return Result(given, status, *said, fault)

    @contextlib.contextmanager
    def _tiny(self):
        """What keeps accepted work small: models that are loaded and compiled once, few steps, small limits.

        Where a run is to take more than two steps, it is stopped in the third as by a signal, with status 143; where
        more than four batches are to be drawn, the fifth is as by Ctrl-C, with status 130.
        """

        def leave(status: int) -> None:
            raise SystemExit(status)

        few = contextlib.nullcontext(lambda step: signal.SIGTERM if step > 2 else 0)
        speeds = lambda dtype="float32", size=0: dict.fromkeys(("flops", "read", "copy"), lambda: 1e9)
        changes: list[tuple[Any, str, Any]] = [(os, "_exit", leave), (loop, "stop_signals", lambda: few)]
        changes += [(importlib.import_module(f"t2i_jax.{m}"), "limits", speeds) for m in LIMITED]
        solvers = importlib.import_module("t2i_jax.bench.solvers")
        changes += [(solvers, name, dict([*getattr(solvers, name).items()][:1])) for name in ("PROCESSES", "KINDS")]
        changes += [(solvers, "SPACINGS", ()), (solvers, "inpainting", list), (solvers, "DRAWN", ("ddpm",))]
        changes += [(importlib.import_module("t2i_jax.comparison.measure"), "SPACES", ("pixels",))]
        changes += [(glyphs, "build_glyphs", functools.partial(glyphs.build_glyphs, limit=6))]
        load, hold, generate, drawn = Pipeline.load, Pipeline.inpaint, Pipeline.generate, itertools.count()

        def loaded(folder: Any, mesh: Any = None, int8: bool = False) -> Any:
            args = (folder,) if mesh is None else (folder, mesh, int8)
            key = (str(folder), mesh, int8)
            if Path(folder) not in (self.folder / "run", self.folder / "words"):
                return load(*args)
            self.made[key] = self.made[key] if key in self.made else load(*args)
            self.made[key].noticed.clear()
            return self.made[key]

        def holding(pipeline: Any, *arguments: Any) -> Any:
            same = hold(pipeline, *arguments)
            key = (id(pipeline), same.family)
            same._compiled = self.made.setdefault(key, (pipeline, same._compiled))[1]
            return same

        def few_batches(pipeline: Any, *arguments: Any, **named: Any) -> Any:
            if next(drawn) == 4:
                raise KeyboardInterrupt
            return generate(pipeline, *arguments, **named)

        changes += [(Pipeline, "generate", few_batches), (grain.IterDataset, "mp_prefetch", lambda same, *_: same)]
        speed = importlib.import_module("t2i_jax.bench.data")
        for name in ("bench_pictures", "bench_codes"):
            changes += [
                (speed, name, lambda *asked, do=getattr(speed, name): do(*asked[:2], *(min(n, 8) for n in asked[2:])))
            ]
        check = importlib.import_module("t2i_jax.bench.check")
        changes += [(check, "kernel_error", lambda *_: 0.0), (check, "FULL", check.TINY)]
        changes += [(importlib.import_module("t2i_jax.core.memory"), "memory", lambda: 2**30)]
        turns = measure.interleaved
        for name in ("drawing", "train", "codec", "sample", "data"):
            module = importlib.import_module(f"t2i_jax.bench.{name}")
            changes += [(module, "interleaved", lambda measures, repeats: turns(measures, min(repeats, 1)))]
        changes += [(Pipeline, "load", staticmethod(loaded)), (Pipeline, "inpaint", holding)]
        old = [(owner, name, owner.__dict__[name]) for owner, name, _ in changes]
        for owner, name, new in changes:
            setattr(owner, name, new)
        try:
            yield
        finally:
            for owner, name, value in old:
                setattr(owner, name, value)

    def _state(self) -> dict[str, tuple[Any, str]]:
        """Every file of the folder: when it was changed, and what it holds."""
        found = {}
        for top, folders, names in os.walk(self.folder):
            for name in (*folders, *names):
                path = Path(top, name)
                about = path.lstat()
                known = getattr(self, "before", {}).get(str(path))
                stamp = (about.st_mtime_ns, about.st_size, about.st_ino, about.st_mode)
                if path.is_symlink() or path.is_dir():
                    found[str(path)] = None, "a folder or a link"
                elif known and known[0] == stamp:
                    found[str(path)] = known
                else:
                    found[str(path)] = stamp, hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def changed(self) -> list[str]:
        """Files of the world that are gone or hold something else; what is new among them is removed."""
        after = self._state()
        for path in sorted(after.keys() - self.before.keys()):
            shutil.rmtree(path, ignore_errors=True) if Path(path).is_dir() else Path(path).unlink(missing_ok=True)
        odd = [p for p, (_, held) in self.before.items() if p not in after or after[p][1] != held]
        self.before = {p: after.get(p, v) for p, v in self.before.items()}
        return odd

    def fault(self, argv: list[str], files: Mapping[str, bytes] = MappingProxyType({})) -> str:
        """What is wrong with how the command takes an input; empty if nothing is. files: what lies in its folder."""
        self.result = result = self.call(*argv, files=files)
        done = not (result.fault or result.status or {"-h", "--help"} & set(result.argv))
        wrong = outputs(self, result) if done else ""
        odd = self.changed()
        if result.fault:
            return result.fault
        if odd:
            return f"status {result.status}, and changed: {', '.join(odd)}"
        if result.status in (130, 143) and argv[0] in ("train", "compare", "sample", "evaluate"):
            return ""
        if result.status == 2:
            return refusal(result)
        if result.status:
            return f"status {result.status}: {result.err}"
        return wrong


STOPPING = (signal.SIGINT, signal.SIGTERM)
LIMITED = [f"bench.{name}" for name in ("drawing", "train", "codec", "sample")] + ["comparison.measure"]


def refusal(result: Result) -> str:
    """What is wrong with what is said where an input is refused."""
    said = " ".join(result.err.split())
    usage = result.out.startswith("usage: t2i")
    count = len(re.findall(r"^t2i [\w ]*: ", result.err, re.MULTILINE))
    if usage and not said:
        return ""
    if count != 1 and not said.startswith("t2i: there is no command"):
        return f"{count} messages: {said[:3000]}"
    if "Traceback" in said:
        return said[:3000]
    if len(said) > 1000:
        return f"{len(said)} characters: {said[:3000]}"
    if len(said.partition(": ")[2]) < 12:
        return f"says nothing: {said}"
    return ""


def outputs(world: World, result: Result) -> str:
    """What is wrong with what an accepted input has made."""
    from fuzzing_outputs import CHECKS

    leaf = next(leaf for leaf in BASE if tuple(result.argv[: len(leaf)]) == leaf)
    here = os.getcwd()
    os.chdir(world.work)
    try:
        CHECKS[leaf](world, result, result.argv[len(leaf) :])
    except Exception:
        return f"what it made is wrong:\n{traceback.format_exc()}\n{result.err}"
    finally:
        os.chdir(here)
    return ""
