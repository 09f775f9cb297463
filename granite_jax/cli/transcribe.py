"""`granite-jax transcribe`."""

import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from granite_jax.cli.options import takes_options
from granite_jax.cli.outputs import (
    TranscriptFormat,
    check_formats,
    make_directory,
    output_stems,
    render,
    write_file,
)
from granite_jax.cli.terminal import ProgressDisplay, fail, line
from granite_jax.errors import GraniteError
from granite_jax.inference.options import ModelOptions, TranscribeOptions

if TYPE_CHECKING:
    from granite_jax.inference.results import Segment, Transcript


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
    format: Annotated[
        list[TranscriptFormat] | None,
        typer.Option(
            help="plain text (the default), JSON objects, subtitles (srt, vtt) or a table of segments; repeatable",
            show_default=False,
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="write a file for each FILE and format there, named after FILE", show_default=False),
    ] = None,
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
    several), or a JSON object with audio, text, tokens, duration, confidence, ctc_text, stats, draft, accepted_spans,
    flags, segments and channel. srt, vtt and tsv are printed for one file only. On a terminal, the text of one long
    file is printed segment by segment, with times.

    With --output-dir, each result is written to files named after the input, such as talk.srt for a/talk.wav, and their
    paths are printed, one a line; inputs of the same name get more of their paths, as in a-talk.srt and b-talk.srt.
    Files of these names that are there are replaced.

    Files that fail, and those whose text is doubtful, are reported on stderr, one line each. The exit status is 0 if
    all succeeded, 1 if some did not, 2 if nothing could be tried.
    """
    from granite_jax.cli.sources import to_sources  # here, because fsspec is slow to import
    from granite_jax.inference.transcriber import Transcriber

    formats = list(dict.fromkeys(format or [TranscriptFormat.txt]))
    stems = output_stems(files)
    index, written = -1, True
    try:
        check_formats(formats, len(files), output_dir)
        plots = None if plot is None else _plots_for(plot, files)
        sources = to_sources(files, allow or ("file", "gs", "s3", "https"), reread=plots is not None)
        if output_dir is not None:
            make_directory(output_dir)
        asr = Transcriber.from_options(model)
        transcripts: list[Transcript] = []
        live = formats == ["txt"] and output_dir is None and len(files) == 1 and sys.stdout.isatty()
        printed = _LiveSegments(live and options.channels == "mix")
        with ProgressDisplay("transcribing", prints_results=True) as display:

            def on_segment(name: str, segment: "Segment") -> None:
                printed.add(segment)
                display.show(len(transcripts), len(files), f"{printed.seconds / 60:.1f} minutes of speech")

            for transcript in asr.stream(sources, options, on_error="return", on_segment=on_segment):
                transcripts.append(transcript)
                index += transcript.channel in (None, 1)  # the channels of an input follow one another
                if output_dir is not None and transcript.error is None:
                    written = _write(transcript, formats, output_dir, stems[index]) and written
                elif not printed.is_whole(transcript):
                    _print(transcript, formats[0], with_name=len(files) > 1)
                else:
                    _tell_flags(transcript)
                display.show(len(transcripts), len(files))
    except GraniteError as error:
        fail(str(error))
        raise typer.Exit(2) from None
    if not written or any(transcript.error is not None for transcript in transcripts):
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


class _LiveSegments:
    """Prints the segments of a recording that has several.

    Fields:
      seconds: of all segments so far.
    """

    def __init__(self, is_on: bool):
        self._is_on, self._count = is_on, 0
        self._first: Segment | None = None
        self.seconds = 0.0

    def add(self, segment: "Segment") -> None:
        self.seconds += segment.end - segment.start
        self._count += 1
        if self._is_on and self._count == 1:
            self._first = segment  # perhaps the only one
        elif self._is_on:
            for each in filter(None, (self._first, segment)):
                times = " - ".join(str(timedelta(seconds=int(second))) for second in (each.start, each.end))
                print(line(f"[{times}] {each.text}"), flush=True)
            self._first = None

    def is_whole(self, transcript: "Transcript") -> bool:
        """Whether all of a transcript has been printed."""
        return self._is_on and self._count > 1 and transcript.error is None


def _print(transcript: "Transcript", format: TranscriptFormat, with_name: bool) -> None:
    if transcript.error is not None:
        fail(transcript.error)
        return
    if format == "txt":
        print(line(f"{transcript.audio}: {transcript.text}" if with_name else transcript.text), flush=True)
    else:
        print(render(transcript, format), end="", flush=True)
    if format != "json":
        _tell_flags(transcript)


def _write(transcript: "Transcript", formats: Sequence[TranscriptFormat], directory: Path, stem: str) -> bool:
    """Writes a transcript's files, and prints their paths. Returns whether all could be written."""
    written = True
    if transcript.channel is not None:
        stem += f".channel{transcript.channel}"
    for format in formats:
        path = directory / f"{stem}.{format}"
        try:
            write_file(path, render(transcript, format))
            print(line(str(path)), flush=True)
        except GraniteError as error:
            fail(str(error))
            written = False
    _tell_flags(transcript)
    return written


def _tell_flags(transcript: "Transcript") -> None:
    from granite_jax.inference.results import FLAGS

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
