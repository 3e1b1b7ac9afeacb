"""An experiment set up without its devices, data and frozen parts: shapes in place of arrays."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t2i_jax.core.casts import cast_dtypes
from t2i_jax.core.config import ConfigError, refused
from t2i_jax.core.family import with_fields
from t2i_jax.core.fields import values
from t2i_jax.core.narrow import (
    any_size,
    as_codec,
    as_family,
    learns_from_images,
    retrieves_neighbours,
    token_by_token,
)
from t2i_jax.core.platform import tpu_compiler_alone
from t2i_jax.core.sharding import RULES, Device, batch_sharding, fit
from t2i_jax.core.types import CachedNetwork, SamplingOptions, Trainable
from t2i_jax.data.records import DataError
from t2i_jax.plan.chips import Topology
from t2i_jax.storage.artifacts import config_of
from t2i_jax.training.experiment import Experiment
from t2i_jax.training.state import TrainState
from t2i_jax.training.trainer import Trainer

T = TypeVar("T")
Batch = dict[str, jax.ShapeDtypeStruct]

NO_COMPILER = (
    "a TPU plan needs the TPU compiler, which comes as the package libtpu and runs on any Linux machine: "
    "pip install 't2i_jax[plan]'"
)


def devices_of(topology: Topology) -> list[Device]:
    """Descriptions of the devices of a TPU topology. Errors: ImportError without libtpu, naming the extra."""
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(NO_COMPILER)
    from jax.experimental import topologies

    tpu_compiler_alone()
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # a plan holds no chip: any number may run at a time
    try:
        name, several = topology.slice_name, {"num_slices": topology.slices} if topology.slices > 1 else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **several).devices)
    except Exception as error:  # the runtime's own error class differs between versions of jax
        raise ConfigError(
            f"--topology {topology}: the TPU compiler refuses it: {str(error).splitlines()[0]}"
        ) from error


def of_size(experiment: Experiment, size: tuple[int, int] | None = None) -> Experiment:
    """The experiment for images of one size alone: width and height, else the largest of `Data.shapes`, if any.

    Errors: `ConfigError` for a model whose parameters are of another size.
    """
    data, model = experiment.data, experiment.model
    if not size and not data.shapes:
        return experiment
    rows, columns = (size[1], size[0]) if size else max(data.shapes, key=math.prod)
    if model.capabilities.family:
        with refused(f"size {columns}x{rows}"):
            family = any_size(model)
            spec = family.sample_spec()
            factor = 1 if spec.kind == "pixels" else max(data.image_size // spec.grid[0], 1)
            if experiment.codec and Path(experiment.codec).exists():
                factor = as_codec(config_of(experiment.codec)).spec.factor
            model = family.sized((rows // factor, columns // factor))
    return dataclasses.replace(experiment, model=model, data=data.with_shapes((rows, columns)))


def without_parts(experiment: Experiment, batch: Batch) -> Experiment:
    """The experiment without the frozen parts that this batch does not need."""
    needs_codec = "image" in batch and "codes" not in batch
    needs_text = "features" not in batch and "text" in batch
    needs_text |= retrieves_neighbours(experiment.text) and "neighbour_image" not in batch
    by_images = learns_from_images(experiment.text) and "image" in batch and "features" not in batch
    codec = experiment.codec if needs_codec else ""
    text = experiment.text if needs_text or by_images else None
    data = experiment.data.with_shapes()  # the batch has its shape already
    return dataclasses.replace(experiment, codec=codec, text=text, data=data)


def batch_of(experiment: Experiment, inputs: Sequence[str] = (), encoded: bool = False) -> tuple[Batch, str]:
    """The shapes of a global batch, and their origin: `inputs`, the data, or the model's spec.

    inputs: `NAME:DTYPE:SHAPE` of one example, as `codes:int32:16x16`, `label:int32:`. encoded: do not look at the data.
    """
    size = experiment.data.batch_size
    if inputs:
        found = {}
        for text in inputs:
            parts = text.split(":")
            try:
                shape = tuple(int(n) for n in parts[2].split("x") if n)
                found[parts[0]] = jax.ShapeDtypeStruct((size, *shape), jnp.dtype(parts[1]))
            except (IndexError, ValueError, TypeError) as error:
                raise ConfigError(f"--inputs {text}: it is written like codes:int32:16x16 or label:int32:") from error
        return found, "as --inputs says"
    if not encoded:
        data = dataclasses.replace(experiment.data, batch_size=1, workers=0, prefetch=1, threads=1)
        captions = None if learns_from_images(experiment.text) else experiment.text
        with contextlib.suppress(DataError, ConfigError, OSError, ImportError):
            stream = data.batches(captions)
            with contextlib.closing(stream):
                example = next(stream)
            return {
                k: jax.ShapeDtypeStruct((size, *v.shape[1:]), v.dtype) for k, v in example.items()
            }, "as the data are"
    return batch_shapes(experiment), "assumed: data are encoded (codes and text features computed before training)"


def batch_shapes(experiment: Experiment) -> Batch:
    """What the loss of a model reads, from its configuration: codes, where it may have codes or images, unless it draws
    the pixels of images of the data's size."""
    model, image = experiment.model, experiment.data.all_shapes[0]
    spec = dict(model.batch_spec())
    if "image" in spec and "codes" in spec:
        pixels = not experiment.codec and spec["image"].shape == (*image, 3)
        name = "image" if pixels else "codes"
        spec[name] = dataclasses.replace(spec[name], optional=False)
    needed = {k: f for k, f in spec.items() if not f.optional}
    shape = lambda f: (
        experiment.data.batch_size,
        *(image[min(i, 1)] if n is None else n for i, n in enumerate(f.shape)),
    )
    kind = lambda k, f: jnp.uint8 if k == "image" else jnp.dtype(f.dtype)
    return {k: jax.ShapeDtypeStruct(shape(f), kind(k, f)) for k, f in needed.items()}


