"""The only console and progress bar; nothing else in the library prints."""

import io
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True)
"""Messages and progress. Results go to `stdout`."""


def stdout(width: int = 120) -> Console:
    """A console on standard output, for results: as wide as the terminal, or `width` columns in a file or a pipe.

    What its encoding lacks, as bytes of a file name that is not UTF-8, is printed escaped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=width)


class Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


def bar(*more: ProgressColumn) -> Progress:
    """A progress bar with rate and remaining time, for anything over two seconds; silent without a terminal.

    more: additional columns.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    return Progress(*columns, *more, console=console, disable=not console.is_terminal)
