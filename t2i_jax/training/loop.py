"""The training loop: any trainable, on any mesh, from the first step or from the last checkpoint."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import os
import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.progress import TextColumn

from t2i_jax.core import flops
from t2i_jax.core.config import ConfigError, read_json, refused, to_json
from t2i_jax.core.console import bar, console
from t2i_jax.core.jaxprs import UnknownForm
from t2i_jax.core.keys import apart, seed_key
from t2i_jax.core.memory import check_memory
from t2i_jax.core.narrow import fitted, learns_from_images, reads_codec
from t2i_jax.core.outputs import check_parent, check_utf8, write_json
from t2i_jax.core.params import Named, abstract, named, rebuild
from t2i_jax.core.platform import shared_cache
from t2i_jax.core.sharding import global_batch, put_on_mesh, rows_of, shardings, to_host
from t2i_jax.core.specs import check_batch
from t2i_jax.data.files import reporting
from t2i_jax.data.pipeline import Data
from t2i_jax.nn.lora import adapted, fixed_of, merged
from t2i_jax.storage.adapters import changed_start
from t2i_jax.storage.checkpoints import Checkpoints
from t2i_jax.storage.moved import moved
from t2i_jax.storage.remote import CACHE_FOLDER, resolve_path, staged_dir
from t2i_jax.storage.stored import stored
from t2i_jax.text.cut import check_vocabulary, noticing
from t2i_jax.training.experiment import Experiment, Frozen, frozen_parts, make_prepare, record_spec
from t2i_jax.training.guard import Guard
from t2i_jax.training.history import History
from t2i_jax.training.objectives import (
    by_optimizer,
    check_objectives,
    check_paths,
    forward_of,
    losses,
    prefix,
    stages,
    updates,
    without,
)
from t2i_jax.training.optimizer import with_rates
from t2i_jax.training.records import Records
from t2i_jax.training.start import Start, read_start
from t2i_jax.training.state import TrainState, carried_of, create, params_of
from t2i_jax.training.step import base_of, loss_inputs, make_step, step_keys
from t2i_jax.training.watch import raise_peer_lost, watchdog

Preview = Callable[["Trainer", TrainState, int], np.ndarray | None]


class Interrupted(Exception):
    """A signal stopped the run; it is saved and can be resumed with the same command."""

    def __init__(self, message: str, number: int = signal.SIGINT):
        super().__init__(message)
        self.signal = int(number)


T = TypeVar("T")


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
        with refused("model"):
            self.plain = abstract(experiment.model)
        lora = lambda model, key: adapted(model, train.lora, key) if train.lora.rank else model
        with refused("train.lora"):
            self.abstract = jax.eval_shape(lora, self.plain, jax.eval_shape(lambda: jax.random.key(0)))
        params = params_of(self.abstract)
        check_objectives(objectives, params)
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
            self.spec = record_spec(experiment, codec)
            self.checked = False
            self.prepare = make_prepare(codec, experiment.text, experiment.model.batch_spec())
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
            self.evaluate_step = jax.jit(self._losses, out_shardings=whole)

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
            check_batch(self.experiment.model.batch_spec(), ready)
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
        plus one forward pass of the frozen parts unless `frozen_too` is False.
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
        return once + 3 * learned


def with_shardings(tree: T, layout: T) -> T:
    """The shapes and dtypes of `tree` with the shardings of `layout`: abstract inputs to compile a step for."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, layout)


def check_run(folder: Path) -> None:
    """Errors: `ConfigError` if a folder holds files that are not those of a run: none of them are overwritten."""
    check_utf8(folder)
    check_parent(folder)
    if (folder / "config.json").exists():
        stored(folder)
        return
    for name in ("config.json", "data.json", "metrics.jsonl", "samples", "checkpoints"):
        path = folder / name
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise ConfigError(f"{path}: is there, and {folder} holds no run; choose another --run")


def say(text: str) -> None:
    """Print a line to the console, from one process only."""
    if jax.process_index() == 0:
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def remember_data(data: Data, folder: Path) -> None:
    """Write a description of the run's data to `data.json`; warn if it has changed since the last start."""
    path, now = folder / "data.json", data.describe()
    was = read_json(path).get("train", now["train"]) if path.exists() else now["train"]
    if was != now["train"]:
        say(
            f"the data of {folder} have changed since its last start: {was.get('records')} records then, "
            f"{now['train']['records']} now. It goes on at its place in their new order: of this epoch some come "
            "again and some are left out"
        )
    write_json(path, now)


