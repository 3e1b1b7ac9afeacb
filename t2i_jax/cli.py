"""The `t2i` command: each of its words reads its arguments and hands them to the room that does the work."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

console = Console(stderr=True)

COMMANDS = {
    "data": "build a data set that ships as packages; train a vocabulary on captions",
    "train": "train or go on with a run (a codec or a model)",
    "encode": "images and captions to codes and features, once",
    "sample": "prompts to pictures",
    "evaluate": "the metrics of a run or a released model",
    "compare": "several models with equal compute, in one report",
    "convert": "a published checkpoint to a released model, and back",
    "release": "a run to a released model: one folder that can travel",
    "plan": "memory, time and collectives of a run, for chips that need not be there",
    "bench": "speeds beside the limits of this machine",
}

USAGE = "usage: t2i COMMAND ...\n\n" + "\n".join(f"  {k:10}{v}" for k, v in COMMANDS.items())
USAGE += "\n\n`t2i COMMAND --help` tells the rest; for example\n  t2i sample runs/quickstart/model 'a red heart'\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. What a user can mend is one clear line and exit status 2; Ctrl-C is 130."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if arguments else 2)
    if arguments[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(arguments[0], COMMANDS, 1, 0.4)
        fail(
            f"t2i: there is no command '{arguments[0]}'" + (f"; did you mean '{near[0]}'?" if near else f"\n\n{USAGE}")
        )
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # its errors reach us as exceptions, and are told as one line

    from t2i_jax.config import ConfigError
    from t2i_jax.data.records import DataError
    from t2i_jax.platform import prepare
    from t2i_jax.training.checkpoints import CheckpointError
    from t2i_jax.training.guard import NotFinite
    from t2i_jax.training.loop import Interrupted
    from t2i_jax.training.watch import STATUS, Lost

    # A write that failed reaches its event loop when that is closed already; what failed is raised elsewhere.
    late = lambda u: "Event loop is closed" in str(u.exc_value) or sys.__unraisablehook__(u)
    sys.unraisablehook = late
    prepare()
    try:
        globals()[arguments[0]](arguments[1:])
    except CheckpointError as error:
        console.print(f"t2i {arguments[0]}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        os._exit(2)  # at an orderly exit the writers that failed would print their tracebacks once more
    except Lost as error:
        console.print(f"t2i {arguments[0]}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        os._exit(STATUS)  # an orderly exit waits for the others
    except (ConfigError, DataError, NotFinite, ImportError, OSError) as error:
        fail(f"t2i {arguments[0]}: {error}")
    except Interrupted as stop:
        console.print(f"t2i {arguments[0]}: {stop}", style="yellow", soft_wrap=True)
        sys.exit(128 + stop.signal)
    except KeyboardInterrupt:
        fail(f"t2i {arguments[0]}: interrupted; the same command goes on", 130)


def fail(message: str, status: int = 2) -> None:
    console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)


def parse(kind: type, arguments: Sequence[str], prog: str) -> Any:
    return tyro.cli(kind, args=list(arguments), prog=prog)


def parse_some(kind: type, arguments: Sequence[str], prog: str) -> tuple[Any, list[str]]:
    """The command's own arguments, and the rest: overrides of fields that only a config or a model knows."""
    return tyro.cli(kind, args=list(arguments), prog=prog, return_unknown_args=True)


# ------------------------------------------------------------------------------------------------------------- data


@dataclasses.dataclass(frozen=True)
class BuildArguments:
    """Build a data set that ships as packages into ArrayRecord files.

    Example: t2i data build glyphs --out data/glyphs --size 32
    """

    name: tyro.conf.Positional[str]
    """the data set; `glyphs` is what there is"""
    out: Path = Path("data/glyphs")
    size: int = 64
    """side of the pictures in pixels"""
    styles: str = "twemoji"
    """`twemoji` (from two Python packages), `all` (ten styles, needs npm), or names joined by commas"""
    skin_tones: bool = False
    """keep the skin-tone variants of people and hands"""
    strict: bool = False
    """refuse a build whose pixels differ from the recorded hash"""


@dataclasses.dataclass(frozen=True)
class VocabArguments:
    """Train a SentencePiece vocabulary on the training captions of a config.

    Example: t2i data vocab configs/quickstart_codec.py --out data/glyphs/vocabulary.model --size 1000
    """

    config: tyro.conf.Positional[Path]
    out: Path
    size: int = 1000
    """pieces; 256 of them are bytes"""
    kind: str = "unigram"
    """`unigram` or `bpe`"""


