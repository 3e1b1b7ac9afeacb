"""The metrics of a model in a folder: what `t2i evaluate` does."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Hashable, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from t2i_jax.codecs import losses
from t2i_jax.core import config, image_files
from t2i_jax.core.config import ConfigError
from t2i_jax.core.console import bar, console, stdout
from t2i_jax.core.frozen import with_features
from t2i_jax.core.image_files import to_uint8
from t2i_jax.core.narrow import (
    any_size,
    as_codec,
    classifier_guided,
    embeds_images,
    likelihood,
    uses_frozen_networks,
)
from t2i_jax.core.outputs import check_free
from t2i_jax.core.sharding import MeshConfig, to_host
from t2i_jax.core.types import Family, SamplingOptions
from t2i_jax.data.found import find_source
from t2i_jax.data.pipeline import Data
from t2i_jax.data.records import DataError, Record, title
from t2i_jax.edits import Vary
from t2i_jax.evaluation.alignment import retrieve
from t2i_jax.evaluation.features import Space, batches, images_of, in_batches, space_of
from t2i_jax.evaluation.matching import Matching
from t2i_jax.evaluation.metrics import NEIGHBOURS, distinct
from t2i_jax.evaluation.report import Number, Report, aligned, evaluate_images, evaluate_reconstruction
from t2i_jax.pipeline import Pipeline
from t2i_jax.sampler import condition_of
from t2i_jax.sampling.options import plain_options
from t2i_jax.storage.artifacts import Artifact, load_artifact, open_artifact
from t2i_jax.training.experiment import Experiment, load_experiment


def evaluate_folder(
    folder: Path,
    out: Path,
    reference: Data | None = None,
    *,
    count: int = 100,
    batch_size: int = 50,
    seed: int = 0,
    spaces: Sequence[str] = ("pixels", "efficientnet_lite0"),
    judge: bool = False,
    matching: str = "",
    noises: int = 0,
    solver: str = "",
    size: tuple[int, int] | None = None,
    mesh: MeshConfig | None = None,
    options: Sequence[str] = (),
) -> Report:
    """Measure the codec or the model in `folder` against real images; write a report and a grid to `out`.

    reference: data with images; the run's own unless given. matching: run or released DAMSM or
    CLIP, or a published CLIP, for R-precision. noises: images of each of some prompts, whose variety is measured, and
    shown in `noises.png`; 0: none.
    solver: another than that of the family. size: width and height of images, for a family of any size; pictures are
    cut to it. mesh: for the model; that of the run whose own data are read, else one of data alone, unless given.
    Errors: `ConfigError` where there are no images to compare with.
    """
    check_free(*(out / name for name in ("report.json", "report.md", "samples.png")))
    check_free(*([out / "noises.png"] if noises else []))
    kind = open_artifact(folder).artifact.config
    batch_size = min(batch_size, count)
    own_mesh = MeshConfig()
    if reference is None:
        stored = config.read_stored(folder / "config.json") if (folder / "config.json").exists() else None
        if not isinstance(stored, Experiment):
            raise ConfigError(
                f"{folder}: only a run on this machine has data of its own; "
                "name images to compare with: --data CONFIG or a data set"
            )
        reference, own_mesh = stored.data, stored.mesh
    with config.refused("--spaces"):
        loaded = [space_of(name).load() for name in spaces]
    with config.refused("--matching"):
        matcher = Matching.load(matching, batch_size) if matching else None
    cut_to = reference.with_shapes
    if size and not kind.capabilities.any_size:
        with config.refused(f"size {size[0]}x{size[1]}"):
            any_size(kind)
    if kind.capabilities.codec:
        report = evaluate_codec(load_artifact(folder, host=True), cut_to(), out, loaded, count, batch_size)
    elif kind.capabilities.image_text:
        heading = f"{type(kind).__name__}: captions of images"
        report = evaluate_matching(Matching.load(folder, batch_size), cut_to(), out, count, heading)
    else:
        pipeline = Pipeline.load(folder, mesh or own_mesh)
        pipeline = pipeline.replace(solver=solver) if solver else pipeline
        pipeline = pipeline.sized(*size) if size else pipeline
        if size or reference.shapes:
            reference = cut_to(pipeline.image_shape)
        chosen = config.override(pipeline.options, options, "t2i evaluate MODEL") if options else pipeline.options
        report = evaluate_family(
            pipeline, reference, out, loaded, count, batch_size, seed, chosen, judge, matcher, noises
        )
    report.save(out / "report.json")
    stdout().print(report.table())
    stdout().print(f"{out / 'report.json'}, {out / 'report.md'}, {out / 'samples.png'}")
    return report


def reference_data(name: str, model: Path) -> Data:
    """The data of a config or of a run, or a data set itself, as a folder of pictures, at the image size of `model`.

    Errors: `ConfigError`, `DataError`.
    """
    if Path(name).suffix in (".py", ".json") or (Path(name) / "config.json").is_file():
        return load_experiment(name).data
    data = Data(find_source(name).source)
    return dataclasses.replace(data, image_size=open_artifact(model).artifact.image_size or data.image_size)


def records_of(data: Data, split: str, most: int, captions: bool = False) -> list[Record]:
    """Evenly spaced records of a split, with images; none where there is no such split. captions: with captions too.

    Unusable records are replaced by the next usable ones, named and counted. Errors: `ConfigError` for data
    without images, `DataError` where too many records are broken.
    """
    try:
        examples = data.examples(split, captions)
    except DataError:
        return []
    records = examples.spaced(most)
    if summary := examples.summary():
        console.print(f"{split}: {summary}", style="yellow", soft_wrap=True, highlight=False)
    if any("image" not in record for record in records):
        raise ConfigError("the data has codes and no images: name images to compare with: --data CONFIG or a data set")
    return records


def reads_classes(family: Family) -> bool:
    """Whether the condition of a family is a class."""
    return "label" in family.condition_spec()


def evaluate_codec(
    artifact: Artifact,
    reference: Data,
    out: Path,
    spaces: Sequence[Space],
    count: int,
    size: int,
) -> Report:
    """Reconstruction of held-out images, and how much of the codebook they use."""
    codec, model = as_codec(artifact.config), jax.device_put(artifact.model, jax.local_devices()[0])
    records = records_of(reference, "test", count) or records_of(reference, "val", count)
    if not records:
        raise ConfigError("the data has neither a 'test' nor a 'val' split to reconstruct: see held_out of the data")
    real = images_of(records)
    signed = lambda x: x.astype(np.float32) / 127.5 - 1
    encode, decode = jax.jit(codec.encode), jax.jit(lambda m, c: to_uint8(codec.decode(m, c)))
    codes = in_batches(lambda x: encode(model, signed(x)), real, size, "encoding")
    made = in_batches(lambda c: decode(model, c), codes, size, "decoding")
    perceptual = None
    if codec.capabilities.frozen_networks:
        trunk = uses_frozen_networks(codec).frozen()
        step = jax.jit(losses.perceptual)
        perceptual = lambda a, b: step(trunk, a, b)
    numbers = evaluate_reconstruction(real, made, perceptual, spaces)
    if codec.spec.code.is_discrete:
        rows = codec.spec.code.values
        share = np.bincount(codes.reshape(-1), minlength=rows) / codes.size
        entropy = -sum(p * math.log(p) for p in share[share > 0])
        measured = {"used": float((share > 0).mean()), "perplexity": math.exp(entropy)}
        numbers |= {f"codebook/{k}": Number(v, "higher", {"codes": float(rows)}) for k, v in measured.items()}
    captions = [title(r) for r in records]
    sheet = image_files.side_by_side(real[:32], made[:32], captions[:32], names=("real", "codec"))
    image_files.save_png(sheet, out / "samples.png")
    return Report(f"{type(codec).__name__}: reconstruction", numbers, {"images": len(real), "step": artifact.step})


def evaluate_matching(matching: Matching, reference: Data, out: Path, count: int, heading: str) -> Report:
    """How well a model of images and captions finds them: R-precision, retrieval both ways and zero-shot
    classification, in sets: new words of concepts that it was trained on, held-out concepts, and where the data has
    them held-out pairs of known concepts and styles."""
    train = records_of(reference, "train", 2000, captions=True)
    sets = {"new words": train[:: -(-len(train) // count)], **held_out_sets(reference, count, captions=True)}
    sets = {name: records for name, records in sets.items() if records}
    numbers: dict[str, Number] = {}
    sheets = []
    for name, records in sets.items():
        real, captions = images_of(records), [wording(r) for r in records]
        others = [title(r) for r in train]
        found = matching.evaluate(real, None, captions, classes_of(records), others, classes_of(train))
        found |= matching.retrieval(real, captions) | matching.zero_shot(real, [name_of(r) for r in records])
        numbers |= {f"{name}/{k}": v for k, v in found.items()}
        sheets.append(image_files.grid(real[:32], captions[:32]))
    image_files.save_png(stacked(sheets), out / "samples.png")
    return Report(heading, numbers, {"images": {name: len(some) for name, some in sets.items()}})


def held_out_sets(reference: Data, count: int, captions: bool) -> dict[str, list[Record]]:
    """Held-out records by what is new in them; empty where the data has none."""
    splits = {"new concepts": "test", "new combinations": "test_combo"}
    return {name: records_of(reference, split, count, captions) for name, split in splits.items()}


def name_of(record: Record) -> str:
    """The name of a record's class, or its first caption."""
    return record.get("label_text") or title(record)