def train(
    experiment: Experiment, folder: str | Path, preview: Preview | None = None, accept_changes: bool = False
) -> TrainState:
    """Train or resume the run in `folder` (which may be `gs://...` or `s3://...`); returns the last state.

    accept_changes: resume with another config than the run had, whatever has changed in it. Errors: `ConfigError` (a
    config that cannot run, or is not that of this run), `guard.NotFinite` (with the step and the layer of the first
    non-finite values), `CheckpointError`, `PeerLost` if another process is gone, `Interrupted` after a signal, with
    everything saved.
    """
    where = resolve_path(folder)
    cache = contextlib.nullcontext() if isinstance(where, Path) else shared_cache(str(where / CACHE_FOLDER))
    with cache, staged_dir(where) as local:
        return _train(experiment, local, where, preview, accept_changes)


def _train(experiment: Experiment, folder: Path, where: Path, preview: Preview | None, accept: bool) -> TrainState:
    """`train`, with its files in a local folder and its checkpoints in `where`, which may be in an object store."""
    t = experiment.train
    check_run(folder)
    trainer = Trainer(experiment, folder)
    objectives = trainer.objectives
    kept = t.keep, t.save_retries, t.save_backoff, t.keep_every, t.keep_best
    checkpoints = Checkpoints(where / "checkpoints", *kept, moved(trainer.abstract))
    history = History(experiment, folder, bool(checkpoints.steps()), accept)
    with jax.set_mesh(trainer.mesh), contextlib.ExitStack() as stack, raise_peer_lost(stack):
        stack.callback(checkpoints.manager.close)
        heartbeat = stack.enter_context(watchdog(t.stuck_after))
        stack.enter_context(reporting(heartbeat))
        restored = checkpoints.restore(trainer.target)
        if restored and trainer.begun and (changed := changed_start(folder, trainer.begun.step)):
            say(changed)
        begun = None if restored else trainer.begin()
        state, position = restored if restored else (trainer.start(begun), 0)
        done = int(state.step)
        main = jax.process_index() == 0
        if begun and main:
            write_json(folder / "start.json", begun.report())
        for line in begun.lines() if begun else ():
            say(line)
        begun = None  # its arrays are copies of those of the state
        history.note(done, say)
        records = (
            stack.enter_context(contextlib.closing(Records(folder, done, to_json(experiment), t.wandb)))
            if main
            else None
        )
        stopping = stack.enter_context(stop_signals())
        if done:
            console.print(f"{where}: going on from step {done}", soft_wrap=True)
        if done >= t.steps:
            return state
        if main:
            remember_data(experiment.data, folder)

        bar = stack.enter_context(progress("training", done, t.steps))
        pending: collections.deque = collections.deque()
        clock, since, work = time.perf_counter(), done, None
        guard = Guard(trainer, records.skipped if records else 0)

        def settle(limit: int) -> None:
            """Read metrics of all but the last `limit` steps, which are still being computed."""
            nonlocal clock, since
            while len(pending) > limit:
                step, metrics = pending.popleft()
                heartbeat(f"step {step}")
                begins = position - (len(pending) + 1) * experiment.data.batch_size
                skipped = guard.look(step, metrics, state, begins)
                if skipped or step % t.log_every == 0 or step == t.steps:
                    idle = tuple(prefix(objectives, n) for n, o in objectives.items() if step % o.every)
                    own = {k: v for k, v in metrics.items() if k not in ("norms", "finite", "spike")}
                    numbers = {k: float(v) for k, v in own.items() if not k.startswith(idle)}
                    numbers |= {"skipped": guard.skipped}
                    now = time.perf_counter()
                    rate = (step - since) / max(now - clock, 1e-9)
                    clock, since = now, step
                    numbers |= {"images_per_second": rate * experiment.data.batch_size}
                    peak = flops.peak(jax.devices()[0])
                    if work:
                        numbers |= {"flops_per_second": rate * work}
                    if work and peak:
                        numbers |= {"mfu": rate * work / (peak * trainer.mesh.size)}
                    if records:
                        records.write(step, numbers)
                    bar(step, numbers)

        def evaluate(step: int) -> dict[str, float]:
            """Held-out losses, if due."""
            nonlocal clock
            if not t.evaluate_every or (step % t.evaluate_every and step != t.steps):
                return {}
            began = time.perf_counter()
            numbers = trainer.evaluate(state)
            if records and numbers:
                records.write(step, numbers)
            clock += time.perf_counter() - began
            return numbers

        def look(step: int) -> None:
            """Save preview images, if due."""
            nonlocal clock
            began = time.perf_counter()
            if preview and t.preview_every and (step % t.preview_every == 0 or step == t.steps):
                drawn = preview(trainer, state, step)
                if records and drawn is not None:
                    records.image(step, "samples", drawn)
            clock += time.perf_counter() - began

        for step, batch in zip(range(done + 1, t.steps + 1), trainer.batches(position), strict=False):
            if work is None:
                try:
                    work = trainer.flops(batch)
                except UnknownForm as error:
                    work = 0.0
                    say(f"FLOP/s and MFU are left out: {error}")
            if t.profile and step == t.profile:
                jax.profiler.start_trace(str(folder / "profile"))
            state, metrics = trainer.step(state, trainer.frozen, batch)
            position += experiment.data.batch_size
            pending.append((step, metrics))
            settle(2)
            if t.profile and step == t.profile + 4:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            stop = stopping(step)
            last = step == t.steps
            due = stop or last or step % t.save_every == 0 or (t.keep_every and step % t.keep_every == 0)
            numbers = evaluate(step) if t.keep_best and not stop else {}  # first: the checkpoint is saved with them
            if due or checkpoints.better(numbers) or checkpoints.again(step):
                settle(0)
                checkpoints.save(state, position, step, numbers)
                heartbeat(f"the save of step {step} was begun")
            if stop:
                checkpoints.finish(state, position, step)
                raise Interrupted(f"stopped at step {step}, saved in {where}; the same command goes on from here", stop)
            if not t.keep_best:
                evaluate(step)
            look(step)
            heartbeat(f"what follows step {step}")
        settle(0)
        if int(state.step) < t.steps:
            raise ConfigError(f"data: the source ended at step {int(state.step)} of {t.steps}")
        checkpoints.finish(state, position, t.steps)
    return state


