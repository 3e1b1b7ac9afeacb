"""`t2i data`: data sets that ship as packages, vocabularies, indexes of tar files and of neighbours."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from rich.table import Table
from rich.text import Text

from t2i_jax.core.config import ConfigError, parse, parse_some
from t2i_jax.core.console import bar, console, stdout
from t2i_jax.core.errors import DataError
from t2i_jax.core.fields import Checked, Range, Size
from t2i_jax.core.image_files import grid, save_png
from t2i_jax.core.outputs import check_free, check_utf8, local, write_json
from t2i_jax.core.sharding import own_mesh
from t2i_jax.data.files import files_of, some
from t2i_jax.data.look import Look
from t2i_jax.data.look import look as look_at_data
from t2i_jax.data.tar import fault_of_tar
from t2i_jax.data.tar_index import TarEntry, index_tars
from t2i_jax.fit.plan import Condition, Wishes, make_plan
from t2i_jax.text.sentencepiece import check_vocabulary_file, train_vocabulary
from t2i_jax.training.experiment import load_experiment

KINDS = {
    "look": "look at pictures before training on them",
    "build": "build a data set that ships as packages",
    "vocab": "train a vocabulary on captions",
    "index": "find the samples of tar files, so that training starts at once",
    "neighbours": "embed the records of a config for models that retrieve, and find the nearest of each",
}
USAGE = f"usage: t2i data {{{','.join(KINDS)}}} ...\n\n" + "\n".join(f"  {k:12}{v}" for k, v in KINDS.items())
USAGE += "\n\nExample: t2i data look photos/ --out looks/photos"


@dataclasses.dataclass(frozen=True)
class BuildArguments(Checked):
    """Build a data set that ships as packages into ArrayRecord files.

    Example: t2i data build glyphs --out data/glyphs --size 32
    """

    name: tyro.conf.Positional[str]
    """the data set; only `glyphs` is known"""
    out: Path = Path("data/glyphs")
    size: Annotated[int, Range(1, 4096)] = 64
    """side of the images in pixels"""
    styles: str = "twemoji"
    """`twemoji` (from two Python packages), `all` (ten styles, needs npm), or names joined by commas"""
    skin_tones: bool = False
    """keep the skin-tone variants of people and hands"""
    strict: bool = False
    """refuse a build whose pixels differ from the recorded hash"""


@dataclasses.dataclass(frozen=True)
class VocabArguments(Checked):
    """Train a SentencePiece vocabulary on the training captions of a config.

    Example: t2i data vocab configs/glyphs_vqgan.py --out data/glyphs/vocabulary.model --size 1000
    """

    config: tyro.conf.Positional[Path]
    out: Path
    size: Size = 1000
    """pieces; 256 of them are bytes"""
    kind: Literal["unigram", "bpe"] = "unigram"


@dataclasses.dataclass(frozen=True)
class IndexArguments(Checked):
    """Find the samples of tar files, so that training starts at once.

    Each tar file has an index of its own, and those that have one already are left out. Several machines may share the
    work: the same command on each.

    Example: t2i data index data/shards 'more/0*.tar' --workers 8
    """

    paths: tyro.conf.Positional[tuple[str, ...]]
    """tar files, folders of them, or globs in quotes"""
    workers: Annotated[int, Range(0, 1024)] = 0
    """processes that scan; 0 is one for each core, at most 16"""


@dataclasses.dataclass(frozen=True)
class NeighboursArguments(Checked):
    """Embed the records of a config for models that retrieve, and find the nearest of each.

    OUT is the database of `text.retrieval.Neighbours` and of `t2i sample --database`. Where it is there already, it is
    read. Interrupted work continues after the last complete file.
    Example: t2i data neighbours configs/rarm.py --out data/glyphs_neighbours --count 5
    """

    config: tyro.conf.Positional[Path]
    out: Path
    """folder of the index"""
    split: str = "train"
    encoder: str = ""
    """by what: efficientnet_lite0, pixels, minilm, clip:FOLDER or another text side as of `t2i convert --text`; that of
    the config's text unless given"""
    of: Literal["images", "captions"] = "images"
    count: Annotated[int, Range(0, 10_000)] = 0
    """neighbours of each record to write, without itself, and to show in OUT/neighbours.png; 0: none"""
    pairs: bool = False
    """also write the images and a caption of each record, for models that read both: OUT/pairs-*.safetensors"""
    images: Path | None = None
    """a folder of images, as of `t2i sample`: their nearest records, `count` or else 5, in OUT/nearest-FOLDER.png and
    .json"""
    search: Literal["exact", "faiss", "usearch"] = "exact"
    """how neighbours are found: exactly, on all devices, or by a graph of a package that you have, whose share of the
    true neighbours is then said"""
    rows: Annotated[int, Range(1, 1000)] = 8
    """records in OUT/neighbours.png"""
    batch_size: Size = 128
    block: Size = 8192
    """records of a file"""