@dataclasses.dataclass(frozen=True)
class AbstractSetup:
    """What a step is compiled from."""

    trainer: Trainer
    batch: Batch
    mesh: Mesh

    def lower(self) -> jax.stages.Lowered:
        """The train step, as the loop compiles it, lowered for the mesh."""
        with jax.set_mesh(self.mesh):
            return self.trainer.step.lower(self.trainer.target, self.trainer.frozen, self.batch)

    def condition(self) -> Batch:
        """What the sampler is asked for, a row for each image of a batch."""
        trainer, sharding = self.trainer, batch_sharding(self.mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        ready = jax.eval_shape(trainer.prepare, trainer.frozen, self.batch, key)
        reads = as_family(trainer.experiment.model).condition_spec().keys() & ready.keys()
        return {k: jax.ShapeDtypeStruct(ready[k].shape, ready[k].dtype, sharding=sharding) for k in reads}

    def sampled(self) -> TrainState:
        """The state whose model the sampler draws with: weights in the dtypes in which they are loaded. To be called
        outside of a mesh of absent chips."""
        target, dtypes = self.trainer.target, cast_dtypes(self.trainer.experiment.model)
        one = lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
        cast = lambda k, v: v.replace(one(v.get_value(), dtypes[k])) if k in dtypes else v
        each = lambda weights: weights and {k: cast(k, v) for k, v in weights.items()}
        return dataclasses.replace(target, params=each(target.params), ema=each(target.ema))

    def lower_sample(self) -> jax.stages.Lowered:
        """The sampler with its own options, on the state's parameters, lowered for the mesh."""
        trainer = self.trainer
        if trainer.experiment.train.lora.rank:
            raise ConfigError("--sample: adapters are added before sampling; plan it without train.lora")
        with refused("--sample"):
            family = as_family(trainer.experiment.model)
        size, state = self.trainer.experiment.data.batch_size, self.sampled()
        with jax.set_mesh(self.mesh):
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
            keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=batch_sharding(self.mesh))
            options, condition = jax.eval_shape(lambda: family.options().arrays()), self.condition()

            def sample(
                state: TrainState, condition: Mapping[str, jax.Array], keys: jax.Array, options: SamplingOptions
            ) -> jax.Array:
                return family.sample(trainer.model(state), condition, keys, options)

            return jax.jit(sample).lower(state, condition, keys, options)

    def cache(self) -> float:
        """Bytes of keys and values that a chip holds at the last token; 0 for families that keep none for `decode`."""
        model, sizes = self.trainer.experiment.model, dict(self.mesh.shape)
        if not model.capabilities.token_by_token:
            return 0.0
        family, state = token_by_token(model), self.sampled()
        branches = 2 if family.capabilities.unconditional else 1

        def read(state: TrainState, condition: dict[str, jax.Array]) -> object:
            condition = jax.tree.map(lambda x: jnp.repeat(x, branches, 0), condition)
            dropped = jnp.zeros(branches * self.trainer.experiment.data.batch_size, bool)
            network = cast(CachedNetwork, self.trainer.model(state))
            return network.prefill(condition, dropped)[1].grow(family.length).caches

        with jax.set_mesh(self.mesh):
            caches = jax.eval_shape(read, state, self.condition())
        split = lambda x: NamedSharding(self.mesh, fit(P(RULES["batch"], RULES["heads"]), x.shape, sizes))
        part = lambda x: math.prod(split(x).shard_shape(x.shape) if x.ndim > 1 else x.shape) * x.dtype.itemsize
        return float(sum(map(part, jax.tree.leaves(caches))))


