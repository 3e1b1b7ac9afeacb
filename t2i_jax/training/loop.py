"""The training loop: any trainable, on any mesh, from the first step or from the last checkpoint."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.progress import TextColumn

from t2i_jax.core import flops
from t2i_jax.core.config import ConfigError, read_json, to_json
from t2i_jax.core.console import bar, console
from t2i_jax.core.errors import Interrupted as Interrupted
from t2i_jax.core.jaxprs import UnknownForm
from t2i_jax.core.outputs import check_parent, check_utf8, write_json
from t2i_jax.core.platform import shared_cache
from t2i_jax.data.files import reporting
from t2i_jax.data.pipeline import Data
from t2i_jax.storage.adapters import changed_start
from t2i_jax.storage.checkpoints import Checkpoints
from t2i_jax.storage.moved import moved
from t2i_jax.storage.remote import CACHE_FOLDER, resolve_path, staged_dir
from t2i_jax.storage.stored import stored
from t2i_jax.training.experiment import Experiment
from t2i_jax.training.guard import Guard
from t2i_jax.training.history import History
from t2i_jax.training.objectives import (
    prefix,
)
from t2i_jax.training.records import Records
from t2i_jax.training.state import TrainState
from t2i_jax.training.trainer import Shapes, Trainer, shapes_of
from t2i_jax.training.watch import raise_peer_lost, watchdog

Preview = Callable[[Trainer, TrainState, int], np.ndarray | None]


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
        if t.evaluate_every:
            experiment.data.check_split("val")  # now, and not when the first evaluation is due
        if main:
            remember_data(experiment.data, folder)

        bar = stack.enter_context(progress("training", done, t.steps))
        pending: collections.deque = collections.deque()
        clock, since = time.perf_counter(), done
        works: dict[Shapes, float] = {}
        spent = 0.0
        guard = Guard(trainer, records.skipped if records else 0)

        def settle(limit: int) -> None:
            """Read metrics of all but the last `limit` steps, which are still being computed."""
            nonlocal clock, since, spent
            while len(pending) > limit:
                step, metrics, work = pending.popleft()
                spent += work
                heartbeat(f"step {step}")
                begins = position - (len(pending) + 1) * experiment.data.batch_size
                skipped = guard.look(step, metrics, state, begins)
                if skipped or step % t.log_every == 0 or step == t.steps:
                    idle = tuple(prefix(objectives, n) for n, o in objectives.items() if step % o.every)
                    own = {k: v for k, v in metrics.items() if k not in ("norms", "finite", "spike")}
                    numbers = {k: float(v) for k, v in own.items() if not k.startswith(idle)}
                    numbers |= {"skipped": guard.skipped}
                    now = time.perf_counter()
                    seconds = max(now - clock, 1e-9)
                    rate, speed = (step - since) / seconds, spent / seconds
                    clock, since, spent = now, step, 0.0
                    numbers |= {"images_per_second": rate * experiment.data.batch_size}
                    peak = flops.peak(jax.devices()[0])
                    if work:
                        numbers |= {"flops_per_second": speed}
                    if work and peak:
                        numbers |= {"mfu": speed / (peak * trainer.mesh.size)}
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
            shapes = shapes_of(batch)
            if not works and experiment.data.shapes:
                count = 0
                for count in trainer.warm(state, batch):
                    heartbeat(f"the step was compiled for {count} shapes")
                say(f"the step is compiled for {count} shapes of images")
            if shapes not in works:
                try:
                    works[shapes] = trainer.flops(batch)
                except UnknownForm as error:
                    works[shapes] = 0.0
                    say(f"FLOP/s and MFU are left out: {error}")
            if t.profile and step == t.profile:
                jax.profiler.start_trace(str(folder / "profile"))
            state, metrics = trainer.update(state, batch)
            position += experiment.data.batch_size
            pending.append((step, metrics, works[shapes]))
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