@dataclasses.dataclass(frozen=True)
class LookArguments(Checked):
    """Look at pictures: counts, sizes, captions, broken files, duplicates, and what `t2i fit` would make of them.

    Writes look.json and contact.png into OUT. Example: t2i data look photos/ --out looks/photos
    """

    data: tyro.conf.Positional[str]
    """a folder of pictures, of tar files or of parquet files; such a file or a glob; a data set of `t2i data build` or
    tfds"""
    out: Path = Path("look")
    most: Size = 20_000
    """pictures that are looked at, evenly spaced, where there are more"""
    size: Annotated[int | None, Range(8, 4096)] = None
    """side of the images that `t2i fit` would draw, 64 unless given"""
    condition: Condition | None = None
    """what they would be drawn of, as of `t2i fit`"""


def run(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in KINDS:
        print(USAGE)
        sys.exit(0 if arguments[:1] in (["-h"], ["--help"]) else 2)
    commands = {"look": look, "build": build, "vocab": vocab, "index": index, "neighbours": neighbours}
    commands[arguments[0]](arguments[1:])


def build(arguments: list[str]) -> None:
    args = parse(BuildArguments, arguments, "t2i data build")

    if args.name != "glyphs":
        raise ConfigError(f"there is no data set '{args.name}'; 'glyphs' is what can be built")
    from t2i_jax.data.glyphs import build_glyphs, tfds  # half a second, which the other commands save

    tfds.disable_progress_bar()
    # tfds prints the name of a folder that is temporary
    with bar() as progress, contextlib.redirect_stdout(io.StringIO()):
        task = progress.add_task("drawing")
        on_progress = lambda done, total: progress.update(task, completed=done, total=total)
        settings = {"styles": args.styles, "size": args.size, "skin_tones": args.skin_tones, "strict": args.strict}
        index = build_glyphs(local(args.out), **settings, progress=on_progress)
    counts = ", ".join(f"{v['count']} {k}" for k, v in index["splits"].items())
    console.print(f"{args.out}: {counts}; their authors are in CREDITS.md")


def vocab(arguments: list[str]) -> None:
    args, rest = parse_some(VocabArguments, arguments, "t2i data vocab")

    check_vocabulary_file(local(args.out))
    experiment = load_experiment(args.config, rest)
    data = dataclasses.replace(experiment.data, fields=())  # images are not decoded
    examples = data.examples("train", captions=True)
    captions = [c for record in examples for c in record["captions"]]
    if summary := examples.summary():
        console.print(f"{args.config}: {summary}", style="yellow", soft_wrap=True, highlight=False)
    size = train_vocabulary(captions, args.out, args.size, args.kind)
    few = f", as the captions do not give {args.size}" if size < args.size else ""
    console.print(
        f"{args.out}: vocabulary of {size} pieces{few}, from {len(captions)} captions", soft_wrap=True, highlight=False
    )


def index(arguments: list[str]) -> None:
    args = parse(IndexArguments, arguments, "t2i data index")
    if not args.paths:
        raise ConfigError("name tar files, folders of them or globs")
    shards = list(dict.fromkeys(file for path in args.paths for file in files_of(path, ".tar")))
    broken: list[str] = []
    began = time.monotonic()
    with bar() as progress:
        task = progress.add_task("indexing", total=len(shards))

        def seen(tar: Path, entry: TarEntry | Exception) -> None:
            progress.update(task, advance=1)
            if isinstance(entry, Exception):
                broken.append(str(entry) if str(tar) in str(entry) else f"{tar}: {entry}")
            elif not entry.whole:
                broken.append(fault_of_tar(entry))

        entries = index_tars(shards, args.workers, seen)
    seconds = time.monotonic() - began
    for fault in sorted(broken):
        console.print(fault, style="yellow", markup=False, highlight=False, soft_wrap=True)
    samples = sum(entry.samples for entry in entries.values())
    size = sum(os.path.getsize(entry.file) if entry.file else len(entry.data) for entry in entries.values())
    each = f", {size / samples:.1f} bytes a sample" if samples else ""
    text = f"{len(shards)} tar files, {samples} samples, {seconds:.2f} s{each}"
    console.print(text, highlight=False, soft_wrap=True)
    if broken:
        raise DataError(f"{len(broken)} of {len(shards)} tar files are broken; they are named above")


def neighbours(arguments: list[str]) -> None:
    args, rest = parse_some(NeighboursArguments, arguments, "t2i data neighbours")
    from t2i_jax.evaluation import neighbours as made  # half a second, which the other commands save
    from t2i_jax.evaluation.embedders import load_embedder

    out, experiment = local(args.out), load_experiment(args.config, rest)
    if args.images and not args.images.is_dir():
        raise ConfigError(f"--images {args.images}: is no folder")
    embedder = load_embedder(args.encoder, experiment.text, args.of, own_mesh(experiment.mesh), args.batch_size)
    index = made.build_index(experiment, embedder, out, args.split, args.block)
    console.print(made.facts_line(index, out), soft_wrap=True, highlight=False)
    if jax.process_index() > 0 or not (args.count or args.images or args.pairs):
        return
    if args.pairs:
        made.write_pairs(index, experiment.data, args.split, out)
        console.print(f"{out}: images and captions of its records, too", soft_wrap=True, highlight=False)
    if not (args.count or args.images):
        return
    find = made.searcher(index, experiment, args.search)
    if args.search != "exact":
        share = made.recall(index, made.searcher(index, experiment), find, min(args.count or 5, len(index.rows)))
        console.print(f"{args.search} finds {share:.1%} of the true neighbours", highlight=False)
    if args.count:
        made.write_neighbours(index, out, find, args.count, args.search)
        made.sheet_of_records(index, experiment.data, args.split, out, args.count, args.rows)
        console.print(f"{out}: {args.count} neighbours of each; see neighbours.png", soft_wrap=True, highlight=False)
    if args.images:
        some = min(args.count or 5, len(index.rows))
        cosines, _ = made.neighbours_of_images(index, experiment, args.split, embedder, find, args.images, out, some)
        text = f"{args.images}: {len(cosines)} images; see nearest-{args.images.absolute().name}.png in {out}"
        console.print(text, soft_wrap=True, highlight=False)


def look(arguments: list[str]) -> None:
    args = parse(LookArguments, arguments, "t2i data look")
    found = look_into(args.data, Path(local(args.out)), args.most, args.condition != "classes")
    plan = make_plan(found, Wishes(args.size, condition=args.condition))
    console.print("what `t2i fit` would do:", highlight=False)
    for sentence in plan.why:
        console.print(f"- {sentence}", markup=False, highlight=False, soft_wrap=True)


def look_into(data: str, out: Path, most: int = 20_000, captions: bool = True) -> Look:
    """Look at a data set, print what was seen, and write it to `out`: look.json and contact.png. captions: as of
    `find_source`."""
    files = out / "look.json", out / "contact.png"
    check_utf8(out)
    check_free(*files)
    with bar() as progress:
        task = progress.add_task("looking")
        update = lambda done, total: progress.update(task, completed=done, total=total)
        seen = look_at_data(data, most, update, captions)
    pictures, titles = seen.sheet()
    save_png(grid(pictures, titles, scale=1), files[1])
    write_json(files[0], seen.report())
    screen = stdout()
    for table in tables_of(seen):
        screen.print(table)
    screen.print(f"{files[0]}, {files[1]}", highlight=False, soft_wrap=True)
    return seen


NAMED = 8
"""Records of each kind that are named on the screen; all are in look.json."""


def tables_of(seen: Look) -> list[Table]:
    """What was seen, as tables for a screen."""
    report = seen.report()
    rows = [(line, "") for line in seen.about]
    of = "" if seen.records == len(seen.seen) else f", of which {len(seen.seen)} are looked at"
    rows += [("records", f"{seen.records}{of}"), ("pictures", str(len(seen.usable)))]
    if words := seen.words():
        rows += [("captions", f"{len(seen.captions)}, {report['different_captions']} different")]
        rows += [("words of a caption", ", ".join(f"{name} {count}" for name, count in words.items()))]
    if seen.classes:
        rows += [("classes", f"{len(seen.classes)}: {some(seen.classes)}")]
    for name, found in (("broken", seen.broken), ("without a caption", seen.uncaptioned)):
        rows += [(name, str(len(found)))] if found and (name == "broken" or seen.captions) else []
        shown = found[:NAMED] if name == "broken" or seen.captions else []
        rows += [(f"  {one.key}", one.fault or one.uncaptioned) for one in shown]
    for name, groups in (("the same file", seen.duplicates()), ("nearly the same picture", seen.near())):
        rows += [(name, f"{len(groups)} groups")] if groups else []
        rows += [("", some(group)) for group in groups[:NAMED]]
    rows += [("not read", note) for note in seen.notes]
    facts = Table(show_header=False, box=None)
    facts.add_column(overflow="fold")
    facts.add_column(overflow="fold")
    for row in rows:
        facts.add_row(*map(Text, row))
    counts = Table(title=Text(f"{seen.data}: sizes and shapes", overflow="fold"))
    for name in ("short side, shape or size", "pictures", ""):
        counts.add_column(name)
    parts = (seen.short_sides(), seen.shapes(), seen.sizes(6))
    most = max(max(part.values()) for part in parts)
    for n, part in enumerate(parts):
        for name, count in part.items():
            counts.add_row(name, str(count), "#" * round(40 * count / most), end_section=False)
        if n < len(parts) - 1:
            counts.add_section()
    return [counts, facts]
