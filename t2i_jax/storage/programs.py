"""Traced programs that are kept on this machine: what a command has traced once, later ones read.

A file is one line of JSON, the key and a checksum, and then the program as `jax.export` writes it: StableHLO and
shapes, of which nothing is unpickled. The key is all that a trace depends on: the source of this package, the versions
of what it calls, configs, the structure, shapes and dtypes of all arguments, settings of JAX and of its compiler,
devices and the features of the CPU. A program whose key differs in anything is never used, and a damaged file is set
aside. Compiled programs are in JAX's own cache, which a program that was read finds by the same text.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import os
import platform
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import flax
import jax
import jaxlib.version
import numpy as np
from jax import Array, export
from jax.sharding import NamedSharding
from jax.stages import Compiled

import t2i_jax
from t2i_jax.core.outputs import whole_file
from t2i_jax.core.platform import local_cache, user_cache

log = logging.getLogger(__name__)

SWITCH = "T2I_PROGRAMS"
"""Variable of the environment: `off` keeps and reads no programs."""
FORMAT = 1
PROGRAMS_LIMIT, COMPILED_LIMIT = 2**28, 2**31
"""Bytes that traced and compiled programs may take; those not used for longest are removed."""
PACKAGES = {
    "jax": jax.__version__,
    "jaxlib": jaxlib.version.__version__,
    "flax": flax.__version__,
    "numpy": np.__version__,
}
"""What traces and compiles, by version."""
UNRELATED = ("cache", "log", "traceback", "dump", "pprint", "debug_leaked")
"""Parts of names of those settings of JAX that change no program."""
ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_LOCK = threading.RLock()


def folder() -> Path | None:
    """Where programs are kept; None where they are not: without the package flatbuffers, which `jax.export` needs,
    where T2I_PROGRAMS is `off`, and where JAX keeps no compiled programs, without which little is gained."""
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "false", "no"):
        return None
    compiled: object = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if not compiled or importlib.util.find_spec("flatbuffers") is None:
        return None
    return user_cache("programs")


def compiled(function: Callable[..., Array], about: Mapping[str, object], arguments: tuple[object, ...]) -> Compiled:
    """The compiled program of `function(*arguments)` on one device, of arrays or of their shapes; call it with the
    leaves of `arguments`.

    The trace is read where it is kept, and else kept. function: of arrays alone. about: as JSON, what it depends on
    besides its source in this package and `arguments`. Errors: `CannotKeep`, and those of the function.
    """
    where = folder()
    leaves, tree = jax.tree.flatten(arguments)
    shapes = [shape(x) for x in leaves]
    if where is None:
        raise CannotKeep("no programs are kept here")
    key = _key(about, repr(tree), shapes)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    with _LOCK:
        stored = _read(where / f"{name}.program", key)
        if stored is None:
            flat = jax.jit(lambda *leaves: function(*jax.tree.unflatten(tree, leaves)))
            flat.trace(*shapes)  # an error of the function is raised here, and not as one of the export
            try:
                stored = export.export(flat)(*shapes)
                payload = bytes(stored.serialize())
            except (ValueError, NotImplementedError) as error:  # a part that has no stable form
                _write(where / f"{name}.program", key, b"")
                raise CannotKeep(str(error)) from error
            _write(where / f"{name}.program", key, payload)
        # A program of the same text whether it was read or traced: JAX's cache of compiled ones goes by the text.
        return jax.jit(stored.call).lower(*shapes).compile()


class CannotKeep(ValueError):
    """A program that is traced each time: of several devices, of parts of a user's own, or without a stable form."""


def shape(x: object) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, a number or a shape, on its device. Errors: `CannotKeep` for one on several."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    sharding = x.sharding if isinstance(x, Array) else None
    if sharding is not None and len(sharding.device_set) > 1:
        raise CannotKeep("an array on several devices")
    form = jax.typeof(x)
    kept = sharding if isinstance(sharding, NamedSharding) else None
    return jax.ShapeDtypeStruct(form.shape, form.dtype, sharding=kept, weak_type=form.weak_type)