def data(arguments: list[str]) -> None:
    words = {"build": data_build, "vocab": data_vocab}
    if not arguments or arguments[0] not in words:
        print("usage: t2i data {build,vocab} ...\n\n  build  " + COMMANDS["data"].replace("; ", "\n  vocab  "))
        sys.exit(0 if arguments[:1] in (["-h"], ["--help"]) else 2)
    words[arguments[0]](arguments[1:])


def data_build(arguments: list[str]) -> None:
    args = parse(BuildArguments, arguments, "t2i data build")
    from t2i_jax.config import ConfigError
    from t2i_jax.data.glyphs import build_glyphs
    from t2i_jax.progress import bar

    if args.name != "glyphs":
        raise ConfigError(f"there is no data set '{args.name}'; 'glyphs' is what can be built")
    with bar() as progress:
        task = progress.add_task("drawing")
        told = lambda done, total: progress.update(task, completed=done, total=total)
        settings = {"styles": args.styles, "size": args.size, "skin_tones": args.skin_tones, "strict": args.strict}
        index = build_glyphs(args.out, **settings, progress=told)
    counts = ", ".join(f"{v['count']} {k}" for k, v in index["splits"].items())
    console.print(f"{args.out}: {counts}; who drew them is in CREDITS.md")


def data_vocab(arguments: list[str]) -> None:
    args, rest = parse_some(VocabArguments, arguments, "t2i data vocab")
    from t2i_jax import config
    from t2i_jax.text.sentencepiece import train_vocabulary

    experiment = config.load(args.config, rest)
    captions = [c for record in experiment.data.examples("train") for c in record["captions"]]
    train_vocabulary(captions, args.out, args.size, args.kind)
    console.print(f"{args.out}: vocabulary of {args.size} pieces from {len(captions)} captions")


# ------------------------------------------------------------------------------------------------------------ train


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """Train the model of a config, or go on with the run where it stopped.

    Every field of the config can be set: t2i train CONFIG --help lists them.
    Example: t2i train configs/quickstart.py --run runs/mine --train.steps=500 --train.optimizer.learning-rate=1e-3
    """

    config: tyro.conf.Positional[Path]
    run: Path | None = None
    """run folder; runs/NAME of the config file unless given"""


def train(arguments: list[str]) -> None:
    from t2i_jax import config
    from t2i_jax.previews import Previews
    from t2i_jax.training.experiment import Experiment
    from t2i_jax.training.loop import train as train_run

    if arguments and Path(arguments[0]).exists() and {"-h", "--help"} & set(arguments):
        config.load(arguments[0], ["--help"])
    args, rest = parse_some(TrainArguments, arguments, "t2i train")
    experiment = config.load(args.config, rest)
    if not isinstance(experiment, Experiment):
        raise config.ConfigError(f"{args.config} builds a {type(experiment).__name__}, no Experiment to train")
    run = args.run or Path("runs") / (args.config.parent.name if args.config.suffix == ".json" else args.config.stem)
    train_run(experiment, run, Previews())
    console.print(f"{run}: done; metrics.jsonl, samples/ and checkpoints/ are there", soft_wrap=True)


# ----------------------------------------------------------------------------------------------------------- encode


@dataclasses.dataclass(frozen=True)
class EncodeArguments:
    """Compute the codes (and the features of a frozen text encoder) of a config's data once, and store them.

    Example: t2i encode configs/quickstart.py --out data/glyphs_codes
    """

    config: tyro.conf.Positional[Path]
    out: Path
    splits: tuple[str, ...] = ("train", "val", "test")
    batch_size: int = 128
    block: int = 8192
    """records of a file; work that was cut off goes on behind the last whole one"""


def encode(arguments: list[str]) -> None:
    from t2i_jax import config
    from t2i_jax.encode import encode_splits

    args, rest = parse_some(EncodeArguments, arguments, "t2i encode")
    encode_splits(config.load(args.config, rest), args.out, args.splits, args.batch_size, args.block)


# ----------------------------------------------------------------------------------------------------------- sample


