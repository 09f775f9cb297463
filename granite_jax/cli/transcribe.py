"""`granite-jax transcribe`."""

import dataclasses
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from granite_jax.cli.options import Format, takes_options
from granite_jax.cli.terminal import ProgressDisplay, fail, line
from granite_jax.errors import GraniteError
from granite_jax.inference.options import ModelOptions, TranscribeOptions

if TYPE_CHECKING:
    from granite_jax.inference.results import Transcript


@takes_options
def transcribe(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE",
            help="wav, flac, ogg, mp3, ... (with the extra media: m4a, mp4, webm, ...); - for standard input; a URL",
            show_default=False,
        ),
    ],
    model: ModelOptions,
    options: TranscribeOptions,
    format: Annotated[Format, typer.Option(help="plain text, or one JSON object a line")] = "txt",
    plot: Annotated[
        Path | None,
        typer.Option(
            help="draw log-mel, CTC posteriors, words and draft of one FILE: .png, .svg or .pdf", show_default=False
        ),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="protocols of URLs: file, gs, s3, https (all by default); repeatable", show_default=False),
    ] = None,
) -> None:
    """Transcribe or translate audio files.

    Prints one line a file, in order, as soon as its result is there: the text (after the file's name, if there are
    several), or a JSON object with audio, text, tokens, duration, confidence, ctc_text, stats, draft, accepted_spans
    and flags. Files that fail, and those whose text is doubtful, are reported on stderr, one line each. The exit status
    is 0 if all succeeded, 1 if some did not, 2 if nothing could be tried.
    """
    from granite_jax.cli.sources import to_sources  # here, because fsspec is slow to import
    from granite_jax.inference.transcriber import Transcriber

    try:
        plots = None if plot is None else _plots_for(plot, files)
        sources = to_sources(files, allow or ("file", "gs", "s3", "https"), reread=plots is not None)
        asr = Transcriber.from_options(model)
        transcripts = []
        with ProgressDisplay("transcribing", prints_results=True) as display:
            for transcript in asr.stream(sources, options, on_error="return"):
                transcripts.append(transcript)
                _print(transcript, format, with_name=len(files) > 1)
                display.show(len(transcripts), len(files))
    except GraniteError as error:
        fail(str(error))
        raise typer.Exit(2) from None
    if any(transcript.error is not None for transcript in transcripts):
        raise typer.Exit(1)
    if plots is not None and plot is not None:
        # A translation, or the answer to a custom prompt, is not what was spoken.
        spoken_text = (
            transcripts[0].text if options.task != "translate" and options.prompt is None else transcripts[0].ctc_text
        )
        try:
            figure = plots.overview(asr.ctc_emissions(sources[0]), transcripts[0], asr.tokenizer, spoken_text)
            with warnings.catch_warnings(record=True, action="always") as caught:
                figure.savefig(plot)
        except (GraniteError, OSError) as error:
            fail(str(error))
            raise typer.Exit(1) from None
        if any("Glyph" in str(warning.message) for warning in caught):
            fail(f"{plot}: characters are missing, no font here has them")


def _print(transcript: "Transcript", format: Format, with_name: bool) -> None:
    from granite_jax.inference.results import FLAGS

    if transcript.error is not None:
        fail(transcript.error)
    elif format == "json":
        fields = {key: value for key, value in dataclasses.asdict(transcript).items() if key != "error"}
        print(json.dumps(fields, ensure_ascii=False), flush=True)
    else:
        print(line(f"{transcript.audio}: {transcript.text}" if with_name else transcript.text), flush=True)
        for flag in transcript.flags:
            fail(f"{transcript.audio}: {flag}: {FLAGS[flag]}")


def _plots_for(plot: Path, files: list[str]) -> ModuleType:
    """The plotting module. Raises GraniteError, before anything is transcribed, if it cannot plot this."""
    if len(files) > 1:
        raise GraniteError(f"--plot draws one file, not {len(files)}")
    try:
        from granite_jax import plotting  # here, because matplotlib is an extra
    except ImportError as error:
        raise GraniteError(str(error)) from None
    plotting.check_path(plot)
    return plotting
