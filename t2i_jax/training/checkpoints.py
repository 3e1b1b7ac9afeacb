"""Checkpoints: the train state as plain named arrays, written asynchronously and atomically, read onto any mesh."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from rich.console import Console

from t2i_jax.config import ConfigError
from t2i_jax.training.state import TrainState

console = Console(stderr=True)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message names the file."""


class Checkpoints:
    """The checkpoints of one run folder, newest last.

    `save` returns at once (the arrays are copied, the files are written behind the next steps) and a failure to write
    comes to light at the next `save` or `close`: the run stops with the reason, the checkpoints before it stay as they
    were. `restore` takes the newest one that can be read and says which it passed over.
    """

    def __init__(self, folder: str | Path, keep: int = 3):
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        return sorted(self.manager.all_steps())

    def save(self, state: TrainState, position: int, step: int) -> None:
        """Begin to write `state`; `position` is the number of examples consumed so far."""
        flat = state.flat()
        meta = {"position": position, "arrays": {k: [list(v.shape), str(v.dtype)] for k, v in flat.items()}}
        with self._explained(step):
            self.manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(flat), meta=ocp.args.JsonSave(meta)),
                force=True,
            )

    def restore(self, target: TrainState) -> tuple[TrainState, int] | None:
        """The newest readable state, placed as `target` (abstract arrays with shardings), and its data position.

        Returns None where there is no checkpoint yet. Errors: `ConfigError` where the arrays are those of another
        model; `CheckpointError` where checkpoints exist and none can be read.
        """
        failures = []
        for step in reversed(self.steps()):
            try:
                meta = self._read(step, "meta", ocp.args.JsonRestore())
                self._fits(step, meta["arrays"], target)
                arrays = self._read(step, "state", ocp.args.StandardRestore(target.flat()))
                return target.unflat(arrays), int(meta["position"])
            except ConfigError:
                raise
            except Exception as error:  # whatever a damaged file makes of the reader
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
                failures.append(f"{self.folder / str(step)} ({reason})")
                console.print(f"[yellow]checkpoint passed over, it cannot be read: {failures[-1]}[/]", soft_wrap=True)
                self._set_aside(step)
        if failures:
            raise CheckpointError("no checkpoint can be read:\n  " + "\n  ".join(failures))
        return None

    def arrays(self, prefix: str, step: int | None = None) -> dict[str, np.ndarray]:
        """The arrays whose names begin with `prefix` (`ema/`, say) of the newest readable checkpoint, on the host."""
        for each in [step] if step is not None else reversed(self.steps()):
            with contextlib.suppress(Exception):
                meta = self._read(each, "meta", ocp.args.JsonRestore())
                host = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
                abstract = {
                    k: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=host)
                    for k, (shape, dtype) in meta["arrays"].items()
                }
                arrays = self._read(each, "state", ocp.args.StandardRestore(abstract))
                return {k.removeprefix(prefix): np.asarray(v) for k, v in arrays.items() if k.startswith(prefix)}
        raise CheckpointError(f"{self.folder}: there is no checkpoint that can be read")

    def wait(self) -> None:
        """Until what `save` began is on disk. Errors: `CheckpointError` where it could not be written."""
        with self._explained():
            self.manager.wait_until_finished()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self.manager.close()

    def _read(self, step: int, item: str, args: Any) -> Any:
        return self.manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]

    @contextlib.contextmanager
    def _explained(self, step: int | None = None):
        try:
            yield
        except Exception as error:
            what = f"checkpoint of step {step}" if step is not None else "the last checkpoint"
            good = self.steps()
            kept = f"the last good one is {self.folder / str(good[-1])}" if good else "there is none yet"
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{what} could not be written to {self.folder}: {kept}. {reason}") from error

    def _set_aside(self, step: int) -> None:
        """Rename a damaged checkpoint, so that its step can be written anew and nothing is lost."""
        if jax.process_index() == 0:
            at = self.folder / str(step)
            at.rename(next(p for n in itertools.count(1) if not (p := self.folder / f"damaged-{step}-{n}").exists()))
        multihost_utils.sync_global_devices(f"set aside {step}")
        self.manager.reload()

    def _fits(self, step: int, saved: dict[str, Any], target: TrainState) -> None:
        wanted = {k: [list(v.shape), str(v.dtype)] for k, v in target.flat().items()}
        wrong = [f"missing: {k}" for k in wanted if k not in saved]
        wrong += [f"not in this model: {k}" for k in saved if k not in wanted]
        wrong += [f"{k}: saved {saved[k]}, wanted {v}" for k, v in wanted.items() if k in saved and saved[k] != v]
        if wrong:
            more = f"\n  and {len(wrong) - 12} more" if len(wrong) > 12 else ""
            raise ConfigError(
                f"{self.folder / str(step)} holds another model than the config describes:\n  "
                + "\n  ".join(wrong[:12])
                + more
            )