def classes_of(records: Sequence[Record]) -> list[Hashable]:
    """The class of each record's caption: the label, or the first caption of a record without one."""
    return [int(r["label"]) if "label" in r else title(r) for r in records]


def prompts_of(records: Sequence[Record], family: Family) -> list[str]:
    """The prompt of a record: the class number where it reads those, else `wording`. Errors: `ConfigError` for classes
    without labels."""
    if reads_classes(family):
        if any("label" not in r for r in records):
            raise ConfigError("prompts of this model are class numbers, and the data has none: no record has a 'label'")
        return [str(int(r["label"])) for r in records]
    return [wording(r) for r in records]


def wording(record: Record) -> str:
    """A wording that no training caption has, where the data set keeps one, else the first caption."""
    return record.get("unseen_caption") or title(record)


def evaluate_family(
    pipeline: Pipeline,
    reference: Data,
    out: Path,
    spaces: Sequence[Space],
    count: int,
    size: int,
    seed: int,
    options: SamplingOptions,
    judge: bool,
    matching: Matching | None = None,
    noises: int = 0,
) -> Report:
    """Images for captions that were never trained on, in sets: known concepts in new words, held-out concepts, and
    where the data has them held-out pairs of known concepts and styles; or for the classes of training images."""
    captions = not reads_classes(pipeline.family) and bool(pipeline.family.condition_spec())
    compared = judge or matching is not None
    train = records_of(reference, "train", 2000, compared)
    known = records_of(reference, "train", count, captions or compared)
    every = {"new words": known, **held_out_sets(reference, count, captions or compared)}
    every = {"known classes": known} if reads_classes(pipeline.family) else every
    sets = {name: records for name, records in every.items() if records}
    for name, records in {"training images": train, **sets}.items():
        if len(records) <= NEIGHBOURS:
            raise ConfigError(
                f"{name}: {len(records)} can be used, and what is measured needs at least {NEIGHBOURS + 1}; "
                "see --count and the data"
            )
    numbers: dict[str, Number] = {}
    sheets, drawn, seconds = [], 0, 0.0
    critic = None
    if judge:
        from t2i_jax.evaluation.judge import RetrievalJudge, minilm_texts

        critic = RetrievalJudge.train(spaces[-1], minilm_texts(), images_of(train), [r["captions"][0] for r in train])
    for name, records in sets.items():
        prompts, real = prompts_of(records, pipeline.family), images_of(records)
        seeds = range(seed, seed + len(prompts))
        with bar() as progress:
            task = progress.add_task(f"sampling: {name}", total=len(prompts))
            began = time.perf_counter()
            on_progress = lambda done, _, task=task, progress=progress: progress.update(task, completed=done)
            made = pipeline.sample(prompts, seeds, options, size, on_progress)
            seconds, drawn = seconds + time.perf_counter() - began, drawn + len(prompts)
        found = evaluate_images(made, real, prompts, images_of(train), spaces)
        found |= critic.evaluate(made, prompts, real) if critic else {}
        if matching is not None:
            wanted = [title(r) for r in records] if reads_classes(pipeline.family) else prompts
            others = [title(r) for r in train]
            found |= matching.evaluate(made, real, wanted, classes_of(records), others, classes_of(train))
        texts = prompts if reads_classes(pipeline.family) else [title(r) for r in records]
        found |= bits_per_token(pipeline, records, texts, size)
        numbers |= {f"{name}/{k}": v for k, v in found.items()}
        sheets.append(image_files.side_by_side(real[:32], made[:32], prompts[:32], columns=8, title=name))
        if pipeline.family.capabilities.image_embedding and embeds_images(pipeline.text):
            varied, like = f"variations of images of {name}", variations(pipeline, real, seeds, options)
            numbers |= {f"{varied}/{k}": v for k, v in retrieved(like, real, spaces).items()}
            sheets.append(image_files.side_by_side(real[:32], like[:32], prompts[:32], columns=8, title=varied))
    if noises:
        numbers |= variety(pipeline, next(iter(sets.values())), images_of(train), spaces, noises, size, options, out)
    image_files.save_png(stacked(sheets), out / "samples.png")
    family = pipeline.family
    facts = {
        "step": pipeline.step,
        "parameters": sum(x.size for x in jax.tree.leaves(pipeline.model)),
        "images": {name: len(records) for name, records in sets.items()},
        "options": plain_options(options),
        **({"solver": classifier_guided(family).solver} if family.capabilities.classifier_guidance else {}),
        "images per second": round(drawn / seconds, 2),
        "device": jax.devices()[0].device_kind,
    }
    return Report(f"{type(pipeline.family).__name__}: images for captions", numbers, facts)


