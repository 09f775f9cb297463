"""What commands print besides results: progress and errors, on stderr."""

import sys
import unicodedata

from rich.console import Console

console = Console(stderr=True)


def fail(message: str) -> None:
    """Prints an error, as one line."""
    print(line(f"granite-jax: {message}"), file=sys.stderr)


def line(text: str) -> str:
    """One line that a terminal does not act on, whatever file names and transcripts hold."""
    return "".join(" " if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char for char in text)
