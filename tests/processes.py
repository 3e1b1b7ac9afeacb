"""Several processes on this machine that work together, as hosts of a cluster would."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def started(
    arguments: Sequence[Any], count: int = 1, devices: int = 1, env: Mapping[str, str] | None = None
) -> list[subprocess.Popen]:
    """Python with these arguments in `count` processes, each with so many devices of the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"  # the last one counts
    about = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    if count > 1:
        about |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    about |= env or {}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, *map(str, arguments)]
    return [subprocess.Popen(command, env=about | {"JAX_PROCESS_ID": str(i)}, **pipes) for i in range(count)]


def outputs(processes: Sequence[subprocess.Popen]) -> list[str]:
    """What they said, when all have ended; each with status 0."""
    said = [process.communicate(timeout=900)[0] for process in processes]
    for process, output in zip(processes, said, strict=True):
        assert process.returncode == 0, output
    return said
