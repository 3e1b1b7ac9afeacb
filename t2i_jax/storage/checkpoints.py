"""Checkpoints: the train state as plain named arrays, written asynchronously and atomically, read onto any mesh."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NotRequired, Protocol, Self, TypedDict, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import checkpoint_managers as managers
from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo
from rich.markup import escape

from t2i_jax.core.config import ConfigError
from t2i_jax.core.console import console
from t2i_jax.core.errors import CheckpointError as CheckpointError
from t2i_jax.core.errors import NotWritten as NotWritten
from t2i_jax.core.memory import return_freed
from t2i_jax.core.sharding import all_processes_agree, on_cpu
from t2i_jax.interop.names import Table
from t2i_jax.storage.checksums import checksums
from t2i_jax.storage.moved import Move
from t2i_jax.storage.moved import moves as moves_of
from t2i_jax.storage.remote import resolve_path

MOST_BYTES = 2**27
"""Bytes of weights that are read at a time."""


class State(Protocol):
    """What is stored: named arrays (`training.state.TrainState`)."""

    def flat(self) -> dict[str, jax.Array]:
        """All arrays by name."""
        ...

    def unflat(self, arrays: dict[str, jax.Array]) -> Self:
        """The same structure with other arrays."""
        ...


S = TypeVar("S", bound=State)
R = TypeVar("R")
Shapes = dict[str, list[list[int] | str]]
"""shape and dtype of each array"""


class Meta(TypedDict):
    """What is stored besides the arrays, as JSON."""

    position: int
    arrays: Shapes
    checksums: NotRequired[dict[str, int]]
    metrics: NotRequired[dict[str, float]]
    crc32: NotRequired[int]


Lay = Callable[[Path, dict[str, jax.ShapeDtypeStruct]], Mapping[str, jax.sharding.Sharding]]


class Damaged(ValueError):
    """A checkpoint that can be read and does not hold what was written."""


class Checkpoints:
    """The checkpoints of one run folder, newest last. Its methods are calls of all processes.

    `save` returns at once: the arrays are copied, and the files are written during the next steps, with a checksum of
    each array, which `restore` verifies; it takes the newest checkpoint that passes, and logs those that it skipped.

    Failed writes are logged and retried up to `retries` times in a row, after `backoff` seconds and twice as long each
    time: with the current state when `again` is true, by `finish` with the last one. After the last retry the run
    stops with the reason. The checkpoints before it stay as they were.

    The last `keep` stay on disk; with `every` also those whose step is a multiple of it; with `best` (as `Best.parse`
    reads it) also the one with the best value of a metric among those that were saved with one.

    older: `storage.moved.moved` of the model; arrays under such names are read as what they are now.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = 3,
        retries: int = 3,
        backoff: float = 10.0,
        every: int = 0,
        best: str = "",
        older: Table = MappingProxyType({}),
    ):
        where = resolve_path(folder)
        self.folder = where.absolute() if isinstance(where, Path) else where
        self.folder.mkdir(parents=True, exist_ok=True)
        self.best = Best.parse(best) if best else None
        policies: list[managers.PreservationPolicy] = [managers.LatestN(keep)]
        policies += [managers.EveryNSteps(every)] if every else []
        policies += [self.best] if self.best else []
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies), enable_async_checkpointing=True
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)
        self.retries, self.backoff, self.older = retries, backoff, older
        self.moves: dict[int, tuple[dict[str, Move], Meta]] = {}  # of checkpoints with older names
        self.begun: int | None = None  # step of the write that is under way
        self.last, self.failures, self.until = 0, 0, 0.0
        self.error: Exception | None = None  # the error of a write that did not start
        for step in self.steps() if self.best else ():
            with contextlib.suppress(Exception):  # a damaged one has no value, and `restore` will say so
                self._measure(step, self._meta(step).get("metrics", {}))

    def steps(self) -> list[int]:
        return sorted(self.manager.all_steps())

    # ------------------------------------------------------------------------------------------------------ writing

    def better(self, metrics: Mapping[str, float]) -> bool:
        """Whether the metric of `best` is better than that of each checkpoint here.

        Errors: `ConfigError` where it is not among `metrics`.
        """
        if not self.best or not metrics:
            return False
        if self.best.metric not in metrics:
            raise ConfigError(f"train.keep_best: evaluation gives no '{self.best.metric}', only {', '.join(metrics)}")
        value, there = metrics[self.best.metric], set(self.steps())
        others = [v for step, v in self.best.values.items() if step in there]
        return all_processes_agree(
            math.isfinite(value) and all(self.best.sign * (value - other) > 0 for other in others)
        )

    def _measure(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metric of the checkpoint of a step, if it has one."""
        assert self.best
        self.best.values.pop(step, None)
        if math.isfinite(value := metrics.get(self.best.metric, math.nan)):
            self.best.values[step] = value

    def save(self, state: State, position: int, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Begin to write `state`; `position` is the number of examples consumed so far, `metrics` are those of this
        state, if it was evaluated."""
        self._settle()
        flat = state.flat()
        arrays: Shapes = {k: [list(v.shape), str(v.dtype)] for k, v in flat.items()}
        meta = Meta(position=position, arrays=arrays, checksums=checksums(flat), metrics=dict(metrics or {}))
        if self.best:
            self._measure(step, metrics or {})
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(flat), meta=ocp.args.JsonSave(meta | {"crc32": crc32(meta)})
        )
        self.begun = self.last = step
        try:
            self.manager.save(step, args=args, force=True)
        except Exception as error:  # any error of the storage
            self.error = error

    def again(self, step: int) -> bool:
        """Whether a write has failed and it is time to repeat it with the state after `step`.

        A process alone looks after each step; several agree 1, 2, 4, 8, ... steps after the save that failed.
        """
        since = step - self.last
        if (self.begun is None and not self.failures) or (jax.process_count() > 1 and since & (since - 1)):
            return False
        if self.begun is not None:
            if not all_processes_agree(self.error is not None or not self.manager.is_saving_in_progress()):
                return False
            self._settle()
        return self.failures > 0 and all_processes_agree(time.monotonic() >= self.until)

    def finish(self, state: State, position: int, step: int) -> None:
        """Until the checkpoint of this step, begun already or not, is on disk.

        Errors: `CheckpointError` where it could not be written, however often it was tried.
        """
        self._settle()
        while step not in self.steps():
            time.sleep(max(0.0, self.until - time.monotonic()) if self.failures else 0.0)
            self.save(state, position, step)
            self._settle()

    def close(self) -> None:
        """Wait for what was begun, and end the writer. Errors: `CheckpointError` where it could not be written."""
        self.retries = 0
        try:
            self._settle()
        finally:
            self.manager.close()

    def _settle(self) -> None:
        """Wait for the write in progress; count and log its failure, or raise it after the last retry."""
        if self.begun is None:
            return
        step, self.begun, error, self.error = self.begun, None, self.error, None
        try:
            if error is None:
                self.manager.wait_until_finished()
        except Exception as failure:
            error = failure
        if all_processes_agree(error is None):
            self.failures = 0
            return
        self.failures += 1
        if self.best:
            self.best.values.pop(step, None)
        self.manager.reload()  # the checkpoint to be replaced is still there
        good = self.steps()
        kept = f"the last good one is {self.folder / str(good[-1])}" if good else "there is none yet"
        reason = " ".join(str(error or "another process could not write its part").split())[:300]
        text = f"checkpoint of step {step} could not be written to {self.folder}: {kept}. {reason}"
        if self.failures > self.retries:
            raise NotWritten(text) from error
        pause = self.backoff * 2 ** (self.failures - 1)
        self.until = time.monotonic() + pause
        tries = f"try {self.failures} of {self.retries} in {pause:.3g} s"
        console.print(f"[yellow]{escape(text)}; {tries}[/]", soft_wrap=True)

    # ------------------------------------------------------------------------------------------------------ reading

    def restore(self, target: S) -> tuple[S, int] | None:
        """The newest sound state, placed as `target` (abstract arrays with shardings), and its data position.

        Returns None where there is no checkpoint yet. Optimiser state of parameters that were not trained before
        starts at zero, a new average at the parameters, and both are logged.

        Errors: `ConfigError` where the arrays are those of another model; `CheckpointError` where checkpoints exist and
        none is sound.
        """
        failures: dict[int, str] = {}
        for step in reversed(self.steps()):
            error, meta, found, fresh = None, Meta(position=0, arrays={}), {}, {}
            try:
                meta = self._meta(step)
                fresh = self._fits(step, meta["arrays"], target)
                found = self._arrays(step, self._saved(meta["arrays"], target))
            except ConfigError:
                raise
            except Exception as failure:  # any error of the reader over a damaged file
                error = failure
            # One process may have read a damaged part that the others did not read: all verify together.
            if all_processes_agree(error is None):
                try:
                    self._verify(meta, found)
                except Damaged as failure:
                    error = failure
                else:
                    # Only where another is sound: if none can be read, the reader may be at fault.
                    for damaged in failures:
                        self._set_aside(damaged)
                    return target.unflat(found | started(fresh, found)), int(meta["position"])
            failures[step] = self._passed_over(step, error)
        if failures:
            raise CheckpointError("no checkpoint can be read:\n  " + "\n  ".join(failures.values()))
        return None

    def arrays(self, prefix: str, step: int | None = None) -> dict[str, np.ndarray]:
        """The arrays whose names begin with `prefix` (`ema/`, say) of the newest sound checkpoint, on the host."""
        choose = lambda saved: {k.removeprefix(prefix): k for k in saved if k.startswith(prefix)}
        lay = lambda _, shapes: dict.fromkeys(shapes, on_cpu())
        return self._newest(choose, lay, lambda _, x: np.asarray(x), only=step)[1]

    def weights(self, lay: Lay, use: Callable[[str, jax.Array], R], together: bool = False) -> tuple[int, dict[str, R]]:
        """The step of the newest sound checkpoint, and its weights by their names in the model: the average where there
        is one, else the parameters. Nothing else is read.

        lay: from the folder and the shapes of all weights to their shardings, before any is read. use: called
        with each weight once it is read and verified; at most `MOST_BYTES` bytes, or one weight, are held until then.
        together: the shardings are of devices of several processes, which all call this.
        """
        part = lambda saved, prefix: {k.removeprefix(prefix): k for k in saved if k.startswith(prefix)}
        choose = lambda saved: part(saved, "params/") | part(saved, "carried/") | part(saved, "ema/")
        return self._newest(choose, lay, use, together)

    def _newest(
        self,
        choose: Callable[[Iterable[str]], dict[str, str]],
        lay: Lay,
        use: Callable[[str, jax.Array], R],
        together: bool = False,
        only: int | None = None,
    ) -> tuple[int, dict[str, R]]:
        """The newest sound checkpoint and the results of `use` for its arrays; choose: all names -> those wanted."""
        failures = []
        for step in [only] if only is not None else reversed(self.steps()):
            made: dict[str, R] = {}
            error, meta, chosen, wanted = None, Meta(position=0, arrays={}), {}, {}
            try:
                meta = self._meta(step)
                chosen = choose(meta["arrays"])
                shapes = {k: jax.ShapeDtypeStruct(tuple(s), d) for k, (s, d) in meta["arrays"].items()}
                layout = lay(self.folder, {k: shapes[name] for k, name in chosen.items()})
                wanted = {
                    k: jax.ShapeDtypeStruct(shapes[n].shape, shapes[n].dtype, sharding=layout[k])
                    for k, n in chosen.items()
                }
            except CheckpointError:
                raise
            except Exception as failure:  # any error of the reader over a damaged file
                error = failure
            for group in groups(wanted):
                found = {}
                try:
                    if error is None and group:
                        found = self._arrays(step, {chosen[k]: wanted[k] for k in group}, part=True)
                except Exception as failure:
                    error = failure
                if not (all_processes_agree(error is None) if together else error is None):
                    break
                try:
                    self._verify(meta, found)
                except Damaged as failure:
                    error = failure
                    break
                for name in group:
                    made[name] = use(name, found.pop(chosen[name]))
                return_freed()  # the reader's buffers are as large as what it read
            if error is None and len(made) == len(wanted):
                return step, made
            failures.append(self._passed_over(step, error))
        raise CheckpointError("\n  ".join([f"{self.folder}: there is no checkpoint that can be read", *failures]))

    def _meta(self, step: int) -> Meta:
        """The description of a checkpoint. Errors: `Damaged` where its own checksum does not match."""
        meta = self._read(step, "meta", ocp.args.JsonRestore())
        own = meta.pop("crc32", None)  # none: made before there were checksums
        if own is not None and own != crc32(meta):
            raise Damaged("its description is not what was written")
        return self._moved(step, meta)

    def _moved(self, step: int, meta: Meta) -> Meta:
        """The description with arrays as they are now called, where they are stored under older names."""
        shapes = {k: jax.ShapeDtypeStruct(tuple(s), d) for k, (s, d) in meta["arrays"].items()} if self.older else {}
        if not (moves := moves_of(self.older, shapes)):
            return meta
        self.moves[step] = moves, meta
        gone = {name for move in moves.values() for name in move.names}
        kept: Shapes = {k: v for k, v in meta["arrays"].items() if k not in gone}
        new = {k: move.shape(shapes) for k, move in moves.items()}
        return {**meta, "arrays": kept | {k: [list(x.shape), str(x.dtype)] for k, x in new.items()}}

    def _arrays(
        self, step: int, target: Mapping[str, jax.Array | jax.ShapeDtypeStruct], part: bool = False
    ) -> dict[str, jax.Array]:
        """The arrays of a checkpoint as `target` has them; part: it has not all of them.

        Those with older names are read whole, on the host, and checked here.
        """
        moves, meta = self.moves.get(step, ({}, Meta(position=0, arrays={})))
        if mine := {k: moves[k] for k in target if k in moves}:
            others = {k: x for k, x in target.items() if k not in mine}
            stored = {n: meta["arrays"][n] for move in mine.values() for n in move.names}
            layout = on_cpu()
            old = {n: jax.ShapeDtypeStruct(tuple(s), d, sharding=layout) for n, (s, d) in stored.items()}
            found = self._stored(step, old, part=True)
            self._verify(meta, found)
            parts = {n: np.asarray(x) for n, x in found.items()}
            made = self._stored(step, others, part=True)
            for k, move in mine.items():
                array, sharding = move.array(parts), target[k].sharding
                made[k] = jax.make_array_from_callback(array.shape, sharding, lambda index, x=array: x[index])
            return made
        return self._stored(step, target, part)

    def _stored(
        self, step: int, target: Mapping[str, jax.Array | jax.ShapeDtypeStruct], part: bool
    ) -> dict[str, jax.Array]:
        """The arrays of a checkpoint under the names that they have there."""
        if not target:
            return {}
        whole = ocp.args.StandardRestore(target)
        some = ocp.args.PyTreeRestore(
            target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
        )
        arrays = self._read(step, "state", some if part else whole)
        for name, x in arrays.items():
            wanted = target[name]
            if (x.shape, x.dtype) != (wanted.shape, wanted.dtype):
                raise Damaged(f"{name} is {x.dtype} {x.shape}, not {wanted.dtype} {wanted.shape}")
            if not x.sharding.is_equivalent_to(wanted.sharding, x.ndim):
                raise Damaged(f"{name} is sharded as {x.sharding}, not as {wanted.sharding}")
        return arrays

    def _verify(self, meta: Meta, arrays: Mapping[str, jax.Array]) -> None:
        """Errors: `Damaged` that names the arrays whose bytes are not those that were written."""
        if "checksums" not in meta:
            return
        known = meta["checksums"]
        wrong = [k for k, n in checksums({k: x for k, x in arrays.items() if k in known}).items() if n != known[k]]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise Damaged(f"the bytes of {', '.join(wrong[:3])}{more} are not those that were written")

    def _read(self, step: int, item: str, args: ocp.args.CheckpointArgs) -> Any:
        # Each process reads by itself: one that meets a damaged file must not leave the others in a barrier.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=None, active_processes={jax.process_index()}, barrier_sync_key_prefix=str(jax.process_index())
        )
        handler = ocp.CompositeCheckpointHandler()
        with contextlib.closing(ocp.Checkpointer(handler, multiprocessing_options=alone)) as reader:
            return reader.restore(self.folder / str(step), args=ocp.args.Composite(**{item: args}))[item]

    def _passed_over(self, step: int, error: Exception | None) -> str:
        """Log that a checkpoint is not used; returns the message."""
        lines = str(error).strip().splitlines() if error else ["another process could not read its part"]
        reason = f"{type(error).__name__}: {''.join(lines[:1])[:200]}" if error else lines[0]
        text = f"{self.folder / str(step)} ({reason})"
        console.print(f"[yellow]checkpoint passed over, it cannot be read: {escape(text)}[/]", soft_wrap=True)
        return text

    def _set_aside(self, step: int) -> None:
        """Rename a damaged checkpoint, so that its step can be written again and nothing is lost."""
        if jax.process_index() == 0:
            at = self.folder / str(step)
            at.rename(next(p for n in itertools.count(1) if not (p := self.folder / f"damaged-{step}-{n}").exists()))
        multihost_utils.sync_global_devices(f"set aside {step}")
        self.manager.reload()

    def _fits(self, step: int, saved: Shapes, target: State) -> dict[str, jax.Array]:
        """The abstract arrays of what follows the parameters (optimisers, average, running norms) that the checkpoint
        lacks. Errors: `ConfigError` where it lacks others."""
        wanted = {k: [list(v.shape), str(v.dtype)] for k, v in target.flat().items()}
        follows = lambda name: name.startswith(("optimizer/", "ema/", "gradient_norms/"))
        wrong = [f"missing: {k}" for k in wanted if k not in saved and not follows(k)]
        wrong += [f"not in this model: {k}" for k in saved if k not in wanted and not follows(k)]
        wrong += [f"{k}: saved {saved[k]}, wanted {v}" for k, v in wanted.items() if k in saved and saved[k] != v]
        if wrong:
            more = f"\n  and {len(wrong) - 12} more" if len(wrong) > 12 else ""
            raise ConfigError(
                f"{self.folder / str(step)} holds another model than the config describes:\n  "
                + "\n  ".join(wrong[:12])
                + more
            )
        fresh = {k: v for k, v in target.flat().items() if k not in saved}
        if fresh:
            some = ", ".join(list(fresh)[:3])
            message = f"{self.folder / str(step)}: {len(fresh)} arrays that it lacks start anew: {some}"
            console.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)
        return fresh

    @staticmethod
    def _saved(saved: Shapes, target: State) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
        """What to read of a checkpoint: its arrays, placed as `target` where that has them, else on every device."""
        wanted = target.flat()
        layouts = (v.sharding for v in wanted.values())
        whole = next((NamedSharding(s.mesh, P()) for s in layouts if isinstance(s, NamedSharding)), None)
        rest = {
            k: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=whole or next(iter(wanted.values())).sharding)
            for k, (shape, dtype) in saved.items()
            if k not in wanted
        }
        return {k: wanted[k] for k in saved if k in wanted} | rest