@dataclasses.dataclass(frozen=True)
class SampleArguments:
    """Draw pictures for prompts with a run or a released model. Pictures that are there already are not drawn again.

    The model's sampling options are further flags (--guidance, --temperature, --top-k, ...): t2i sample MODEL --help.
    Example: t2i sample runs/quickstart/model "a red heart" "a smiling cat" --count 4 --guidance 4
    """

    model: tyro.conf.Positional[Path]
    """run folder or released model"""
    text: tyro.conf.Positional[tuple[str, ...]] = ()
    """prompts; class numbers for a class-conditional model"""
    prompts: Path | None = None
    """file with one prompt a line, for bulk"""
    out: Path = Path("samples")
    count: int = 1
    """pictures per prompt, with seeds seed, seed + 1, ..."""
    seed: int = 0
    batch_size: int = 16
    scale: int = 4
    """enlargement of the pictures in the grid"""
    int8: bool = False
    """matrices as whole numbers and scales: a quarter of the memory, nearly the same pictures; not for every family"""
    rerank: str = ""
    """a CLIP (folder or file) that chooses the `count` best of `candidates` pictures per prompt"""
    candidates: int = 16
    """pictures drawn per prompt where `rerank` chooses; they stay in OUT/candidates"""
    image: Path | None = None
    """a picture of which only what `mask` marks is drawn anew; by a Gaussian diffusion without a mask all of it, from a
    start that remembers it: --strength 0.6"""
    mask: Path | None = None
    """a picture of that size, white where to draw"""
    pull_by: Path | None = None
    """run of a classifier or an image-text model of noised pictures, that pulls to the prompt: --pull 3"""
    weak: Path | None = None
    """run of a worse model of the same configuration, to guide away from in the place of the unconditional one"""
    upsample: Path | None = None
    """run folder or released model that makes the pictures larger, by its own sampling options"""
    watch: bool = False
    """let the bar move within a batch, and show in growing.png how pictures came about; is compiled at each start"""


def sample(arguments: list[str]) -> None:
    import jax
    import numpy as np
    from PIL import Image

    from t2i_jax import config
    from t2i_jax.pipeline import Pipeline
    from t2i_jax.previews import sample_to_folder
    from t2i_jax.training.artifacts import load_artifact

    if arguments and Path(arguments[0], "config.json").exists() and {"-h", "--help"} & set(arguments):
        family = config.load(arguments[0]).model
        console.print("[bold]options of this model[/] (those of the command: t2i sample --help)")
        config.override(family.options(), ["--help"], "t2i sample MODEL")
    args, rest = parse_some(SampleArguments, arguments, "t2i sample")
    prompts = list(args.text) + (args.prompts.read_text("utf-8").splitlines() if args.prompts else [])
    if not prompts:
        raise config.ConfigError('no prompt: give some ("a red heart"), or --prompts FILE with one a line')
    pipeline = Pipeline.load(args.model, int8=args.int8)
    options = config.override(pipeline.options, rest, "t2i sample MODEL") if rest else pipeline.options
    if jax.process_count() > 1 and (args.watch or args.rerank):
        raise config.ConfigError("--watch and --rerank work in one process alone")
    if args.weak and np.all(np.asarray(options.guidance) == 1):
        raise config.ConfigError("--weak with guidance 1: nothing guides; add --guidance 2")
    if not args.image and getattr(options, "strength", 1) != 1:
        raise config.ConfigError("--strength without --image: of which picture?")
    if args.mask and not args.image:
        raise config.ConfigError("--mask without --image: where to draw anew, but of which picture?")
    if args.image:
        mask = np.asarray(Image.open(args.mask).convert("L")) > 127 if args.mask else None
        pipeline = pipeline.holding(np.asarray(Image.open(args.image).convert("RGB")), mask)
    if args.pull_by:
        pipeline = pipeline.pulled(load_artifact(args.pull_by), str(args.pull_by))
    if args.weak:
        pipeline = pipeline.beside(load_artifact(args.weak), str(args.weak))
    if args.upsample:
        pipeline = pipeline.enlarged(Pipeline.load(args.upsample), args.upsample.name)
    drawn = max(args.count, args.candidates) if args.rerank else args.count
    jobs = [(prompt, args.seed + n) for prompt in prompts for n in range(drawn)]
    folder = args.out / "candidates" if args.rerank else args.out
    sample_to_folder(pipeline, jobs, options, folder, args.batch_size, drawn, args.scale, args.watch)
    if args.rerank:
        from t2i_jax.evaluation.rerank import Reranker, keep_best
        from t2i_jax.text.clip import ClipEmbedding

        judge = Reranker(ClipEmbedding(args.rerank), batch_size=args.batch_size)
        files = [folder / f"{n:05d}.png" for n in range(len(jobs))]
        keep_best(files, prompts, args.count, args.out, judge, args.scale)
        console.print(f"{args.out}: the best {args.count} of {drawn} for each of {len(prompts)} prompts, by CLIP")


# --------------------------------------------------------------------------------------------------------- evaluate


