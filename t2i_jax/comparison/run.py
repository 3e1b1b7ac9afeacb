"""Train, draw, measure, report; each piece once."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from scipy.special import stdtrit

from t2i_jax.bench.measure import Result
from t2i_jax.comparison.measure import ReferenceSet, measure
from t2i_jax.comparison.plan import Comparison, Variant
from t2i_jax.comparison.report import files_of, write
from t2i_jax.core.config import ConfigError, to_json
from t2i_jax.core.console import console
from t2i_jax.core.image_files import save_png
from t2i_jax.core.outputs import check_free
from t2i_jax.core.params import abstract
from t2i_jax.guides import ClassifierGuidance
from t2i_jax.pipeline import Pipeline
from t2i_jax.sampler import Sampler
from t2i_jax.storage.artifacts import load_artifact
from t2i_jax.training.experiment import Experiment, load_experiment
from t2i_jax.training.loop import train
from t2i_jax.training.trainer import Trainer


def run(comparison: Comparison, folder: Path, out: Path, command: str = "") -> Result:
    """Do the remaining work of a comparison, and write OUT.md, OUT.json and images.

    folder: where the runs are trained, and where each measured number is kept until its configuration changes.
    Returns the contents of OUT.json.
    """
    check_free(*files_of(comparison, out))
    reference = ReferenceSet(comparison)
    repeated = comparison.repeated()
    every = {**{name: experiment for name, (_, experiment) in repeated.items()}, **comparison.guides}
    trained = {name: equal(e, comparison.flops, folder / name) for name, e in every.items()}
    for name, experiment in trained.items():
        check_length(experiment, folder / name)
    found: Result = {
        "title": comparison.title,
        "flops": comparison.flops,
        "runs": {},
        "guides": {},
        "sweeps": {},
    }
    known: dict[str, dict[str, float]] = {}
    for name, experiment in trained.items():
        console.rule(f"{name}: {experiment.train.steps} steps")
        train(experiment, folder / name)
        known[name] = facts(experiment, folder / name)
        gc.collect()
    sheets: dict[str, np.ndarray] = {}
    with_memory = ResultCache(folder / "measured", comparison, trained, reference)
    for name in repeated:
        numbers, sheets[name] = with_memory(Variant(name), {}, name)
        known[name] |= numbers
    for whole in comparison.runs:
        found["runs"][whole] = averaged([known[name] for name, (of, _) in repeated.items() if of == whole])
    found["guides"] = {name: known[name] for name in comparison.guides}
    for name, sweep in comparison.sweeps.items():
        found["sweeps"][name] = {}
        for label, line in sweep.lines.items():
            points = [with_memory(line, {sweep.field: v}, f"{label}, {sweep.field} {v:g}")[0] for v in sweep.values]
            found["sweeps"][name][label] = points
    ceiling = reference.judge(reference.real) | {"seconds_per_image": 0.0}
    found |= {"real": ceiling, "chance": 1 / len(reference.prompts), "device": jax.devices()[0].device_kind}
    write(comparison, found, reference, {name: sheets[name] for name in comparison.runs}, out, command)
    return found


def averaged(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over trainings; and of more than one `NAME/interval`, half of the interval of 95 % by Student's t."""
    names = [name for name in each[0] if all(name in numbers for numbers in each)]
    found = {name: statistics.fmean(numbers[name] for numbers in each) for name in names}
    if len(each) > 1:
        half = stdtrit(len(each) - 1, 0.975) / math.sqrt(len(each))
        found |= {f"{name}/interval": half * statistics.stdev(numbers[name] for numbers in each) for name in names}
    return found