@dataclasses.dataclass
class Best:
    """Keeps the checkpoint with the best value of a metric; an orbax preservation policy."""

    metric: str
    sign: int
    """1 where higher is better, -1 where lower is"""
    values: dict[int, float] = dataclasses.field(default_factory=dict)
    """of the checkpoints that have one, by step"""

    @classmethod
    def parse(cls, text: str) -> Best:
        """From "min val/loss" or "max val/accuracy"; of a metric that is called loss lower is better by itself.

        Errors: `ConfigError`.
        """
        way, _, metric = text.strip().rpartition(" ")
        if metric.startswith("val/") and (way in ("min", "max") or (not way and metric.endswith("/loss"))):
            return cls(metric, 1 if way == "max" else -1)
        raise ConfigError(
            f"train.keep_best '{text}': say whether lower or higher is better, and which metric of the held-out split: "
            "'min val/loss', 'max val/accuracy'"
        )

    def should_preserve(self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: object) -> Sequence[bool]:
        steps = [c.step for c in checkpoints if c.step in self.values]
        best = max(steps, key=lambda step: (self.sign * self.values[step], step), default=None)
        return [c.step == best for c in checkpoints]


def zeros(arrays: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Arrays of zeros of these shapes, placed as they say."""
    make = lambda x: jax.jit(lambda: jnp.zeros(x.shape, x.dtype), out_shardings=x.sharding)()
    return {k: make(x) for k, x in arrays.items()}


def groups(wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    """Names of arrays to read at a time: no more than `MOST_BYTES` bytes of this process, or one array."""
    group, total = [], 0
    for name, x in wanted.items():
        assert x.sharding is not None
        size = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize * len(x.sharding.addressable_devices)
        if group and total + size > MOST_BYTES:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    yield group


def crc32(meta: Meta) -> int:
    """Of a description, however its keys are ordered."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def started(
    arrays: Mapping[str, jax.Array | jax.ShapeDtypeStruct], found: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Arrays that a checkpoint lacks, placed as `arrays`: an average begins at its parameter, all else at zero."""
    begun = {k: found[k.replace("ema/", "params/", 1)] for k in arrays if k.startswith("ema/")}
    copied = {k: jax.jit(jnp.copy, out_shardings=arrays[k].sharding)(x) for k, x in begun.items()}
    return zeros({k: x for k, x in arrays.items() if k not in begun}) | copied
