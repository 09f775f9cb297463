"""The `granite-jax` command: a module for each of its commands.

Whatever loads JAX, Grain or matplotlib is imported in the bodies of commands, so that `granite-jax --help` answers at
once.
"""

import io
import logging
import os
import sys
import warnings

import typer

from granite_jax.cli import batch, convert, evaluate, inspect, plan, signals, transcribe
from granite_jax.cli.terminal import fail

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it would break the lines of long help texts
    help="Granite Speech in JAX: transcribe and translate speech, convert checkpoints.",
)
app.command()(transcribe.transcribe)
app.command()(convert.convert)
app.command()(inspect.inspect)
app.command()(plan.plan)
app.add_typer(batch.app, name="batch")
app.command("eval")(evaluate.evaluate)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        # File names need not be valid Unicode; escapes are, in JSON, too.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for package in ("gcsfs", "s3fs", "botocore", "aiobotocore", "google.auth"):  # which log tracebacks of their own
        logging.getLogger(package).setLevel(logging.CRITICAL)
    warnings.showwarning = lambda message, *_: fail(f"warning: {message}")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # before huggingface_hub is imported, which reads it
    with signals.exit_on_signals():
        app()
