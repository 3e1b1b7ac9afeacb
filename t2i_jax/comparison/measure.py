"""Images of one model with one set of options, and their numbers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from t2i_jax.bench.measure import limits
from t2i_jax.comparison.plan import Comparison
from t2i_jax.core import flops
from t2i_jax.core.config import ConfigError
from t2i_jax.core.console import bar
from t2i_jax.core.keys import image_keys
from t2i_jax.core.narrow import as_family
from t2i_jax.evaluation.alignment import retrieve
from t2i_jax.evaluation.features import FeatureNetwork
from t2i_jax.evaluation.report import compare
from t2i_jax.evaluation.run import images_of, prompts_of, records_of
from t2i_jax.sampler import Sampler

SPACES = ("efficientnet_lite0", "pixels")


class ReferenceSet:
    """Prompts, the real images that belong to them, and feature spaces in which drawn ones are measured."""

    def __init__(self, comparison: Comparison):
        self.comparison = comparison
        train = records_of(comparison.reference.data, "train", 1000)
        records = records_of(comparison.reference.data, "train", comparison.count)
        if len(records) < comparison.count:
            raise ConfigError(f"reference: it has {len(records)} training images, and count is {comparison.count}")
        self.records, self.real = records, images_of(records)
        self.prompts = prompts_of(records, as_family(comparison.reference.model))
        self.spaces = {name: FeatureNetwork(name).load() for name in SPACES}  # pyright: ignore[reportArgumentType]
        self.known = {name: (space(self.real), space(images_of(train))) for name, space in self.spaces.items()}

    def judge(self, made: np.ndarray) -> dict[str, float]:
        """Numbers of images uint8 (n, i, j, 3), one a prompt: distances, precision and recall, retrieval."""
        numbers = {}
        for name, space in self.spaces.items():
            features, (real, train) = space(made), self.known[name]
            found = retrieve(features, real, self.prompts, self.prompts)
            numbers |= {f"{name}/{k}": v.value for k, v in compare(features, real, train).items()}
            numbers |= {f"{name}/top1": found.top(1), f"{name}/top5": found.top(5)}
        return numbers

    def draw(self, sampler: Sampler, title: str) -> tuple[np.ndarray, float]:
        """Images for all prompts (or their classes), and the seconds an image of the median batch, once compiled.

        Text features and decoding are part of it, as they are for a user.
        """
        size, made, taken = self.comparison.batch_size, [], []
        prompts = prompts_of(self.records, sampler.program.family)
        next(sampler.batches(prompts, range(len(prompts)), size))  # compiles
        seeds = range(self.comparison.seed, self.comparison.seed + len(prompts))
        with bar() as progress:
            task = progress.add_task(title, total=len(prompts))
            began = time.perf_counter()
            for images in sampler.batches(prompts, seeds, size):
                made.append(images)
                taken.append((time.perf_counter() - began) / len(images))
                progress.advance(task, len(images))
                began = time.perf_counter()
        return np.concatenate(made), statistics.median(taken)


def work(sampler: Sampler, prompts: Sequence[str]) -> float:
    """FLOPs of a batch of images' codes: products of the compiled loop, as often as it runs."""
    program, options = sampler.program, sampler.options
    arguments = dict(sampler.parts), sampler.condition(prompts), image_keys(range(len(prompts))), options.arrays()
    with jax.set_mesh(sampler.mesh):
        return flops.count(partial(program.codes, sampler.guided), *arguments, trips=program.family.loop_trips(options))


def measure(reference: ReferenceSet, sampler: Sampler, title: str) -> tuple[dict[str, float], np.ndarray]:
    """All numbers of one variant, its speed and the limit measured at the same time, and the images."""
    product = limits(sampler.program.family.compute.dtype)["flops"]
    before = max(product() for _ in range(3))
    made, seconds = reference.draw(sampler, title)
    limit = max(before, *(product() for _ in range(3)))
    size = reference.comparison.batch_size
    each = work(sampler, prompts_of(reference.records[:size], sampler.program.family)) / size
    speed = {
        "seconds_per_image": seconds,
        "gflops_per_image": each / 1e9,
        "flops_limit": limit,
        "share_of_limit": each / (limit * sampler.mesh.size) / seconds,
    }
    return reference.judge(made) | speed, made
