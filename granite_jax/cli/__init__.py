"""The `granite-jax` command."""

import dataclasses
import io
import json
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from granite_jax import convert as converter
from granite_jax.checkpoint import describe
from granite_jax.checkpoint.directory import open_checkpoint
from granite_jax.cli import options
from granite_jax.cli.batch import app as batch_app
from granite_jax.cli.evaluate import evaluate
from granite_jax.cli.terminal import console as _console
from granite_jax.cli.terminal import fail as _fail
from granite_jax.cli.terminal import line as _line
from granite_jax.errors import GraniteError
from granite_jax.inference.programs import make_bucket
from granite_jax.inference.transcriber import Transcriber
from granite_jax.keywords.lists import read_keywords
from granite_jax.model.config import Config

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it would break the lines of long help texts
    help="Granite Speech in JAX: transcribe and translate speech, convert checkpoints.",
)
app.add_typer(batch_app, name="batch")
app.command("eval")(evaluate)


Format = Literal["txt", "json"]
Dtype = Literal["float32", "bfloat16"]
Names = Literal["released", "new"]


def _progress() -> Progress:
    """A bar on a terminal; nothing in a pipe."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=_console, disable=not _console.is_terminal, transient=True)


@app.command()
def transcribe(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="wav, flac, ogg or mp3 files", show_default=False)
    ],
    checkpoint: options.Checkpoint = "demo",
    revision: options.Revision = None,
    format: Annotated[Format, typer.Option(help="plain text, or one JSON object a line")] = "txt",
    task: options.Task = "transcribe",
    to: options.To = None,
    prompt: options.Prompt = None,
    max_new_tokens: options.MaxNewTokens = None,
    dtype: options.Dtype = None,
    speculative: options.Speculative = "lossless",
    ctc_threshold: options.CtcThreshold = None,
    verify_threshold: options.VerifyThreshold = None,
    keyword: options.Keyword = None,
    keywords_file: options.KeywordsFile = None,
    keyword_boost: options.KeywordBoost = None,
    keywords_in: options.KeywordsIn = "decoder",
    parallel: options.Parallel = "shard_map",
    model_parallel: options.ModelParallel = 1,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="draw log-mel, CTC posteriors, words and draft of one FILE: .png, .svg or .pdf", show_default=False
        ),
    ] = None,
) -> None:
    """Transcribe or translate audio files.

    Prints one line a file: the text (after the file's name, if there are several), or a JSON object with audio, text,
    tokens, duration, ctc_text, stats, draft and accepted. Files that fail are reported on stderr, one line each. The
    exit status is 0 if all succeeded, 1 if some did not, 2 if nothing could be tried.
    """
    try:
        plots = None if plot is None else _plots_for(plot, files)
        keywords = [*(read_keywords(keywords_file) if keywords_file else []), *(keyword or [])]
        asr = Transcriber.from_pretrained(
            checkpoint, revision=revision, dtype=dtype, parallel=parallel, model_parallel=model_parallel
        )
        with _progress() as bar:
            job = bar.add_task("transcribing", total=len(files))
            transcripts = asr.transcribe(
                list(files),
                task=task,
                to=to,
                prompt=prompt,
                max_new_tokens=max_new_tokens,
                speculative=False if speculative == "off" else speculative,
                ctc_threshold=ctc_threshold,
                verify_threshold=verify_threshold,
                keywords=keywords,
                keyword_boost=keyword_boost,
                keywords_in=keywords_in,
                on_error="return",
                progress=lambda done: bar.advance(job, done),
            )
    except GraniteError as error:
        _fail(str(error))
        raise typer.Exit(2) from None
    for transcript in transcripts:
        if transcript.error is not None:
            _fail(transcript.error)
        elif format == "json":
            fields = {key: value for key, value in dataclasses.asdict(transcript).items() if key != "error"}
            print(json.dumps(fields, ensure_ascii=False))
        else:
            print(_line(f"{transcript.audio}: {transcript.text}" if len(files) > 1 else transcript.text))
    if any(transcript.error is not None for transcript in transcripts):
        raise typer.Exit(1)
    if plots is not None and plot is not None:
        # A translation or a text by a prompt of one's own was not spoken.
        spoken = transcripts[0].text if task != "translate" and prompt is None else transcripts[0].ctc_text
        try:
            figure = figures.overview(asr.acoustics(files[0]), transcripts[0], asr.tokenizer, spoken)
            with warnings.catch_warnings(record=True, action="always") as caught:
                figure.savefig(plot)
        except (GraniteError, OSError) as error:
            _fail(str(error))
            raise typer.Exit(1) from None
        if any("Glyph" in str(warning.message) for warning in caught):
            _fail(f"{plot}: characters are missing, no font here has them")


def _plots_for(plot: Path, files: list[Path]) -> ModuleType:
    """The module that draws, if it can draw this: asked before anything is transcribed."""
    if len(files) > 1:
        raise GraniteError(f"--plot draws one file, not {len(files)}")
    try:
        from granite_jax.plotting import figures  # here, because matplotlib is an extra
    except ImportError as error:
        raise GraniteError(str(error)) from None
    figures.check_path(plot)
    return plots


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="checkpoint directory or hub id", show_default=False)],
    destination: Annotated[
        Path,
        typer.Argument(metavar="DST", help="directory to write; must not exist, or be empty", show_default=False),
    ],
    dtype: Annotated[Dtype | None, typer.Option(help="default: that of the source", show_default=False)] = None,
    names: Annotated[Names, typer.Option(help="tensor names of a Hugging Face destination")] = "released",
    revision: options.Revision = None,
    verify: Annotated[bool, typer.Option("--verify", help="read everything back and compare")] = False,
) -> None:
    """Convert a checkpoint: Hugging Face to Orbax, or Orbax back to Hugging Face."""
    try:
        with _progress() as bar:
            job = bar.add_task(f"converting {escape(source)}", total=None)
            report = converter.convert(
                source,
                destination,
                dtype=dtype,
                names=names,
                revision=revision,
                verify=verify,
                progress=lambda done, total: bar.update(job, completed=done, total=total),
            )
    except (GraniteError, OSError) as error:
        _fail(str(error))
        raise typer.Exit(1) from None
    parts = ", ".join(f"{part} {count:,}" for part, count in report.parameters.items())
    sizes = f"{report.tensors} tensors, {parts} parameters, {report.dtype}, {report.bytes:,} bytes"
    print(_line(f"{destination}: {sizes}, {report.seconds:.1f} s{', verified' if verify else ''}"))


@app.command()
def inspect(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help='"demo", checkpoint directory or hub id', show_default=False)
    ],
    format: Annotated[Format, typer.Option(help="lines for people, or one JSON object")] = "txt",
    revision: options.Revision = None,
    verify: Annotated[bool, typer.Option("--verify", help="read all weights and check their hashes")] = False,
) -> None:
    """Print what a checkpoint is: parts, parameters, tasks, languages, limits, configuration."""
    try:
        description = describe.describe(open_checkpoint(checkpoint, revision), verify=verify)
    except GraniteError as error:
        _fail(str(error))
        raise typer.Exit(1) from None
    for line in [json.dumps(description)] if format == "json" else describe.to_lines(description):
        print(_line(line))


@app.command()
def plan(
    topology: Annotated[str, typer.Option(help="of chips, as in v5e:2x4, v6e:2x2 or v5p:2x2x1", show_default=False)],
    checkpoint: Annotated[
        str | None, typer.Option(help="as of transcribe; default: the released model", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="rows of a full batch on each copy of the weights")] = 64,
    seconds: Annotated[float, typer.Option(min=1, help="of the longest audio in a full batch")] = 20.0,
    dtype: Annotated[Dtype, typer.Option(help="of the weights")] = "bfloat16",
    model_parallel: options.ModelParallel = 1,
    format: Annotated[Format, typer.Option(help="lines for people, or one JSON object a program")] = "txt",
) -> None:
    """Compile a model's programs for TPU chips that need not be there, and print what they take.

    Prints peak memory of a chip, whether it is there, collectives and copies of the KV cache. Nothing is run. The exit
    status is 1 if a program does not fit, 2 if nothing could be tried. Needs pip install 'granite-jax[plan]'.
    """
    import jax

    from granite_jax.planning import aot as planning

    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine, if any, is left alone
    fits = True
    try:
        config = open_checkpoint(checkpoint).config if checkpoint else Config.from_file(planning.RELEASED)
        bucket = make_bucket(config, batch, seconds)
        for found in planning.plan(config, topology, bucket, dtype=dtype, model_parallel=model_parallel):
            fits &= found.fits
            print(json.dumps(dataclasses.asdict(found)) if format == "json" else _line(str(found)), flush=True)
    except GraniteError as error:
        _fail(str(error))
        raise typer.Exit(2) from None
    if not fits:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        # File names need not be text; an escape in their place is, in JSON too.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # before huggingface_hub is imported, which reads it
    app()


if __name__ == "__main__":
    main()
