"""`t2i sample`: prompts to images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import jax
import numpy as np
import tyro
from PIL import Image, ImageOps

from t2i_jax.cli.sizes import parse_size
from t2i_jax.core import config
from t2i_jax.core.config import parse_some
from t2i_jax.core.console import console
from t2i_jax.core.fields import Checked, Finite, Range, Seed, Share, Size
from t2i_jax.core.narrow import as_family, classifier_guided, interpolates
from t2i_jax.core.outputs import local
from t2i_jax.core.sharding import MeshConfig, read_mesh
from t2i_jax.core.text import mend, read_lines
from t2i_jax.data.images import open_image, open_mask
from t2i_jax.edits import Blend, InitImage, Inpaint, Vary, embedding_field
from t2i_jax.guides import Autoguidance, ClassifierGuidance, Guide, Reference
from t2i_jax.pipeline import Pipeline
from t2i_jax.previews import sample_to_folder, show_folder
from t2i_jax.sampler import Between, interpolation
from t2i_jax.sampling.guidance import guided_by
from t2i_jax.sampling.options import validate_options
from t2i_jax.storage.artifacts import config_of, is_stored

if TYPE_CHECKING:
    from t2i_jax.evaluation.rerank import Reranker


@dataclasses.dataclass(frozen=True)
class SampleArguments(Checked):
    """Draw images for prompts with a run or a released model. Images that are there already are not drawn again.

    The model's sampling options are further flags (--guidance, --temperature, --top-k, ...): t2i sample MODEL --help.
    Example: t2i sample runs/quickstart/model "a red heart" "a smiling cat" --count 4 --guidance 4
    """

    model: tyro.conf.Positional[Path]
    """run folder, released model, or the name of one of `t2i zoo`"""
    text: tyro.conf.Positional[tuple[str, ...]] = ()
    """prompts; class numbers for a class-conditional model"""
    prompts: Path | None = None
    """text file with one prompt a line, for bulk; blank lines are left out"""
    out: Path = Path("samples")
    count: Annotated[int, Range(1, 1_000_000)] = 1
    """images per prompt, with seeds seed, seed + 1, ..."""
    seed: Seed = 0
    batch_size: Size = 16
    scale: Annotated[int, Range(1, 64)] = 4
    """enlargement of the images in the grid"""
    size: str = ""
    """WIDTHxHEIGHT of images in pixels, for models whose parameters are of no one size: a DiT or UNet, and Transformers
    with rotary positions. The sizes of training, and those near them, are drawn best"""
    solver: str = ""
    """of a Gaussian diffusion, another than its own: a key of `sampling.solvers.SOLVERS`, as heun; ddim and dpm++ add
    no noise unless --eta says so"""
    mesh: str = ""
    """AXIS=SIZE,... of data, fsdp and tensor, -1 for the rest: fsdp or tensor for models larger than a device; each
    device draws its own images unless given"""
    int8: bool = False
    """int8 weights: a quarter of the memory, nearly the same images; not for every family"""
    lora: tuple[str, ...] = ()
    """folders of adapters, runs with train.lora or released ones, each with its factor: runs/style=0.8"""
    database: Path | None = None
    """of a model that retrieves, in the place of its own: an index that `t2i data neighbours` made of other images, by
    the same encoder"""
    rerank: str = ""
    """a CLIP (run, folder or file) that chooses the `count` best of `candidates` images per prompt, with fields of it
    set after commas: vit_b_32.pt,activation=gelu"""
    candidates: Annotated[int | None, Range(1, 1_000_000)] = None
    """images drawn per prompt where `rerank` chooses, 16 unless given; they stay in OUT/candidates"""
    image: Path | None = None
    """an image of which the part that `mask` marks is drawn anew; without a mask a Gaussian diffusion redraws all of
    it, from its noised version: --strength 0.6"""
    mask: Path | None = None
    """an image of that size, white where to draw"""
    vary: Path | None = None
    """an image that new ones are to be like, for models that read embeddings of images; a prompt is not needed"""
    blend: tuple[Path, Path] | None = None
    """two images that new ones are to lie between, at `share` of the way"""
    share: Share = 0.5
    classifier: Path | None = None
    """run of a classifier or an image-text model of noised images, for classifier guidance: --classifier-scale 3"""
    reference: Path | None = None
    """an image whose middle, at the model's size, an image-text --classifier guides to, besides the prompt"""
    text_weight: Finite | None = None
    """share of the prompt in that guidance, 1 unless given"""
    image_weight: Finite | None = None
    """share of the reference's embedding, 1 unless given"""
    layout_weight: Finite | None = None
    """share of the distance from the reference's feature map, 0 unless given"""
    autoguide: Path | None = None
    """run of a worse model, smaller or less trained, for autoguidance: it replaces the unconditional branch"""
    negative: str = ""
    """a prompt that images are guided away from, in the place of the unconditional branch; for masked models"""
    upsample: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """run folder or released model of an upsampler, with its own sampling options; once for each stage of a cascade"""
    interpolate: Annotated[int | None, Range(2, 1_000_000)] = None
    """images from each prompt to the next, both included, or from each of `count` seeds of one prompt to the next; for
    GANs"""
    show: bool = False
    """draw the images in this terminal, if it can"""
    watch: bool = False
    """show progress within a batch, and intermediate images in growing.png; compiled at each start"""
    watch_codec: Path | None = None
    """run or released codec that decodes these images in place of the model's own: a small one of the same codes, as a
    converted TAESD"""


