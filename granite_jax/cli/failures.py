"""`--max-failures`: how many utterances of a job can fail before the command's exit status says so."""

import re
from fractions import Fraction
from typing import Annotated

import typer

from granite_jax.cli.terminal import fail
from granite_jax.errors import GraniteError

STATUS = 3

MaxFailures = Annotated[
    str | None,
    typer.Option(
        metavar="N|P%",
        help="exit with status 3 if more utterances, or a larger share of them, failed; default: if all failed",
        show_default=False,
    ),
]


def max_failures(text: str | None, entries: int) -> int:
    """How many of `entries` utterances can fail. Raises GraniteError if `text` is neither a number nor a percentage."""
    if text is None:
        return entries - 1
    match = re.fullmatch(r"(\d{1,9})|(\d{1,3}(?:\.\d{1,6})?)%", text, re.ASCII)
    if match is None:
        raise GraniteError(f"--max-failures is {text!r:.40}, neither a number nor a percentage")
    return int(match[1]) if match[1] else int(entries * Fraction(match[2]) / 100)


def check_failures(failed: int, entries: int, allowed: str | None) -> None:
    """Ends the command with status 3 if more utterances failed than are allowed."""
    if failed > max(0, max_failures(allowed, entries)):
        limit = "" if allowed is None else f", more than --max-failures {allowed}"
        fail(f"{failed} of {entries} utterances failed{limit}")
        raise typer.Exit(STATUS)