def abstract_setup(experiment: Experiment, batch: Batch, mesh: Mesh) -> AbstractSetup:
    """Errors: `ConfigError` where the batch does not fit the mesh, and what a trainer says."""
    trainer = Trainer(without_parts(experiment, batch), Path("plan"), mesh)
    split = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=batch_sharding(mesh)) for k, v in batch.items()}
    return AbstractSetup(trainer, split, mesh)


def sizes_of(model: Trainable, name: str) -> dict[str, int]:
    """The fields of a model and of its network that hold a size, `depth` or `decoder_depth` for `depth`: their paths
    and values, without zeros.

    A plan takes any model and reads the sizes of its stacks by the names that such fields have in this library: what
    is called otherwise is left out of the arithmetic, which says so.
    """
    found: dict[str, int] = {}

    def look(config: object, at: str) -> None:
        for key, value in values(config).items():
            if key in ("network", "trunk", "transformer", "decoder") and dataclasses.is_dataclass(value):
                look(value, f"{at}{key}.")
            elif (key == name or key.endswith(f"_{name}")) and isinstance(value, int) and value:
                found[at + key] = value

    look(model, "")
    return found


def size_of(model: Trainable, name: str) -> int:
    """That size of a model's network, or of the model; 0 where it has none."""
    found = sizes_of(model, name)
    return next(
        (found[at + name] for at in ("network.transformer.", "transformer.", "network.", "") if at + name in found), 0
    )


def tokens_of(model: Trainable) -> int:
    """Tokens of an image in a family's network; 0 for what is no family."""
    if not model.capabilities.family:
        return 0
    return as_family(model).sample_spec().length // (sizes_of(model, "patch").get("network.patch", 1) ** 2)


def depths(model: Trainable) -> dict[str, int]:
    """The fields of a model, and of its parts, that count layers: name -> layers."""
    return sizes_of(model, "depth")


def shallow_copy_of_model(model: Trainable, layers: int) -> Trainable:
    """The same model with every depth that is larger than `layers` set to it."""
    for path, n in depths(model).items():
        model = replaced(model, path, min(n, layers))
    return model


def replaced(config: T, path: str, value: int) -> T:
    """The configuration with another value at a path of `sizes_of`."""
    head, _, rest = path.partition(".")
    return with_fields(config, **{head: replaced(values(config)[head], rest, value) if rest else value})
