"""The `t2i` command: each subcommand is a module that reads its arguments and calls the package that does the work."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
from collections.abc import Sequence

from t2i_jax.core.console import console
from t2i_jax.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    NoCluster,
    NotFinite,
    NotWritten,
    PeerLost,
    did_you_mean,
)

COMMANDS = {
    "fit": "pictures as they are to a released model, by the commands below",
    "data": "look at pictures; build a data set that ships as packages; a vocabulary; index tar files, and neighbours",
    "train": "train or go on with a run (a codec or a model)",
    "plot": "loss and other metrics of runs over their steps, as a picture",
    "encode": "images and captions to codes and features, once",
    "sample": "prompts to images",
    "zoo": "the models inside the package, which `t2i sample NAME` draws with",
    "evaluate": "the metrics of a run or a released model",
    "compare": "several models with equal compute, in one report",
    "convert": "a published checkpoint to a released model, and back",
    "release": "a run to a released model: one folder that can be moved",
    "push": "a released model to a hub",
    "plan": "memory, time and collectives of a run, without its chips",
    "bench": "speeds against the limits of this machine",
}

TOGETHER = ("train", "encode", "sample", "evaluate", "compare", "bench train", "data neighbours")
"""Commands that several processes run together where there is a cluster; the others work in each alone."""

OWN = "T2I_IMPORT"
"""Variable of the environment with modules to import first, joined by commas: those of a user's own parts."""

USAGE = "usage: t2i COMMAND ...\n\n" + "\n".join(f"  {k:10}{v}" for k, v in COMMANDS.items())
USAGE += "\n\n`t2i COMMAND --help` lists all arguments; for example\n  t2i sample runs/quickstart/model 'a red heart'\n"


class Lines(logging.Handler):
    """Prints log records as lines of the console, above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def fail(message: str, status: int = 2) -> None:
    # Arguments may be of any length; the error has to stay visible.
    message = re.sub(r"\S{300,}", lambda found: f"{found[0][:120]}...{found[0][-40:]}", message)
    console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)


def import_own(names: str) -> None:
    """Import the modules of `T2I_IMPORT`. Errors: `ConfigError` that names the module, whatever it raises."""
    for module in filter(None, map(str.strip, names.split(","))):
        try:
            importlib.import_module(module)
        except Exception as error:  # any error of the user's code
            hint = "; if it is a file of this folder: PYTHONPATH=. t2i ..." if isinstance(error, ImportError) else ""
            raise ConfigError(f"{OWN}: {module}: {type(error).__name__}: {error}{hint}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. An error that the user can correct is one line and exit status 2; Ctrl-C is 130."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if arguments else 2)
    if arguments[0] not in COMMANDS:
        more = did_you_mean(arguments[0], COMMANDS, 0.4) or "\n\n" + USAGE
        fail(f"t2i: there is no command '{arguments[0]}'{more}")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", handlers=[Lines()])
    for name in ("absl", "asyncio"):  # their errors are raised as well, and printed as one line
        logging.getLogger(name).setLevel(logging.CRITICAL)

    import jax

    from t2i_jax.core.platform import prepare

    # A failed write reaches its event loop after it is closed; the error itself is raised elsewhere.
    late = lambda u: "Event loop is closed" in str(u.exc_value) or sys.__unraisablehook__(u)
    sys.unraisablehook = late
    try:
        together = {arguments[0], " ".join(arguments[:2])} & set(TOGETHER)
        prepare(join=bool(together) and not {"-h", "--help"} & set(arguments))
        import_own(os.environ.get(OWN, ""))
        importlib.import_module(f"t2i_jax.cli.{arguments[0]}").run(arguments[1:])
    except (NotWritten, PeerLost) as error:
        console.print(f"t2i {arguments[0]}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        # An orderly exit waits for lost processes, and writers that failed would print their tracebacks once more.
        if isinstance(error, PeerLost):
            from t2i_jax.training.watch import STATUS

            os._exit(STATUS)
        os._exit(2)
    except (ConfigError, DataError, CheckpointError, NoCluster, NotFinite, ImportError) as error:
        fail(f"t2i {arguments[0]}: {error}")
    except OSError as error:
        named = error.filename is not None and error.strerror and not error.filename2
        fail(f"t2i {arguments[0]}: " + (f"{error.filename}: {error.strerror}" if named else str(error)))
    except ValueError as error:
        if not str(error).startswith("embedded null"):  # Python's error for such a path, whatever opens it
            raise
        named = next((repr(a) for a in arguments if "\0" in a), "a path")
        fail(f"t2i {arguments[0]}: {named}: no file name holds a zero byte")
    except MemoryError as error:
        fail(f"t2i {arguments[0]}: not enough memory on this machine{f': {error}' if str(error) else ''}")
    except Interrupted as stop:
        console.print(f"t2i {arguments[0]}: {stop}", style="yellow", soft_wrap=True)
        sys.exit(128 + stop.signal)
    except KeyboardInterrupt:
        fail(f"t2i {arguments[0]}: interrupted; the same command goes on", 130)
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        fail(f"t2i {arguments[0]}: not enough memory: {str(error).splitlines()[0]}")
