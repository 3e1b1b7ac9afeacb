"""Sampling codes by any family, random weights, against the FLOP/s of a matrix product; and the head's share.

A head's share is the time saved when the same loop, with the same steps and network, runs with a head that samples at
no cost: a difference of two programs that run alternately. Its FLOPs are counted in the same way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from t2i_jax import zoo
from t2i_jax.bench.baselines import baseline
from t2i_jax.bench.measure import EAGER, LIMITS, Measure, Result, interleaved, limits, seconds, weights
from t2i_jax.bench.train import random_batch
from t2i_jax.core import flops
from t2i_jax.core.config import ConfigError, refused
from t2i_jax.core.family import with_fields
from t2i_jax.core.fields import values
from t2i_jax.core.keys import image_keys
from t2i_jax.core.memory import check_memory
from t2i_jax.core.narrow import as_family
from t2i_jax.core.specs import CodeSpec
from t2i_jax.core.types import Family, SamplingOptions
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import Folder
from t2i_jax.heads import PositionKeys, SoftmaxHead, TokenHead
from t2i_jax.plan.ready import batch_shapes
from t2i_jax.sampling.guidance import guided_by
from t2i_jax.sampling.options import ARSampler
from t2i_jax.storage.artifacts import load_artifact
from t2i_jax.training.experiment import Experiment, load_experiment


def experiment_of(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a config or a run, or one that holds a released model. Errors: `ConfigError`, also for a model
    that draws nothing."""
    if ((zoo.find(path) or path) / "model.safetensors").exists():
        if overrides:
            raise ConfigError(f"{path}: fields of a released model cannot be set: {' '.join(overrides)}")
        experiment = Experiment(load_artifact(path).config, Data(Folder("")))
    else:
        experiment = load_experiment(path, overrides)
    with refused(str(path)):
        as_family(experiment.model)
    return experiment