@dataclasses.dataclass(frozen=True)
class EvaluateArguments:
    """The metrics table of a run or a released model, with pictures; written to report.json, report.md, samples.png.

    A codec is judged by its reconstructions, a model by its pictures for captions and by the likelihood of real ones.
    Example: t2i evaluate runs/quickstart/model --out runs/quickstart --count 200
    """

    model: tyro.conf.Positional[Path]
    out: Path | None = None
    """folder for the report; the model's own unless given"""
    data: str = ""
    """config whose data is the reference; the run's own unless given"""
    count: int = 100
    """pictures per set of prompts: captions of the training concepts in new words, and concepts held out"""
    batch_size: int = 50
    seed: int = 0
    spaces: tuple[str, ...] = ("pixels", "efficientnet_lite0")
    """feature spaces; `inception:FILE` with the weights that pytorch-fid uses"""
    judge: bool = False
    """also train a small judge of picture and caption on the training pairs, and rank by it"""


def evaluate(arguments: list[str]) -> None:
    from t2i_jax import config
    from t2i_jax.evaluation.run import evaluate_folder

    args, rest = parse_some(EvaluateArguments, arguments, "t2i evaluate")
    evaluate_folder(
        args.model,
        args.out or args.model,
        config.load(args.data) if args.data else None,
        count=args.count,
        batch_size=args.batch_size,
        seed=args.seed,
        spaces=args.spaces,
        judge=args.judge,
        options=rest,
    )


@dataclasses.dataclass(frozen=True)
class ReleaseArguments:
    """Write the model of a run as a released model: weights as safetensors, config, tokenizer, codec, model card.

    Example: t2i release runs/quickstart/model --out models/glyphs
    """

    run: tyro.conf.Positional[Path]
    out: Path
    scale: bool = False
    """of a KL autoencoder: measure the scale and shift of its codes on the run's pictures, and release it with them"""


def release(arguments: list[str]) -> None:
    from t2i_jax.pipeline import release as release_run

    args = parse(ReleaseArguments, arguments, "t2i release")
    release_run(args.run, args.out, args.scale)
    console.print(f"{args.out}: released; it can be moved anywhere")


@dataclasses.dataclass(frozen=True)
class ConvertArguments:
    """A published checkpoint (.pt, .pth, .ckpt, .safetensors) to a released model that `t2i sample` takes, and back.

    What the file cannot tell are further flags, as --grid 24 24, and so are fields of the configuration.

    --text names the frozen encoder of captions: t5:FOLDER, clip:PATH (one vector) or clip-tokens:PATH, a folder as
    Hugging Face or open_clip lay it out, or a file with OpenAI's names. Such a file does not tell its activation: those
    that open_clip trained with plain GELU, as most on LAION-2B and DataComp, want clip:FILE,activation=gelu.
    """

    format: tyro.conf.Positional[str]
    weights: tyro.conf.Positional[Path]
    """the published file; with --back a run or a released model"""
    out: Path
    """folder to write; with --back a .safetensors file"""
    codec: Path | None = None
    """run or released codec that makes pictures of the model's codes; it is copied into the folder"""
    text: str = ""
    """frozen text encoder of the model: t5:FOLDER, clip:PATH or clip-tokens:PATH, and its fields behind commas"""
    back: bool = False
    """write a run or a released model as a published file"""


