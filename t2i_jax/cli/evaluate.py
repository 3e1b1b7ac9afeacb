"""`t2i evaluate`: the metrics of a run or a released model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from t2i_jax import zoo
from t2i_jax.cli.sizes import parse_size
from t2i_jax.core.config import ConfigError, parse_some
from t2i_jax.core.fields import Checked, Range, Seed, Size
from t2i_jax.core.outputs import local
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.evaluation.run import evaluate_folder, reference_data
from t2i_jax.plan import read_mesh


@dataclasses.dataclass(frozen=True)
class EvaluateArguments(Checked):
    """The metrics table of a run or a released model, with images; written to report.json, report.md, samples.png.

    A codec is judged by its reconstructions, a model by its images for captions and by the likelihood of real ones, a
    model of images and captions by retrieval and zero-shot classification.
    Example: t2i evaluate runs/quickstart/model --out runs/quickstart --count 200
    """

    model: tyro.conf.Positional[Path]
    out: Path | None = None
    """folder for the report; the model's own unless given"""
    data: str = ""
    """what to compare with: a config, whose data are taken, or a data set, as `t2i data look` takes it; the run's own
    unless given"""
    count: Annotated[int, Range(low=2)] = 100
    """images per set of prompts: captions of the training concepts in new words, concepts held out, and held-out pairs
    of known concepts and styles"""
    batch_size: Size = 50
    seed: Seed = 0
    spaces: tuple[str, ...] = ("pixels", "efficientnet_lite0")
    """feature spaces; `inception:FILE` with the weights that pytorch-fid uses"""
    noises: Annotated[int, Range(low=0)] = 0
    """also draw so many images of each of eight prompts, and count those that differ; shown in noises.png"""
    solver: str = ""
    """of a Gaussian diffusion, another than its own: a key of `sampling.solvers.SOLVERS`, as heun"""
    size: str = ""
    """WIDTHxHEIGHT of images in pixels, for models that draw any size; pictures are cut to it. The model's own unless
    given"""
    mesh: str = ""
    """AXIS=SIZE,... of data, fsdp and tensor, -1 for the rest: the mesh of the model; that of a run that is compared
    with its own data, else one that divides batches alone, unless given"""
    judge: bool = False
    """also train a small judge of image and caption on the training pairs, and rank by it"""
    matching: str = ""
    """run or released DAMSM or CLIP, or a published CLIP: R-precision, the share of images whose own caption it finds
    among 99 of other classes"""


def run(arguments: list[str]) -> None:
    args, rest = parse_some(EvaluateArguments, arguments, "t2i evaluate")
    if args.out is None and zoo.find(args.model):
        raise ConfigError(f"{args.model}: is a model of the zoo, where no report is written: name a folder by --out")
    evaluate_folder(
        args.model,
        local(args.out or args.model),
        reference_data(args.data, args.model) if args.data else None,
        count=args.count,
        batch_size=args.batch_size,
        seed=args.seed,
        spaces=args.spaces,
        judge=args.judge,
        matching=args.matching,
        noises=args.noises,
        solver=args.solver,
        size=parse_size(args.size) if args.size else None,
        mesh=read_mesh(args.mesh, MeshConfig()) if args.mesh else None,
        options=rest,
    )