def random_condition(experiment: Experiment, batch: int) -> dict[str, np.ndarray]:
    """What the family is asked for in `batch` images, at random; features of text as if computed before."""
    family = as_family(experiment.model)
    experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, batch_size=batch))
    shapes = batch_shapes(experiment)
    if jax.default_backend() == "cpu":
        check_memory(f"a batch of {batch}", sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes.values()))
    reads = family.condition_spec()
    condition = {k: v for k, v in random_batch(experiment, shapes).items() if k in reads}
    if family.capabilities.super_resolution and "low_codes" not in condition:
        (i, j), c = family.sample_spec().grid, reads["low_res"].shape[-1] or 3
        condition["low_res"] = np.zeros((batch, -(-i // 4), -(-j // 4), c), np.float32)
    return condition


def free_sample(code: CodeSpec, z: Array, null: Array | None) -> tuple[Array, Array]:
    """Codes (b, m, *code) and the mean (b, m) of z and null (b, m, d), on whose whole they depend."""
    mean = z.astype(jnp.float32).mean(-1) + (0 if null is None else null.astype(jnp.float32).mean(-1))
    drawn = jnp.broadcast_to(mean.reshape(*mean.shape, *(1 for _ in code.shape)), (*mean.shape, *code.shape))
    return (drawn > 0).astype(jnp.int32) if code.is_discrete else drawn, mean


@dataclasses.dataclass(frozen=True)
class FreeHead:
    """A head with the parameters of another one that samples at no cost, from all of its inputs."""

    head: TokenHead

    @property
    def code(self) -> CodeSpec:
        """That of the other head."""
        return self.head.code

    @property
    def knows_probability(self) -> bool:
        """Its score is as long as one that does."""
        return self.head.knows_probability

    def init(self, key: Array, width: int) -> nnx.Module:
        return self.head.init(key, width)

    def entrance(self, key: Array, width: int) -> nnx.Module:
        return self.head.entrance(key, width)

    def loss(self, module: nnx.Module, z: Array, x: Array, key: Array, train: bool = True) -> Array:
        return self.head.loss(module, z, x, key, train)

    def sample(
        self, module: nnx.Module, z: Array, null: Array | None, draws: PositionKeys, guidance: Array, options: ARSampler
    ) -> tuple[Array, Array | None]:
        """Codes that depend on the whole of z, and a score where the other head has one."""
        drawn, mean = free_sample(self.code, z, null)
        return drawn, mean if self.knows_probability else None


@dataclasses.dataclass(frozen=True)
class FreeSoftmaxHead(SoftmaxHead):
    """The same of a `SoftmaxHead`, as families with a tied table need one."""

    def sample(
        self, module: nnx.Module, z: Array, null: Array | None, draws: PositionKeys, guidance: Array, options: ARSampler
    ) -> tuple[Array, Array]:
        """Codes that depend on the whole of z, and a score."""
        return free_sample(self.code, z, null)


def without_head(family: Family) -> Family:
    """A family with its head replaced by one that samples at no cost."""
    head = values(family)["head"]
    return with_fields(family, head=FreeSoftmaxHead(**values(head)) if type(head) is SoftmaxHead else FreeHead(head))


def bench_drawing(
    experiment: Experiment, batch: int, guided: bool = True, repeats: int = 3, eager: bool = False
) -> Result:
    """Speed of a family's sampler with its own options and random weights; limits and sampling measured alternately.

    Codes, latents or images come out; text encoders and codecs are not part of it. Returns seconds and their spread,
    images/s, FLOPs of an image and FLOP/s, `of_limit`, their share of those of a matrix product in the model's dtype;
    for a family with a head `head_time` and `head_flops`, its shares of time and FLOPs, the network having the others;
    with `eager` also the seconds of the same network and steps in eager PyTorch on a CPU. Errors: `ConfigError` for
    `eager` of a model that is not among those of `benchmarks/pytorch`.
    """
    family, condition = as_family(experiment.model), random_condition(experiment, batch)
    keys = image_keys(range(batch))
    model, options = weights(family.init), family.options()
    static = {"guided": guided_by(family, options) if guided else False}
    families = {"seconds": family} | ({"cut": without_head(family)} if family.capabilities.token_head else {})

    def program(family: Family) -> Callable[..., object]:
        return lambda *arguments: family.sample(*arguments, **static)

    arguments = (model, condition, keys, options.arrays())
    work = {k: flops.count(program(f), *arguments, trips=f.loop_trips(options)) for k, f in families.items()}
    compiled = {k: jax.jit(program(f)) for k, f in families.items()}
    first = {k: seconds(lambda run=run: run(*arguments)) for k, run in compiled.items()}
    measures: dict[str, Measure] = {k: lambda run=run: seconds(lambda: run(*arguments)) for k, run in compiled.items()}
    if eager:
        both = guided and not static and family.capabilities.unconditional
        measures["eager"] = _in_pytorch(family, model, condition, options, both, batch)
        measures["eager"]()  # its memory is at hand too
    found, spread = interleaved({**measures, **limits(family.compute.dtype)}, repeats)
    result = {
        "name": f"batch {batch}",
        "batch": batch,
        "parameters": sum(x.size for x in jax.tree.leaves(model)),
        "guided": guided and not static,
        **found,
        "spread": spread["seconds"],
        "compile": first["seconds"] - found["seconds"],
        "images_per_second": batch / found["seconds"],
        "seconds_per_image": found["seconds"] / batch,
        "flops_per_image": work["seconds"] / batch,
        "flops_per_second": work["seconds"] / found["seconds"],
        "of_limit": work["seconds"] / found["seconds"] / found["flops"],
    }
    if "cut" in families:
        shares = {"head_time": found, "head_flops": work}
        result |= {name: 1 - of["cut"] / of["seconds"] for name, of in shares.items()}
    return result


def _in_pytorch(
    family: Family, model: nnx.Module, condition: dict[str, np.ndarray], options: SamplingOptions, both: bool, b: int
) -> Measure:
    with refused("--eager"):
        theirs = baseline("denoising").Denoiser(family, model)
    known, null = (theirs.model.read(condition, jnp.full(b, dropped)).pooled for dropped in (False, True))
    unconditional = null if both else None
    noise = jax.random.normal(jax.random.key(0), (b, *family.sample_spec().shape))
    return lambda: seconds(lambda: theirs.sample(known, unconditional, options, noise))


ROWS: dict[str, Callable[[Result], str]] = {
    "images / s": lambda r: f"{r['images_per_second']:.3g}",
    "seconds an image": lambda r: f"{r['seconds_per_image']:.3f} (spread {r['spread']:.0%})",
    "GFLOPs an image": lambda r: f"{r['flops_per_image'] / 1e9:.2f}",
    "GFLOP/s": lambda r: f"{r['flops_per_second'] / 1e9:.1f}",
    "share of a matrix product's": lambda r: f"{r['of_limit']:.0%}",
    **EAGER,
    "time in the head, in the network": lambda r: f"{r['head_time']:.0%}, {1 - r['head_time']:.0%}",
    "FLOPs in the head, in the network": lambda r: f"{r['head_flops']:.0%}, {1 - r['head_flops']:.0%}",
    "compile, seconds": lambda r: f"{r['compile']:.1f}",
    **LIMITS,
}
