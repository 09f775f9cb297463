"""What commands print besides results: progress and errors, on stderr."""

import contextlib
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)


def progress_bar() -> Progress:
    """A bar on a terminal; nothing in a pipe."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def fail(message: str) -> None:
    """Prints an error, as one line."""
    print(line(f"granite-jax: {message}"), file=sys.stderr)


def line(text: str) -> str:
    """One line that a terminal does not act on, whatever file names and transcripts hold."""
    return "".join(" " if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char for char in text)


@contextlib.contextmanager
def terminated() -> Iterator[Callable[[], bool]]:
    """Whether there has been a SIGTERM, which would otherwise end the process at once."""
    received = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield received.is_set
    finally:
        signal.signal(signal.SIGTERM, previous)
