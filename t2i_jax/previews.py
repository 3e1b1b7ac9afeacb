"""Images during training, and images of `t2i sample`."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from einops import rearrange
from jax import Array
from jax.experimental import multihost_utils
from PIL import Image

from t2i_jax.core import image_files, terminal
from t2i_jax.core.console import bar, console
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.image_files import to_uint8
from t2i_jax.core.keys import image_keys
from t2i_jax.core.narrow import as_codec, as_family
from t2i_jax.core.sharding import all_processes_agree, to_host
from t2i_jax.core.types import Codec
from t2i_jax.data.records import title
from t2i_jax.sampler import Between, Sampler
from t2i_jax.sampling.guidance import guided_by
from t2i_jax.sampling.options import plain_options
from t2i_jax.storage.artifacts import Artifact

if TYPE_CHECKING:
    from t2i_jax.training.state import TrainState
    from t2i_jax.training.trainer import Trainer

log = logging.getLogger(__name__)


class Previews:
    """Draws `samples/STEP.png` of a run: reconstructions of a codec, images for held-out captions of a family."""

    def __init__(self):
        self.draw: Callable[..., Array] | None = None
        self.inputs: tuple = ()
        self.begun = False

    def __call__(self, trainer: Trainer, state: TrainState, step: int) -> np.ndarray | None:
        if not self.begun:
            self._begin(trainer)
        if self.draw is None:
            return None
        real, captions, arguments = self.inputs
        made = to_host(self.draw(trainer.model(state), trainer.frozen, *arguments))[: len(real)]
        sheet = image_files.side_by_side(real, made, captions)
        if jax.process_index() == 0:
            image_files.save_png(sheet, trainer.folder / "samples" / f"{step:07d}.png")
        return np.asarray(sheet.convert("RGB"))

    def _begin(self, trainer: Trainer) -> None:
        """Choose what to draw for, once: the first records of the held-out split."""
        from t2i_jax.data.pipeline import PER_CAPTION  # sampling reads no data

        self.begun = True
        experiment, can = trainer.experiment, trainer.experiment.model.capabilities
        if can.family and trainer.codec is None and as_family(experiment.model).sample_spec().kind != "pixels":
            log.warning("no previews: the experiment has no `codec` that makes images of its codes")
            return
        if not can.codec and not can.family:
            return  # a classifier draws nothing
        codec = trainer.codec.config if trainer.codec else None
        data, fits = experiment.data, lambda record: True
        if data.shapes and can.family:  # images of the model's own size are drawn
            grid, factor = as_family(experiment.model).sample_spec().grid, codec.spec.factor if codec else 1
            data = data.with_shapes((grid[0] * factor, grid[1] * factor))
            fits = lambda r: "image" in r or r["codes" if "codes" in r else "latents"].shape[:2] == grid
        elif data.shapes:
            data = data.with_shapes()
        records = list(islice(filter(fits, data.examples("val")), experiment.train.previews))
        if not records:
            return
        captions = [title(r) for r in records]
        if "image" in records[0]:
            real = np.stack([r["image"] for r in records])
        else:  # an encoded data set: the decoded codes are the best reference
            codes = [r["codes"] if "codes" in r else np.split(r["latents"], 2, -1)[0] for r in records]
            decode = jax.jit(lambda frozen, codes: to_uint8(codec.decode(frozen, codes)))
            real = to_host(decode(trainer.frozen["codec"], np.stack(codes)))
        if can.codec:
            trained = as_codec(experiment.model)
            reconstruct = lambda model, frozen, x: to_uint8(trained.decode(model, trained.encode(model, x)))
            self.draw, arguments = jax.jit(reconstruct), (real.astype(np.float32) / 127.5 - 1,)
        else:
            family = as_family(experiment.model)
            reads = family.condition_spec()
            known = {"label", "features", "text_mask"} | {"image_features"} & reads.keys()
            wanted = known & set(experiment.data.fields) & records[0].keys()
            stored = {k: [r[k] for r in records] for k in sorted(wanted)}
            # Of features there is a row for each caption, and the image is drawn for the first.
            each = lambda k, v: [x[0] for x in v] if k in PER_CAPTION else v
            condition = {k: np.stack(each(k, v)) for k, v in stored.items()}
            if experiment.text is not None and "features" not in condition:
                condition["text"], condition["text_mask"] = experiment.text(captions)
            if can.super_resolution or "image_features" in reads:
                condition["image"] = real  # of which the small one is made, or its embedding

            def sample(model, frozen, condition, keys):
                condition = trainer.prepare(frozen, condition, jax.random.key(0))
                options = family.options()
                codes = family.sample(model, condition, keys, options, guided=guided_by(family, options))
                return to_uint8(codec.decode(frozen["codec"], codes) if codec else codes)

            self.draw, arguments = jax.jit(sample), (condition, image_keys(range(len(records))))
        self.inputs = real, captions, arguments


def sample_to_folder(
    sampler: Sampler,
    jobs: Sequence[tuple[str, int]],
    out: Path,
    batch_size: int,
    columns: int,
    scale: int,
    watch: bool = False,
    toward: Sequence[Between] | None = None,
    codec: Artifact[Codec] | None = None,
) -> None:
    """One PNG per (prompt, seed), a captioned grid of the first ones and a table of prompts (`image_files.describe`).

    Each PNG stores its prompt, seed and options; a job whose PNG exists already with the same ones is skipped: an
    interrupted run goes on. Images of an earlier call move to a folder of their own. toward: for each job, as in
    `Sampler.sample`. watch: show progress within a batch, and intermediate images in `growing.png`, which `codec`
    decodes, if given, in place of the pipeline's own. Errors: `ConfigError` where a file would be replaced that this
    command did not write.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = plain_options(sampler.options)
    files = [out / f"{i:05d}.png" for i in range(len(jobs))]
    about = [{"prompt": p, "seed": str(s), "options": json.dumps(settings)} | dict(sampler.about) for p, s in jobs]
    titles = [prompt for prompt, _ in jobs]
    if toward is not None:
        about = [a | {"toward": json.dumps(dataclasses.asdict(t))} for a, t in zip(about, toward, strict=True)]
        titles = [t.title(prompt) for t, prompt in zip(toward, titles, strict=True)]
    main, watch = jax.process_index() == 0, watch and jax.process_count() == 1
    # Only the first process writes, and may be the only one that sees the files.
    made, refusal = [False] * len(jobs), None
    try:
        made = image_files.claim(files, about, ("grid.png", "growing.png")) if main else made
    except ConfigError as error:
        refusal = error
    if not all_processes_agree(refusal is None):
        raise refusal or ConfigError(f"{out}: the first process cannot write here")
    todo = np.flatnonzero(~multihost_utils.broadcast_one_to_all(np.asarray(made, bool))).tolist()
    moments: dict[float, np.ndarray] = {}
    prompts, seeds = [jobs[i][0] for i in todo], [jobs[i][1] for i in todo]
    with bar() as progress:
        task = progress.add_task("sampling", total=len(jobs), completed=len(jobs) - len(todo))
        written = 0

        def preview(share: float, codes: np.ndarray) -> None:
            progress.update(task, completed=len(jobs) - len(todo) + written + share * len(codes))
            if not written:  # the first batch
                moments[share] = codes[:8]

        others = None if toward is None else [toward[i] for i in todo]
        for images in sampler.batches(prompts, seeds, batch_size, preview if watch else None, others):
            for i, image in zip(todo[written:], images, strict=False) if main else ():
                image_files.save_png(image, files[i], [titles[i]], about[i])
            written += len(images)
            progress.update(task, completed=len(jobs) - len(todo) + written)
    multihost_utils.sync_global_devices("sample: all images are written")
    if not main:
        return
    if moments:
        growing(sampler, dict(sorted(moments.items())), prompts[:8], out / "growing.png", scale, codec)
    image_files.describe(files, about)
    first = range(min(len(jobs), 64))
    images = np.stack([np.asarray(Image.open(files[i]).convert("RGB")) for i in first])
    sheet = image_files.grid(images, titles[: len(first)], columns=columns if columns > 1 else 0, scale=scale)
    image_files.save_png(sheet, out / "grid.png")
    console.print(f"{out}: {len(todo)} new images, {len(jobs)} in all; grid.png shows the first {len(first)}")


def show_folder(out: Path, count: int) -> None:
    """Draw the grid of a folder of images in this terminal; where a character has two pixels, the first images alone,
    whose captions would not be legible."""
    files = [path for n in range(min(count, 8)) if (path := out / f"{n:05d}.png").exists()]
    if jax.process_index() == 0 and files:
        images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in files])
        terminal.draw(Image.open(out / "grid.png"), Image.fromarray(rearrange(images, "n i j c -> i (n j) c")))


def growing(
    sampler: Sampler,
    moments: dict[float, np.ndarray],
    prompts: Sequence[str],
    file: Path,
    scale: int,
    codec: Artifact[Codec] | None,
) -> None:
    """A sheet of intermediate images: a row each, and a column for each of at most eight times."""
    shares = list(moments)
    chosen = [shares[i] for i in np.unique(np.linspace(0, len(shares) - 1, 8).round().astype(int))]
    frames = np.stack([sampler.decode(moments[share], codec) for share in chosen], 1)
    titles = [f"{share:.0%}" if share < 1 else prompt for prompt in prompts[: len(frames)] for share in chosen]
    sheet = image_files.grid(frames.reshape(-1, *frames.shape[2:]), titles, columns=len(chosen), scale=scale)
    image_files.save_png(sheet, file)
