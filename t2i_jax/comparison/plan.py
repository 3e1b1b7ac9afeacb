"""The configuration of a comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from t2i_jax.core.config import ConfigError
from t2i_jax.core.fields import Checked, Positive, Seed, Size, values
from t2i_jax.core.narrow import as_family
from t2i_jax.evaluation.metrics import NEIGHBOURS
from t2i_jax.training.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Variant:
    """A trained model drawn from in one way."""

    run: str
    """name of one of the comparison's runs"""
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """sampling options that differ from the model's own"""
    family: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """fields of the model's configuration that no training depends on, as `solver`"""
    classifier: str = ""
    """name of one of the comparison's guides, whose gradient guides towards the prompt"""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One sampling option over several values, for one or more lines of a plot."""

    title: str
    field: str
    """the option that takes the values"""
    values: tuple[float, ...]
    lines: Mapping[str, Variant]
    about: str = ""
    """remark under the plot"""


@dataclasses.dataclass(frozen=True)
class Comparison(Checked):
    """Runs of equal training compute, what is drawn from them, and what the images are compared with."""

    title: str
    about: str
    """question and method; the head of the report"""
    runs: Mapping[str, Experiment]
    """`train.steps` of each follows from `flops`"""
    reference: Experiment
    """its data holds the images and captions that are compared with"""
    flops: Positive
    """of the training of each run: three times the forward passes"""
    sweeps: Mapping[str, Sweep] = dataclasses.field(default_factory=dict)
    guides: Mapping[str, Experiment] = dataclasses.field(default_factory=dict)
    """trained with the same compute, to guide others: classifiers and image-text models of noised images"""
    count: Size = 100
    """images drawn for each number: known concepts in words that were not trained on"""
    batch_size: Size = 25
    """images drawn at once; the speed is that of such a batch"""
    seed: Seed = 0
    """of the images' noise"""
    repeats: Size = 1
    """trainings of each run, the seed of each one above that of the one before: the table of runs has their means, with
    intervals of 95 %; sweeps are of the first"""

    def repeated(self) -> dict[str, tuple[str, Experiment]]:
        """Each training by the name of its folder: the run that it is one of, and what is trained."""
        found = {}
        for n in range(self.repeats):
            for name, experiment in self.runs.items():
                train = dataclasses.replace(experiment.train, seed=experiment.train.seed + n)
                found[f"{name}, repeat {n}" if n else name] = name, dataclasses.replace(experiment, train=train)
        return found

    def __post_init__(self):
        super().__post_init__()
        for name, sweep in self.sweeps.items():
            for label, line in sweep.lines.items():
                for wanted, there in ((line.run, self.runs), (line.classifier, self.guides)):
                    if wanted and wanted not in there:
                        known = ", ".join(there) or "none"
                        raise ConfigError(f"sweeps.{name}.{label}: there is no run '{wanted}'; there are {known}")
                model = as_family(self.runs[line.run].model)
                for value, given in ((model, line.family), (model.options(), {**line.options, sweep.field: 0})):
                    odd = sorted(given.keys() - values(value).keys())
                    if odd:
                        raise ConfigError(f"sweeps.{name}.{label}: {type(value).__name__} has no field '{odd[0]}'")
        if self.count % self.batch_size:
            raise ConfigError(f"count {self.count}: must be a multiple of batch_size {self.batch_size}")
        if self.count <= NEIGHBOURS:
            raise ConfigError(f"count {self.count}: what is measured needs at least {NEIGHBOURS + 1} images")