def identity(path: str) -> str:
    """A digest of the files of a folder, or of one file: their content, of large ones size and time of change."""
    root = Path(path)
    found = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file()) if path else []
    said = []
    for file in found:
        stat = file.stat()
        content = hashlib.sha256(file.read_bytes()).hexdigest() if stat.st_size < 2**20 else str(stat.st_mtime_ns)
        said.append([file.name if file == root else str(file.relative_to(root)), stat.st_size, content])
    return _digest(said)


def _key(about: Mapping[str, object], tree: str, shapes: list[jax.ShapeDtypeStruct]) -> dict[str, object]:
    """All that a trace depends on. Errors: `CannotKeep` where a part of it cannot be told from another."""
    if " at 0x" in tree:  # an object by its address
        raise CannotKeep("an argument of no known structure")
    settings = {k: str(v) for k, v in sorted(jax.config.values.items()) if not any(word in k for word in UNRELATED)}
    return {
        "format": FORMAT,
        "source": _source(),
        "versions": PACKAGES | {"python": platform.python_version()},
        "about": about,
        "tree": hashlib.sha256(tree.encode()).hexdigest(),
        "shapes": _digest([[list(x.shape), str(x.dtype), x.weak_type, str(x.sharding)] for x in shapes]),
        "settings": _digest(settings | {name: os.environ.get(name, "") for name in ENVIRONMENT}),
        "machine": _machine(),
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@functools.cache
def _source() -> str:
    """A digest of the source of this package."""
    root, found = Path(t2i_jax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


@functools.cache
def _machine() -> list[str]:
    """The devices, and the features of this machine's CPU."""
    devices = [f"{d.platform} {d.device_kind}" for d in jax.devices()]
    return [platform.system(), platform.machine(), _cpu(), jax.devices()[0].client.platform_version, *devices]


def _cpu() -> str:
    """A digest of the features of the CPU; on systems that do not list them its name."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return _digest(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    return platform.processor()


def _read(path: Path, key: Mapping[str, object]) -> export.Exported | None:
    """The program of a file; None if there is none of this key. A damaged file is set aside, and said so.

    Errors: `CannotKeep` where it says that the program has no form that can be kept.
    """
    try:
        data = path.read_bytes()
    except OSError:
        return None
    try:
        line, _, payload = data.partition(b"\n")
        head = json.loads(line)
        if head["sha256"] != hashlib.sha256(payload).hexdigest():
            raise ValueError("its checksum is another")
        if head["key"] != json.loads(json.dumps(key)):
            return None  # renamed or copied
        stored = export.deserialize(bytearray(payload)) if payload else None
    except Exception as error:  # whatever a reader of damaged bytes raises
        with contextlib.suppress(OSError):
            path.replace(path.with_suffix(".damaged"))
        log.warning(f"{path}: damaged ({error}): set aside as {path.stem}.damaged; the program is traced anew")
        return None
    if stored is None:
        raise CannotKeep("it has no stable form")
    with contextlib.suppress(OSError):
        os.utime(path)  # when it was used last
    return stored


def _write(path: Path, key: Mapping[str, object], payload: bytes) -> None:
    """Keep a program; empty: note that it cannot be kept. A full or closed disk costs no image."""
    head = json.dumps({"made_by": "t2i_jax", "sha256": hashlib.sha256(payload).hexdigest(), "key": key})
    try:
        with whole_file(path) as temporary:
            temporary.write_bytes(head.encode() + b"\n" + payload)
        trim(path.parent, PROGRAMS_LIMIT)
        trim(Path(local_cache()), COMPILED_LIMIT)
    except OSError as error:
        log.info(f"{path}: not kept: {error}")


def trim(where: Path, limit: int) -> None:
    """Remove the files of a folder that were not used for longest, until the others have at most `limit` bytes."""
    found = []
    for path in where.iterdir() if where.is_dir() else ():
        with contextlib.suppress(OSError):
            stat = path.stat()
            found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found, key=lambda one: one[0]):
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size
