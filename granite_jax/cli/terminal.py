"""What commands print besides results: progress and errors, on stderr."""

import contextlib
import os
import sys
import time
import unicodedata
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)
_LOG_SECONDS = 60.0  # between two lines of progress without a terminal


class ProgressDisplay:
    """Shows a command's progress: a bar on a terminal; elsewhere a line a minute, for logs."""

    def __init__(self, action: str, *, has_bar: bool = True):
        """
        Args:
          action: what the command does, as in "transcribing".
          has_bar: whether there is a bar on a terminal. Results are printed while it is `paused`.
        """
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(
            *columns,
            console=console,
            disable=not (has_bar and console.is_interactive),
            transient=True,
            redirect_stdout=False,
        )
        self._task = self._bar.add_task(escape(action), total=None, note="")
        self._action = action
        self._told: set[str] = set()

    def __enter__(self) -> "ProgressDisplay":
        self._bar.start()
        self._began = self._logged = time.monotonic()
        self._first: int | None = None
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the bar away meanwhile."""
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.start()

    def tell(self, message: str) -> None:
        """Prints a message on stderr, as one line, once."""
        if message not in self._told:
            self._told.add(message)
            fail(message)

    def show(self, done: int, total: int, note: str = "") -> None:
        """Shows that `done` of `total` are done, and a note beside that."""
        self._bar.update(self._task, completed=done, total=total, note=note)
        now = time.monotonic()
        self._first = done if self._first is None else self._first
        if not console.is_terminal and now - self._logged > _LOG_SECONDS:
            self._logged = now
            left = ""
            if done > self._first:
                seconds = (total - done) * (now - self._began) / (done - self._first)
                left = f"{timedelta(seconds=round(seconds))} left"
            text = ", ".join(filter(None, (f"{done} of {total}", note, left)))
            fail(f"{self._action}: {text}")


def fail(message: str) -> None:
    """Prints an error, as one line. Where standard error cannot be written, this and later messages are lost."""
    try:
        print(line(f"granite-jax: {message}"), file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")


def line(text: str) -> str:
    """The text as one line without control characters, whatever file names and transcripts contain."""
    return "".join(" " if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char for char in text)
