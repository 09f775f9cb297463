"""The `granite-jax` command."""

import dataclasses
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Granite Speech in JAX: transcribe and translate speech, convert checkpoints.",
)
# Progress and errors go to stderr: stdout carries results alone.
_console = Console(stderr=True)


class Format(StrEnum):
    """Output formats."""

    txt = "txt"
    json = "json"


class Task(StrEnum):
    """Tasks of the released model."""

    transcribe = "transcribe"
    punctuate = "punctuate"
    translate = "translate"


class Speculative(StrEnum):
    """Uses of the encoder's drafts."""

    lossless = "lossless"
    relaxed = "relaxed"
    relaxed_accurate = "relaxed-accurate"
    relaxed_fast = "relaxed-fast"
    off = "off"


class Dtype(StrEnum):
    """Dtypes of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def _progress() -> Progress:
    """A bar on a terminal; nothing in a pipe."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=_console, disable=not _console.is_terminal, transient=True)


def _fail(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    print(f"granite-jax: {' '.join(message.splitlines())}", file=sys.stderr)


@app.command()
def transcribe(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="wav, flac, ogg or mp3 files", show_default=False)],
    checkpoint: Annotated[str, typer.Option(help='"demo", or a directory of "granite-jax convert" or Hugging Face')] = "demo",
    format: Annotated[Format, typer.Option(help="plain text, or one JSON object a line")] = Format.txt,
    task: Annotated[Task, typer.Option(help="raw transcript, transcript with punctuation, or translation")] = Task.transcribe,
    to: Annotated[str | None, typer.Option(help="target language of a translation, as in fr or French")] = None,
    prompt: Annotated[str | None, typer.Option(help="a prompt of your own, instead of the task's")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="default: 200, or 6 a second of audio", show_default=False)] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="default: bfloat16 where the device has it", show_default=False)] = None,
    speculative: Annotated[Speculative, typer.Option(help="drafts of the encoder: same text sooner, or accepted when plausible")] = Speculative.lossless,
    ctc_threshold: Annotated[float | None, typer.Option(min=0, help="relaxed: largest frame entropy, in nats, of a final draft", show_default=False)] = None,
    verify_threshold: Annotated[float | None, typer.Option(min=0, help="relaxed: least likelihood of a draft token", show_default=False)] = None,
) -> None:
    """Transcribe or translate audio files.

    Prints one line a file: the text (after the file's name, if there are several), or a JSON object with audio, text, tokens,
    duration, ctc_text and stats. Files that fail are reported on stderr, one line each; the exit status is 0 only if all succeeded.
    """
    from granite_jax.errors import GraniteError
    from granite_jax.transcriber import Transcriber  # JAX takes a second to import: --help need not wait for it

    try:
        asr = Transcriber.from_pretrained(checkpoint, dtype=dtype.value if dtype else None)
        with _progress() as bar:
            job = bar.add_task("transcribing", total=len(files))
            transcripts = asr.transcribe(
                list(files),
                task=task.value,
                to=to,
                prompt=prompt,
                max_new_tokens=max_new_tokens,
                speculative=False if speculative is Speculative.off else speculative.value,
                ctc_threshold=ctc_threshold,
                verify_threshold=verify_threshold,
                on_error="return",
                progress=lambda done: bar.advance(job, done),
            )
    except GraniteError as error:
        _fail(str(error))
        raise typer.Exit(2) from None
    for transcript in transcripts:
        if transcript.error is not None:
            _fail(transcript.error)
        elif format is Format.json:
            fields = {key: value for key, value in dataclasses.asdict(transcript).items() if key != "error"}
            print(json.dumps(fields, ensure_ascii=False))
        else:
            print(f"{transcript.audio}: {transcript.text}" if len(files) > 1 else transcript.text)
    if any(transcript.error is not None for transcript in transcripts):
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="checkpoint directory to read", show_default=False)],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="directory to write; must not exist, or be empty", show_default=False)],
    dtype: Annotated[Dtype | None, typer.Option(help="default: that of the source", show_default=False)] = None,
) -> None:
    """Convert a checkpoint: Hugging Face safetensors to Orbax, or Orbax back to Hugging Face."""
    from granite_jax import convert as converter
    from granite_jax.errors import GraniteError

    try:
        with _progress() as bar:
            job = bar.add_task(f"converting {escape(source.name)}", total=None)
            report = converter.convert(
                source,
                destination,
                dtype=dtype.value if dtype else None,
                progress=lambda done, total: bar.update(job, completed=done, total=total),
            )
    except GraniteError as error:
        _fail(str(error))
        raise typer.Exit(1) from None
    parts = ", ".join(f"{part} {count:,}" for part, count in report.parameters.items())
    print(f"{destination}: {report.tensors} tensors, {parts} parameters, {report.dtype}, "
          f"{report.bytes:,} bytes, {report.seconds:.1f} s")  # fmt: skip


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