def convert(arguments: list[str]) -> None:
    from t2i_jax.convert import folders

    if not arguments or {"-h", "--help"} & set(arguments):
        print("usage: t2i convert FORMAT WEIGHTS --out DIR [--codec DIR] [--text KIND:FOLDER] [hints]")
        print("       t2i convert FORMAT DIR --back --out FILE.safetensors\n\n" + str(ConvertArguments.__doc__))
        print("formats, each with an example:\n" + folders.help_text())
        sys.exit(0 if arguments else 2)
    args, rest = parse_some(ConvertArguments, arguments, "t2i convert")
    if args.back:
        folders.to_file(args.format, args.weights, args.out)
        console.print(f"{args.out}: written in the names of {args.format}", soft_wrap=True)
        return
    text = folders.text_side(args.text) if args.text else None
    codec = str(args.codec) if args.codec else ""
    artifact = folders.to_folder(args.format, args.weights, args.out, folders.hints(args.format, rest), codec, text)
    needs = hasattr(artifact.config, "sample") and hasattr(artifact.config, "vocabulary") and not codec
    console.print(f"{args.out}: converted" + ("; give --codec to draw pictures with it" * needs), soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------- compare


@dataclasses.dataclass(frozen=True)
class CompareArguments:
    """Train several models with equal compute, draw from each, sweep sampling options, and write one report.

    What was trained or measured before is taken over: the same command goes on.
    Example: t2i compare configs/compare_discrete.py --out docs/results/discrete --count 100
    """

    config: tyro.conf.Positional[Path]
    """a file whose `experiment` is a `t2i_jax.comparison.Comparison`"""
    out: Path
    """OUT.md, OUT.json, OUT.png and a plot for each sweep"""
    runs: Path | None = None
    """where the runs lie; runs/NAME of the config file unless given"""
    count: int | None = None
    flops: float | None = None
    """training compute of each run; the config's own unless given"""


def compare(arguments: list[str]) -> None:
    from t2i_jax import comparison, config

    args = parse(CompareArguments, arguments, "t2i compare")
    wanted = config.load(args.config)
    if not isinstance(wanted, comparison.Comparison):
        raise config.ConfigError(f"{args.config}: `experiment` must be a Comparison, not a {type(wanted).__name__}")
    given = {k: v for k in ("count", "flops") if (v := getattr(args, k)) is not None}
    command = f"t2i compare {' '.join(arguments)}"
    runs = args.runs or Path("runs") / args.config.stem
    comparison.run(dataclasses.replace(wanted, **given), runs, args.out, command)
    console.print(f"{args.out}.md, with its pictures beside it", soft_wrap=True)


# ------------------------------------------------------------------------------------------------------------- plan


@dataclasses.dataclass(frozen=True)
class PlanArguments:
    """What a run will need, before it is paid for: memory, FLOPs, traffic, collectives, time and MFU of every chip.

    For TPUs (v5e, v5p, v6e) the real train step is compiled by the real compiler, on any Linux machine; for GPUs (h100,
    h200, b200) it is counted. Fields of the config can be set as for `train`.
    Example: t2i plan configs/quickstart.py --topology v5e:4x4 --mesh data=4,fsdp=4 --images 1e8
    """

    config: tyro.conf.Positional[Path]
    topology: str
    """CHIP:SHAPE, as v5e:16x16, v5p:4x4x4, h100:64"""
    mesh: str = ""
    """AXIS=SIZE,... of data, fsdp and tensor, -1 for the rest; the config's own unless given"""
    sample: bool = False
    """plan the sampler too, for a batch of `data.batch_size` pictures (TPUs)"""
    sweep: bool = False
    """try meshes, remat policies and batch sizes, and rank what fits"""
    batch_sizes: tuple[int, ...] = ()
    """of the sweep; the config's own, twice and four times it unless given"""
    compiles: int = 3
    """how many of the sweep's best are compiled"""
    twin: bool = False
    """compile models of 2 and 4 layers instead and scale by depth, where the whole would take too long"""
    estimate: bool = False
    """count for TPUs too and compile nothing: seconds in place of minutes"""
    images: float = 1e9
    """pictures to be seen in training"""
    inputs: tuple[str, ...] = ()
    """NAME:DTYPE:SHAPE of what a batch holds of each example, where neither data nor model say it"""
    encoded: bool = False
    """do not look at the data; take codes and features as computed before"""
    out: Path | None = None
    """write the plans as JSON, or as a Markdown table if it ends in .md"""


def plan(arguments: list[str]) -> None:
    import jax

    # The compiler is asked for chips that are not here; what is here stays free for others.
    jax.config.update("jax_platforms", "cpu")
    from t2i_jax import config
    from t2i_jax import plan as plans

    args, rest = parse_some(PlanArguments, arguments, "t2i plan")
    topology = plans.Topology.read(args.topology)
    experiment = config.load(args.config, rest)
    found = plans.run(
        dataclasses.replace(experiment, mesh=plans.read_mesh(args.mesh, experiment.mesh)),
        topology,
        sample=args.sample,
        sweeping=args.sweep,
        batch_sizes=args.batch_sizes,
        compiles=args.compiles,
        shallow=args.twin,
        counted=args.estimate,
        images=args.images,
        inputs=args.inputs,
        encoded=args.encoded,
        told=lambda message: console.print(message, style="dim", soft_wrap=True),
    )
    shown = Console()
    shown = shown if shown.is_terminal else Console(width=140)
    if args.sweep:
        shown.print(plans.ranking(found[:20], f"{args.config} on {topology}, best first"))
    for one in found[:1] if args.sweep else found:
        shown.print(plans.table(one))
    if args.out:
        plans.write(found, args.out)
        console.print(f"{args.out}: {len(found)} plans", soft_wrap=True)


def bench(arguments: list[str]) -> None:
    from t2i_jax.bench import main as run

    run(arguments)


if __name__ == "__main__":
    main()