@contextlib.contextmanager
def stop_signals():
    """Context of a function (step) -> signal number, or 0 to continue. All processes stop at the same step."""
    asked: list[int] = []

    def note(number, _frame):
        if asked:  # a second Ctrl-C stops at once
            raise KeyboardInterrupt
        asked.append(number)

    several = jax.process_count() > 1
    signals = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    before = {}
    with contextlib.suppress(ValueError):  # signals can be set in the main thread only
        before = {s: signal.signal(s, note) for s in signals}
    try:
        # With several processes JAX's own service broadcasts the preemption notice and chooses a common step.
        common = lambda step: signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
        yield common if several else lambda step: asked[0] if asked else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def progress(title: str, done: int, total: int):
    """A bar with rate and remaining time on a terminal, else an occasional line; yields (step, numbers) -> None."""
    main = jax.process_index() == 0
    if not main:
        yield lambda step, numbers: None
        return
    brief = lambda n: "  ".join(
        f"{k.split('/')[-1] if not k.startswith('val') else k} {v:.4g}"
        for k, v in n.items()
        if k.endswith(("loss", "images_per_second", "mfu", "psnr", "accuracy"))
    )
    if not console.is_terminal:
        last = time.monotonic()

        def line(step, numbers):
            nonlocal last
            if time.monotonic() - last > 10 or step == total:
                last = time.monotonic()
                console.print(f"{title} {step}/{total}  {brief(numbers)}", soft_wrap=True)

        yield line
        return
    with bar(TextColumn("{task.fields[numbers]}")) as bars:
        task = bars.add_task(title, total=total, completed=done, numbers="compiling")
        yield lambda step, numbers: bars.update(task, completed=step, numbers=brief(numbers))
