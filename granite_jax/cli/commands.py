"""The commands of `granite-jax`: a module for each.

Whatever loads JAX, Grain or matplotlib is imported in the bodies of commands, so that `granite-jax --help` answers at
once.
"""

import contextlib
import errno
import io
import logging
import os
import sys
import warnings
from typing import Annotated

import typer

import granite_jax
from granite_jax.cli import batch, convert, evaluate, inspect, plan, signals, transcribe
from granite_jax.cli.terminal import fail


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"granite-jax {granite_jax.__version__}")
        raise typer.Exit


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it would break the lines of long help texts
)
app.command()(transcribe.transcribe)
app.command()(convert.convert)
app.command()(inspect.inspect)
app.command()(plan.plan)
app.add_typer(batch.app, name="batch")
app.command("eval")(evaluate.evaluate)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Granite Speech in JAX: transcribe and translate speech, convert checkpoints."""


def run() -> None:
    """Runs the command that `sys.argv` names, and ends the process."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # File names need not be valid Unicode; escapes are, in JSON, too.
            stream.reconfigure(errors="backslashreplace")
    for package in ("gcsfs", "s3fs", "botocore", "aiobotocore", "google.auth"):  # which log tracebacks of their own
        logging.getLogger(package).setLevel(logging.CRITICAL)
    warnings.showwarning = lambda message, *_: fail(f"warning: {message}")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # before huggingface_hub is imported, which reads it
    with signals.exit_on_signals():
        try:
            try:
                app()
            finally:
                sys.stdout.flush()
        except OSError as error:
            if type(error) not in (OSError, BrokenPipeError, BlockingIOError) or error.filename is not None:
                raise
            with contextlib.suppress(OSError):  # what is left would fail again at the interpreter's end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if error.errno != errno.EPIPE:  # as by `| head`
                fail(f"standard output cannot be written: {error.strerror}")
            raise SystemExit(1) from None


def _open_closed_streams() -> None:
    """Opens those of the standard streams that are closed, or the next file would become one of them.

    Using standard input and output then fails, as if they were closed; messages on standard error are lost.
    """
    for name, mode, flags in (("stdin", "r", os.O_WRONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, flags), mode))
