"""The page of commands: what each prints for `--help`."""

from __future__ import annotations

import contextlib
import io
import os
import re

from t2i_jax import bench, cli
from t2i_jax.cli import data

WIDTH = 84


def names() -> list[str]:
    """Every command with arguments of its own."""
    inner = {"data": data.KINDS, "bench": bench.KINDS}
    return [f"{name} {kind}".strip() for name in cli.COMMANDS for kind in inner.get(name, [""])]


def help_of(command: str) -> str:
    """What `t2i COMMAND --help` prints in a terminal of WIDTH columns, without colours."""
    shown, before = io.StringIO(), dict(os.environ)
    os.environ |= {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb"}
    try:
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            cli.main([*command.split(), "--help"])
    finally:
        os.environ.clear()
        os.environ.update(before)
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()).strip()
    return "\n".join(line.rstrip() for line in text.split("\n"))


def page() -> str:
    """The page, a section each."""
    lines = ["# Commands", "", "`t2i COMMAND --help` prints what is below. Names may be written with - or _.", ""]
    lines += ["| command | does |", "|---|---|"]
    lines += [f"| [`t2i {name}`](#t2i-{name}) | {about} |" for name, about in cli.COMMANDS.items()]
    for name, about in cli.COMMANDS.items():
        lines += ["", f"(t2i-{name})=", f"## t2i {name}", "", about[:1].upper() + about[1:] + ".", ""]
        for command in [c for c in names() if c.split()[0] == name]:
            lines += [f"### t2i {command}", ""] if " " in command else []
            lines += ["```text", help_of(command), "```", ""]
    lines += ["", "## Exit status", "", EXIT]
    return "\n".join(lines)


EXIT = """| status | meaning |
|---|---|
| 0 | done |
| 2 | an error that you can correct: one line says what, where, and what would be right |
| 75 | another process of the run is lost; start all of them again, and they go on from the last checkpoint |
| 130 | Ctrl-C; the same command goes on |
| 128 + signal | the system asked the process to stop; a checkpoint is written, the same command goes on |
"""