def _factors(loras: Sequence[str]) -> dict[str, float]:
    """The factor of each folder of `FOLDER=FACTOR`; that of a folder alone is 1."""
    found: dict[str, float] = {}
    for lora in loras:
        folder, _, said = lora.rpartition("=")
        try:
            folder, factor = (folder, float(said)) if folder else (lora, 1.0)
        except ValueError:
            factor = math.nan
        if not math.isfinite(factor):
            raise config.ConfigError(f"--lora {lora}: {said!r} is no number; it is FOLDER=FACTOR")
        if folder in found:
            raise config.ConfigError(f"--lora {folder}: given twice")
        found[folder] = factor
    return found


def run(arguments: list[str]) -> None:
    if arguments and "://" not in arguments[0] and is_stored(arguments[0]) and {"-h", "--help"} & set(arguments):
        family = as_family(config_of(arguments[0]))
        console.print("[bold]options of this model[/] (those of the command: t2i sample --help)")
        config.override(family.options(), ["--help"], "t2i sample MODEL")
    args, rest = parse_some(SampleArguments, arguments, "t2i sample")
    prompts = [mend(prompt).replace("\0", " ") for prompt in args.text] + (
        read_lines(args.prompts) if args.prompts else []
    )
    if args.vary and args.blend:
        raise config.ConfigError("--vary with --blend: images are like one, or between two")
    if not args.blend and _names(arguments, "--share"):
        raise config.ConfigError("--share without --blend: of the way between which images?")
    if not prompts and not args.prompts and (args.vary or args.blend):
        prompts = [""]
    if not prompts and args.prompts:
        raise config.ConfigError(f"--prompts {args.prompts}: there is no line but blank ones")
    if not prompts:
        raise config.ConfigError('no prompt: give some ("a red heart"), or --prompts FILE with one a line')
    local(args.out)
    if args.candidates is not None and not args.rerank:
        raise config.ConfigError("--candidates without --rerank: nothing chooses among them; --count draws several")
    mesh = read_mesh(args.mesh, MeshConfig())
    pipeline = Pipeline.load(args.model, mesh, args.int8, _factors(args.lora), args.database or "")
    pipeline = pipeline.replace(solver=args.solver) if args.solver else pipeline
    pipeline = pipeline.sized(*parse_size(args.size)) if args.size else pipeline
    options = config.override(pipeline.options, rest, "t2i sample MODEL") if rest else pipeline.options
    validate_options(pipeline.family, options)
    if not args.classifier and _names(rest, "--classifier-scale"):
        raise config.ConfigError("--classifier-scale without --classifier: which model is to guide?")
    if jax.process_count() > 1 and (args.watch or args.rerank):
        raise config.ConfigError("--watch and --rerank work in one process alone")
    if args.autoguide and guided_by(pipeline.family, options) is False:
        raise config.ConfigError("--autoguide with guidance 1: nothing guides; add --guidance 2")
    if not args.image and _names(rest, "--strength"):
        raise config.ConfigError("--strength without --image: of which image?")
    if args.mask and not args.image:
        raise config.ConfigError("--mask without --image: where to draw anew, but of which image?")
    if args.watch_codec and not args.watch:
        raise config.ConfigError("--watch-codec without --watch: which images is it to decode?")
    watched = pipeline.other_codec(args.watch_codec) if args.watch_codec else None
    edit = None
    guides: list[Guide] = []
    if args.image:
        image, mask = _opened(args.image), open_mask(args.mask) if args.mask else None
        edit = InitImage(image) if mask is None else Inpaint(image, mask)
        with config.refused(f"--image {args.image}" + (f" --mask {args.mask}" if args.mask else "")):
            pipeline.tokens_to_keep(edit)
    reference = _reference(args, pipeline)
    if args.classifier:
        guides.append(ClassifierGuidance.load(args.classifier, mesh=pipeline.mesh, reference=reference))
    if args.autoguide:
        guides.append(Autoguidance.load(args.autoguide, mesh=pipeline.mesh))
    upsampler = [Pipeline.load(path, mesh) for path in args.upsample]
    away = mend(args.negative).replace("\0", " ")
    like = Vary(_opened(args.vary)) if args.vary else None
    like = Blend(_opened(args.blend[0]), _opened(args.blend[1]), args.share) if args.blend else like
    if like:
        with config.refused("--vary" if args.vary else "--blend"):
            embedding_field(pipeline.family, pipeline.text)
    sampler = pipeline.sampler(options, edit=edit, guides=guides, upsampler=upsampler, negative=away, like=like)
    judge = _judge(args) if args.rerank else None
    drawn = max(args.count, args.candidates or 16) if judge else args.count
    jobs, toward = [(prompt, args.seed + n) for prompt in prompts for n in range(drawn)], None
    if args.interpolate:
        jobs, toward = _between(args, prompts, pipeline)
        drawn = len(jobs) // args.count if len(prompts) > 1 else len(jobs)
    folder = args.out / "candidates" if judge else args.out
    sample_to_folder(sampler, jobs, folder, args.batch_size, drawn, args.scale, args.watch, toward, watched)
    if args.show and not judge:
        show_folder(args.out, len(jobs))
    if judge:
        from t2i_jax.evaluation.rerank import keep_best

        files = [folder / f"{n:05d}.png" for n in range(len(jobs))]
        keep_best(files, prompts, args.count, args.out, judge, args.scale)
        if args.show:
            show_folder(args.out, args.count * len(prompts))
        console.print(f"{args.out}: the best {args.count} of {drawn} for each of {len(prompts)} prompts, by CLIP")