def variations(pipeline: Pipeline, images: np.ndarray, seeds: Sequence[int], options: SamplingOptions) -> np.ndarray:
    """An image like each given one, uint8 (n, i, j, 3), without a prompt."""
    made = []
    with bar() as progress:
        for image, seed in progress.track(list(zip(images, seeds, strict=True)), description="variations"):
            made.append(pipeline.sampler(options, like=Vary(image)).sample([""], [seed]))
    return np.concatenate(made)


def retrieved(made: np.ndarray, real: np.ndarray, spaces: Sequence[Space]) -> dict[str, Number]:
    """How often each image finds the real one that it was made of among all, in every space: `SPACE/top1`, ..."""
    found = {space.name: aligned(retrieve(space(made), space(real))) for space in spaces}
    return {f"{space}/{k}": number for space, numbers in found.items() for k, number in numbers.items()}


def variety(
    pipeline: Pipeline,
    records: Sequence[Record],
    real: np.ndarray,
    spaces: Sequence[Space],
    noises: int,
    size: int,
    options: SamplingOptions,
    out: Path,
    asked: int = 8,
) -> dict[str, Number]:
    """`noises/SPACE/distinct`: how many of a prompt's images differ, the mean over `asked` prompts; a generator that
    ignores its noise has 1, as many real images of all prompts are the baseline. The first of them are in
    `noises.png`."""
    chosen = [records[int(i)] for i in np.linspace(0, len(records) - 1, min(asked, len(records))).round()]
    prompts = prompts_of(chosen, pipeline.family)
    several = [prompt for prompt in prompts for _ in range(noises)]
    with bar() as progress:
        task = progress.add_task("sampling: noises", total=len(several))
        on_progress = lambda done, _: progress.update(task, completed=done)
        made = pipeline.sample(several, range(len(several)), options, size, on_progress)
    each = made.reshape(len(prompts), noises, *made.shape[1:])
    shown = min(noises, 10)
    titles = [prompt if n == 0 else "" for prompt in prompts for n in range(shown)]
    image_files.save_png(
        image_files.grid(each[:, :shown].reshape(-1, *made.shape[1:]), titles, columns=shown), out / "noises.png"
    )
    numbers = {}
    for space in spaces:
        known = space(real)
        found = [distinct(space(images), known) for images in each]
        stand_in = known[np.random.default_rng(0).permutation(len(known))[:noises]]
        theirs = {"real": float(distinct(stand_in, known)), "images": float(noises)}
        numbers[f"noises/{space.name}/distinct"] = Number(float(np.mean(found)), "higher", theirs)
    return numbers