def equal(experiment: Experiment, budget: float, folder: Path) -> Experiment:
    """The experiment with as many steps as the FLOPs pay for, frozen parts not counted, and nothing drawn or saved more
    than needed."""
    trainer = Trainer(experiment, folder)
    with jax.set_mesh(trainer.mesh):
        work = trainer.flops(next(iter(trainer.batches(0))), frozen_too=False)
    steps = round(budget / work)
    if steps < 2:
        raise ConfigError(f"flops {budget:.3g}: a step of {folder.name} takes {work:.3g} already")
    seldom = {"evaluate_every": steps, "preview_every": 0, "save_every": max(steps // 3, 1)}
    return dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, steps=steps, **seldom))


def check_length(experiment: Experiment, folder: Path) -> None:
    """Errors: `ConfigError` where the run in a folder has another length and its schedule ends with it: trained
    longer, it would differ from a run of that many steps."""
    if not any(folder.glob("checkpoints/[0-9]*")):
        return
    before, steps = load_experiment(folder).train.steps, experiment.train.steps
    if before != steps and any(o.ends for o in (experiment.train.optimizer, *experiment.train.optimizers.values())):
        raise ConfigError(
            f"{folder}: its {before} steps are not the {steps} that the FLOPs pay for, and its schedule ends there; "
            "remove it, or choose another folder for the runs"
        )


def facts(experiment: Experiment, folder: Path) -> dict[str, float]:
    """Size and speed of a trained run: parameters, steps, and the minutes that its steps took at their median rate, but
    for a run too short to have one."""
    model = abstract(experiment.model)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [r["images_per_second"] for r in records if "images_per_second" in r]
    seen = experiment.train.steps * experiment.data.batch_size
    held_out = {k: v for r in records for k, v in r.items() if k.startswith("val/")}
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(model)),
        "steps": experiment.train.steps,
        **({"training_minutes": seen / statistics.median(rates) / 60} if rates else {}),
        **held_out,
    }


class ResultCache:
    """Results by all that they depend on: nothing is sampled twice, and no outdated result is used."""

    def __init__(self, folder: Path, comparison: Comparison, runs: dict[str, Experiment], reference: ReferenceSet):
        self.folder, self.comparison, self.runs, self.reference = folder, comparison, runs, reference
        self.pipelines: dict[str, Pipeline] = {}
        self.classifiers: dict[str, ClassifierGuidance] = {}

    def __call__(self, line: Variant, more: dict[str, object], title: str) -> tuple[dict[str, float], np.ndarray]:
        settings = {**line.options, **more}
        drawn = (self.comparison.count, self.comparison.batch_size, self.comparison.seed)
        models = [to_json(self.runs[name]) for name in (line.run, line.classifier) if name]
        depends = [models, to_json(dict(line.family)), settings, drawn, self.reference.prompts]
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
        numbers, sheet = self.folder / f"{key}.json", self.folder / f"{key}.png"
        if numbers.exists() and sheet.exists():
            tall = np.asarray(Image.open(sheet))
            return json.loads(numbers.read_text()), tall.reshape(self.reference.real.shape)
        values, made = measure(self.reference, self.sampler(line, settings), title)
        self.folder.mkdir(parents=True, exist_ok=True)
        save_png(made.reshape(-1, *made.shape[2:]), sheet)
        numbers.write_text(json.dumps(values))
        brief = {k.split("_")[0] if "/" in k else k: v for k, v in values.items()}
        console.print(title, {k: round(v, 4) for k, v in brief.items() if k.endswith(("top1", "frechet", "image"))})
        return values, made

    def sampler(self, line: Variant, settings: Mapping[str, object]) -> Sampler:
        """Each model is loaded once."""
        folder = self.folder.parent
        if line.run not in self.pipelines:
            self.pipelines[line.run] = Pipeline.load(folder / line.run)
        if line.classifier and line.classifier not in self.classifiers:
            self.classifiers[line.classifier] = ClassifierGuidance(load_artifact(folder / line.classifier))
        pipeline = self.pipelines[line.run].replace(**line.family)
        guides = [self.classifiers[line.classifier]] if line.classifier else []
        return pipeline.sampler(dataclasses.replace(pipeline.options, **settings), guides=guides)