def _between(
    args: SampleArguments, prompts: list[str], pipeline: Pipeline
) -> tuple[list[tuple[str, int]], list[Between]]:
    """What `--interpolate` draws: the images of each way, and their other ends."""
    with config.refused(f"--interpolate {args.interpolate}"):
        interpolates(pipeline.family)
    if args.rerank or args.upsample:
        raise config.ConfigError("--interpolate with --rerank or --upsample: these read one prompt per image")
    seeds = [args.seed + n for n in range(args.count)]
    if len(prompts) == 1 and args.count == 1:
        raise config.ConfigError("--interpolate with one prompt and one seed: give several prompts, or --count 2")
    ways = [[(prompt, seed) for prompt in prompts] for seed in seeds]
    ways = ways if len(prompts) > 1 else [[(prompts[0], seed) for seed in seeds]]
    steps = [step for ends in ways for step in interpolation(ends, args.interpolate or 2)]
    return [(prompt, seed) for prompt, seed, _ in steps], [toward for _, _, toward in steps]


def _judge(args: SampleArguments) -> Reranker:
    """The CLIP of `--rerank`."""
    from t2i_jax.convert.folders import encoder  # what chooses takes as long to import as what draws
    from t2i_jax.evaluation.rerank import Reranker
    from t2i_jax.text.clip import ClipEmbedding

    with config.refused(f"--rerank {args.rerank}"):
        text = encoder(ClipEmbedding, args.rerank, f"--rerank {args.rerank}")
        return Reranker(text, batch_size=args.batch_size)


def _reference(args: SampleArguments, pipeline: Pipeline) -> Reference | None:
    """What the classifier guides to besides the prompt: the middle of an image, at the size that the model draws."""
    weights = {"text_weight": args.text_weight, "image_weight": args.image_weight, "layout_weight": args.layout_weight}
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    if args.reference is None:
        if weights:
            flag = next(iter(weights)).replace("_", "-")
            raise config.ConfigError(f"--{flag} without --reference: of the guidance to which image?")
        return None
    if not args.classifier:
        raise config.ConfigError("--reference without --classifier: which image-text model is to compare images?")
    with config.refused("--reference"):
        rows, columns = classifier_guided(pipeline.family).sample_spec().grid
    image = ImageOps.fit(open_image(args.reference), (columns, rows), Image.Resampling.LANCZOS)
    return Reference(np.asarray(image), **weights)


def _opened(path: Path) -> np.ndarray:
    """An image uint8 (i, j, 3)."""
    return np.asarray(open_image(path))


def _names(words: list[str], flag: str) -> bool:
    """Whether a command line has a flag."""
    return any(word.partition("=")[0] == flag for word in words)
