"""An experiment ready to train: its mesh, frozen models, start, shardings and compiled step."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t2i_jax.core import flops
from t2i_jax.core.config import ConfigError, refused
from t2i_jax.core.frozen import Frozen
from t2i_jax.core.keys import apart, seed_key
from t2i_jax.core.memory import check_memory
from t2i_jax.core.narrow import fitted, learns_from_images, reads_codec
from t2i_jax.core.params import Named, abstract, named, rebuild
from t2i_jax.core.sharding import global_batch, put_on_mesh, rows_of, shardings, to_host
from t2i_jax.core.specs import check_batch, in_common
from t2i_jax.core.types import AnySize
from t2i_jax.nn.lora import adapted, fixed_of, merged
from t2i_jax.text.cut import check_vocabulary, noticing
from t2i_jax.training.experiment import Experiment, frozen_parts, make_prepare, record_spec, sized
from t2i_jax.training.objectives import (
    by_optimizer,
    check_objectives,
    check_paths,
    forward_of,
    losses,
    of_sizes,
    prefix,
    stages,
    updates,
    without,
)
from t2i_jax.training.optimizer import with_rates
from t2i_jax.training.start import Start, read_start
from t2i_jax.training.state import TrainState, carried_of, create, params_of
from t2i_jax.training.step import Metrics, base_of, loss_inputs, make_step, step_keys

T = TypeVar("T")
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class Trainer:
    """An experiment ready to train: mesh, frozen models, shardings and the compiled step, for `train` below.

    mesh: may have devices that are not present, for a plan; then nothing is put on them, and `frozen` is abstract.
    """

    def __init__(self, experiment: Experiment, folder: str | Path, mesh: Mesh | None = None):
        self.experiment, self.folder = experiment, Path(folder)
        train = experiment.train
        self.mesh: Mesh = experiment.mesh.build() if mesh is None else mesh
        objectives = experiment.model.objectives()
        shared = by_optimizer(objectives)
        for name in train.optimizers:
            if name not in shared:
                raise ConfigError(f"train.optimizers: there is no optimizer '{name}', only {', '.join(shared)}")
        lengths = {name: max(updates(several, train.steps), 1) for name, several in shared.items()}
        build = lambda name: with_rates(train.optimizer_of(name).build(lengths[name]), train.rates)
        self.optimizers = {name: build(name) for name in shared}
        self.forward = forward_of(experiment.model)
        self.sizes: Mapping[tuple[int, int], AnySize] = {}
        with refused("model"):
            self.plain = abstract(experiment.model)
        lora = lambda model, key: adapted(model, train.lora, key) if train.lora.rank else model
        with refused("train.lora"):
            self.abstract = jax.eval_shape(lora, self.plain, jax.eval_shape(lambda: jax.random.key(0)))
        params = params_of(self.abstract)
        check_objectives(objectives, params)
        check_paths("train.frozen", train.frozen, params | carried_of(self.abstract))
        self.objectives = without(train.frozen, objectives, params)
        check_paths("train.rates", tuple(train.rates), params)
        check_paths("train.ema_params", train.ema_params, params)
        parts = experiment.data.batch_size % (train.accumulate * self.mesh.shape["data"] * self.mesh.shape["fsdp"])
        if parts:
            raise ConfigError(
                f"data.batch_size {experiment.data.batch_size} must be a multiple of accumulate x data x fsdp = "
                f"{train.accumulate} x {self.mesh.shape['data']} x {self.mesh.shape['fsdp']}"
            )
        with refused():
            check_vocabulary(experiment.text, experiment.model.batch_spec())
        frozen, self.codec = frozen_parts(experiment)
        with jax.set_mesh(self.mesh):
            put = put_on_mesh if mesh is None else with_shardings
            self.frozen = put(frozen, shardings(frozen, self.mesh))
            codec = self.codec.config if self.codec else None
            self.sizes = sized(experiment, codec)
            models = list(self.sizes.values()) or [experiment.model]
            self.spec = in_common([record_spec(experiment, codec, model) for model in models])
            self.ready = in_common([model.batch_spec() for model in models])
            self.checked = False
            self.prepare = make_prepare(codec, experiment.text, self.ready)
            if self.sizes and train.lora.dropout:
                raise ConfigError("train.lora.dropout with data.shapes: adapters are added to the weights there")
            plain = merged if train.lora.rank else lambda model: model
            self.objectives = of_sizes(self.objectives, experiment.model, self.sizes, plain)
            step = make_step(
                self.abstract,
                self.objectives,
                self.optimizers,
                self.prepare,
                self.forward,
                seed=train.seed,
                accumulate=train.accumulate,
                ema=train.ema,
                spike=train.spike,
                fixed=train.frozen,
            )
            self.init = lambda key, codec, start=None, values={}: create(
                lambda key: self._fresh(key, codec, start, values),
                self.objectives,
                self.optimizers,
                key,
                ema=train.ema_params if train.ema else None,
                spikes=train.spike > 0,
            )
            # The key is made under eval_shape too: the devices of a plan cannot make one.
            reads = experiment.model.capabilities.reads_codec
            if reads and self.codec is None and mesh is None:
                kind = type(experiment.model).__name__
                raise ConfigError(f"codec: a {kind} reads the vectors of its codec, and none is set")
            self.read = self.frozen.get("codec") if reads else None
            self.begun = self._read_start() if train.lora.rank and mesh is None else None
            if train.lora.rank:
                self.frozen["base"] = self._base()
            target = jax.eval_shape(lambda codec: self.init(jax.random.key(0), codec), self.read)
            # Without out_shardings an Auto mesh would replicate the moments, and eval_shape drops shardings.
            self.layout = shardings(target, self.mesh)
            self.target = with_shardings(target, self.layout)
            whole = NamedSharding(self.mesh, P())
            self.step = jax.jit(step, donate_argnums=0, out_shardings=(self.layout, whole))
            self.compiled: dict[Shapes, jax.stages.Compiled] = {}
            self.evaluate_step = jax.jit(self._losses, out_shardings=whole)

    def warm(self, state: TrainState, batch: dict[str, jax.Array]) -> Iterator[int]:
        """Compile the step for each of `Data.shapes` that images have, from a batch of one of them; gives how many are
        compiled."""
        data = self.experiment.data
        there = sorted(set(data.buckets().tolist()))
        factor = self.codec.config.spec.factor if self.codec else 1
        factors = {"image": 1, "codes": factor, "latents": factor}
        for done, (rows, columns) in enumerate((data.shapes[k] for k in there), 1):
            other: dict[str, jax.Array | jax.ShapeDtypeStruct] = dict(batch)
            for name in factors.keys() & batch.keys():
                x, grid = batch[name], (rows // factors[name], columns // factors[name])
                other[name] = jax.ShapeDtypeStruct((len(x), *grid, *x.shape[3:]), x.dtype, sharding=x.sharding)
            self.compiled[shapes_of(other)] = self.step.lower(state, self.frozen, other).compile()
            yield done

    def update(self, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        """The state after a step, whose arrays the old one no longer has, and metrics."""
        return self.compiled.get(shapes_of(batch), self.step)(state, self.frozen, batch)

    def start(self, begun: Start | None = None) -> TrainState:
        """The state before the first step. begun: the weights that the run begins with, where they fit."""
        # Hundreds of independent random draws that run once: the CPU compiler would take a minute to optimise them.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
        if jax.default_backend() == "cpu" and jax.process_count() == 1:
            size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.target))
            check_memory("model: its parameters and their optimizer state", size)
        with jax.set_mesh(self.mesh):
            init = lambda key, codec, values: self.init(key, codec, begun, values)
            init = jax.jit(init, out_shardings=self.layout, compiler_options=options)
            state = init(seed_key(self.experiment.train.seed), self.read, begun.values if begun else {})
            taken = () if begun is None else tuple(begun.values)
            return self._fitted(state, taken) if self.experiment.model.capabilities.fitted else state

    def _fitted(self, state: TrainState, taken: Sequence[str]) -> TrainState:
        """The state with what is computed from the first training examples, but for the arrays `taken` of another
        model, to which its other weights are used."""
        config = fitted(self.experiment.model)
        key, of = step_keys(self.experiment.train.seed, 0)[1], config.fit_fields
        prepare = jax.jit(lambda frozen, batch: {k: v for k, v in self.prepare(frozen, batch, key).items() if k in of})
        count = -(-config.fit_examples // self.experiment.data.batch_size)
        with contextlib.closing(self.batches(0)) as stream:
            batches = (prepare(self.frozen, batch) for batch in itertools.islice(stream, count))
            with refused("model"):
                model = config.fitted(self.model(state), ({k: to_host(v) for k, v in b.items()} for b in batches))
        carried = put_on_mesh(jax.device_get(carried_of(model)), self.layout.carried)
        return dataclasses.replace(state, carried=carried | {k: state.carried[k] for k in taken if k in carried})

    def begin(self) -> Start | None:
        """The weights of `train.start`; None where it is empty. Errors: as `read_start`."""
        return self.begun or (self._read_start() if self.experiment.train.start else None)

    def _read_start(self) -> Start:
        source = self.experiment.train.start
        if os.path.realpath(source) == os.path.realpath(self.folder):
            raise ConfigError(f"train.start: {source} is the folder of this run itself")
        layout = {k: v.get_value() for k, v in named(shardings(self.plain, self.mesh)).items()}
        return read_start(self.experiment, self.plain, layout)

    def _base(self) -> Named:
        """The parameters that adapters leave as they are; abstract for a plan. `begun` forgets them."""
        seed, begun = self.experiment.train.seed, self.begun
        make = lambda key, codec, fixed, others: fixed_of(self._fresh(key, codec, begun, {**fixed, **others}))
        base = jax.eval_shape(lambda codec: make(jax.random.key(0), codec, {}, {}), self.read)
        layout = shardings(base, self.mesh)
        if begun is None:
            return with_shardings(base, layout)
        lost = [k for k in (*begun.new, *begun.resized) if k in base or f"{k}.base" in base]
        if lost:
            raise ConfigError(
                f"train.lora: {', '.join(lost[:4])} are not as in {begun.source}, and adapters do not train them: "
                "name them in train.lora.whole"
            )
        names = {k.removesuffix(".base") for k in base}
        fixed = {k: v for k, v in begun.values.items() if k in names}
        self.begun = begun.without(names)
        # Donated: a model that is trained by adapters may fill the devices.
        make = jax.jit(make, out_shardings=layout, donate_argnames="fixed")
        return make(seed_key(seed), self.read, fixed, self.begun.values)

    def _fresh(
        self, key: jax.Array, codec: nnx.Module | None, start: Start | None, values: Mapping[str, jax.Array]
    ) -> nnx.Module:
        """A model with fresh parameters, those of a start in their places, and with the vectors of the codec of these
        weights where it reads them."""
        config = self.experiment.model
        model = config.init(key)
        model = model if start is None else start.into(model, values)
        if self.codec is not None and codec is not None:
            model = reads_codec(config).with_codec(model, self.codec.config, codec)
        lora = self.experiment.train.lora
        return adapted(model, lora, apart(key)) if lora.rank else model

    def model(self, state: TrainState, frozen: Frozen | None = None) -> nnx.Module:
        """The model to evaluate and sample: with averaged parameters if the run keeps them, and without adapters, which
        are added to its matrices. frozen: as arguments of a compiled function."""
        base = base_of(self.frozen if frozen is None else frozen)
        model = rebuild(self.abstract, {**base, **state.params, **(state.ema or {}), **state.carried})
        return merged(model) if self.experiment.train.lora.rank else model

    def check(self, batch: dict[str, np.ndarray]) -> None:
        """Check the shapes and dtypes of the prepared batch once, before the first loss.

        Errors: `DataError` naming what the model cannot read.
        """
        if not self.checked:
            shape = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
            key = jax.eval_shape(lambda: jax.random.key(0))
            ready = jax.eval_shape(self.prepare, shape(self.frozen), shape(batch), key)
            check_batch(self.ready, ready)
            self.checked = True

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a batch as part of the global batch."""
        return global_batch(batch, self.mesh, self.experiment.data.batch_size)

    def batches(self, position: int, split: str = "train") -> Generator[dict[str, jax.Array], None, None]:
        """Global batches from a data position on; the next one is always in transfer to the devices."""
        e = self.experiment
        rows = rows_of(self.mesh, e.data.batch_size)
        ahead: collections.deque = collections.deque()
        captions = None if learns_from_images(e.text) else noticing(e.text)  # None: captions are not read
        stream = e.data.batches(captions, position, rows, split, self.spec)
        with contextlib.closing(stream):
            for batch in stream:
                self.check(batch)
                ahead.append(self.put(batch))
                if len(ahead) > 1:
                    yield ahead.popleft()
            yield from ahead

    def _losses(self, state: TrainState, frozen: Frozen, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        key, draw = step_keys(0, 0)  # the same for all batches and evaluations
        model, inputs, metrics = self.model(state, frozen), self.prepare(frozen, batch, draw) | loss_inputs(frozen), {}
        found = losses(self.objectives, self.forward, model, inputs, key, state.step, False)
        for name, output in found.items():
            numbers = {"loss": output.loss, **output.metrics}
            metrics |= {f"{prefix(self.objectives, name)}{k}": v for k, v in numbers.items()}
        return metrics

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Mean metrics over the first batches of the held-out split."""
        wanted, seen = self.experiment.train.evaluate_batches, []
        for batch in self.batches(0, "val"):
            seen.append(self.evaluate_step(state, self.frozen, batch))
            if len(seen) == wanted:
                break
        return {f"val/{k}": float(np.mean([m[k] for m in seen])) for k in seen[0]} if seen else {}

    def flops(self, batch: dict[str, jax.Array], frozen_too: bool = True) -> float:
        """Model FLOPs of a step.

        Three times the forward passes, the shared one and that of each objective trained in it, without recomputation;
        twice with adapters, as the weights that they adapt have no gradients. Plus one forward pass of the frozen parts
        unless `frozen_too` is False.
        """
        shape = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        frozen, batch = shape(self.frozen), shape(batch)
        key, step = jax.eval_shape(lambda: jax.random.key(0)), jnp.zeros((), jnp.int32)
        ready = jax.eval_shape(self.prepare, frozen, batch, key) | loss_inputs(frozen)
        once = flops.count(self.prepare, frozen, batch, key) if frozen_too else 0.0
        learned = 0.0
        if self.forward is not None:
            forward = self.forward
            run = lambda m, b, k: forward(m, b, k, step, True)
            learned += len(stages(self.objectives)) * flops.count(run, self.abstract, ready, key)
            ready |= {"outputs": jax.eval_shape(run, self.abstract, ready, key)}
        for objective in self.objectives.values():
            loss = lambda m, b, k, o=objective: o.loss(m, b, k, step, True).loss
            learned += flops.count(loss, self.abstract, ready, key) / objective.every
        return once + (2 if self.experiment.train.lora.rank else 3) * learned


def shapes_of(batch: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> Shapes:
    """The shapes of a batch, which a step is compiled for."""
    return tuple(sorted((name, tuple(x.shape)) for name, x in batch.items()))


def with_shardings(tree: T, layout: T) -> T:
    """The shapes and dtypes of `tree` with the shardings of `layout`: abstract inputs to compile a step for."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, layout)