def bits_per_token(
    pipeline: Pipeline, records: Sequence[Record], prompts: Sequence[str], size: int
) -> dict[str, Number]:
    """Bits per token of the real images' codes for their prompts, where the family has a likelihood."""
    codec, code = pipeline.codec, pipeline.family.sample_spec().code
    if codec is None or not code.is_discrete or not pipeline.family.capabilities.likelihood:
        return {}
    family = likelihood(pipeline.family)

    @jax.jit
    def score(parts, images, condition):
        codes = codec.config.encode(parts["codec"], images.astype(np.float32) / 127.5 - 1)
        condition = with_features(pipeline.text, parts, condition)
        nats = family.log_likelihood(parts["model"], condition | {"codes": codes})
        return -nats / (math.log(2) * math.prod(codes.shape[1:3]))

    total = 0.0
    images = images_of(records)
    for rows, count in batches(len(records), size):
        with jax.set_mesh(pipeline.mesh):
            condition = condition_of(family, pipeline.text, [prompts[int(i)] for i in rows])
            bits = score(pipeline.parts, images[rows], condition)
        total += float(to_host(bits)[:count].sum())
    uniform = sum(math.log2(n) for n in code.sizes)
    return {"bits_per_token": Number(total / len(records), "lower", {"uniform": uniform})}


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets below each other."""
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole
