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
    check_one_channel,
    is_document,
    make_directory,
    output_stems,
    write_file,
)
from granite_jax.cli.terminal import ProgressDisplay, fail, line
from granite_jax.errors import GraniteError
from granite_jax.formats import FORMATS
from granite_jax.options import ModelOptions, TranscribeOptions

if TYPE_CHECKING:
    from granite_jax.results import Segment, Transcript


@takes_options
def transcribe(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE",
            help="wav, flac, mp3, m4a, ogg, mp4, webm, ...; - for standard input; a URL",
            show_default=False,
        ),
    ],
    model: ModelOptions,
    options: TranscribeOptions,
    format: Annotated[
        list[TranscriptFormat] | None,
        typer.Option(
            help="; ".join(f"{name}: {format.description}" for name, format in FORMATS.items())
            + ". txt by default; repeatable",
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

    Prints one line a file, or a channel of it, in order, as soon as its result is there: the text (after the file's
    name, if there are several, and the channel), or a JSON object with the fields of a Transcript. srt, vtt and tsv
    are printed for one file of one channel only. On a terminal, the text of one long file is printed segment by
    segment, with times.

    With --output-dir, each result is written to files named after the input, such as talk.srt for a/talk.wav, or
    talk.channel2.srt, and their paths are printed, one a line; inputs of the same name get more of their paths, as in
    a-talk.srt and b-talk.srt. Files of these names that are there are replaced.

    Files that fail, and those whose text is doubtful, are reported on stderr, one line each. The exit status is 0 if
    all succeeded, 1 if some did not, 2 if nothing could be tried.
    """
    from granite_jax.cli.sources import to_sources  # here, because fsspec is slow to import
    from granite_jax.transcriber import Transcriber

    formats = list[str](dict.fromkeys(format or ["txt"]))
    stems = output_stems(files)
    index, written = -1, True
    try:
        check_formats(formats, len(files), output_dir)
        plots = None if plot is None else _plots_for(plot, files)
        has_one_channel = options.channels == "split" and is_document(formats, output_dir)
        reread = plots is not None or has_one_channel
        sources = to_sources(files, allow or ("file", "gs", "s3", "https"), reread=reread)
        if has_one_channel:
            check_one_channel(sources[0], formats[0])
        if output_dir is not None:
            make_directory(output_dir)
        if options.word_timestamps and not any(FORMATS[format].has_words for format in formats):
            *others, last = [name for name, format in FORMATS.items() if format.has_words]
            fail(f"--words: times of words are in {', '.join(others)} and {last}, not in {' and '.join(formats)}")
        asr = Transcriber.from_options(model, options.recognizer)
        transcripts: list[Transcript] = []
        is_live = formats == ["txt"] and output_dir is None and len(files) == 1 and sys.stdout.isatty()
        is_live = is_live and options.channels == "mix"
        followed = _FollowedSegments(prints=is_live)
        with ProgressDisplay("transcribing", has_bar=not is_live) as display:

            def show() -> None:
                display.show(index + 1, len(files), f"{_clock(followed.seconds)} of audio")

            def on_segment(name: str, segment: "Segment") -> None:
                followed.add(name, segment)
                show()

            show()
            for transcript in asr.stream(sources, options, on_error="return", on_segment=on_segment):
                transcripts.append(transcript)
                index += transcript.channel in (None, 1)  # the channels of an input follow one another
                with display.paused():
                    if output_dir is not None and transcript.error is None:
                        written = _write(transcript, formats, output_dir, stems[index]) and written
                    elif not followed.is_printed(transcript):
                        _print(transcript, formats[0], with_name=len(files) > 1)
                    else:
                        _tell_flags(transcript)
                show()
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


class _FollowedSegments:
    """Follows recordings, and prints the segments of one that has several.

    Fields:
      seconds: of audio that is done, in all recordings together.
    """

    def __init__(self, prints: bool):
        self._prints, self._count = prints, 0
        self._first: Segment | None = None
        self._ends: dict[tuple[str, int | None], float] = {}
        self.seconds = 0.0

    def add(self, name: str, segment: "Segment") -> None:
        recording = name, segment.channel
        self.seconds += segment.end - self._ends.get(recording, 0.0)
        self._ends[recording] = segment.end
        self._count += 1
        if self._prints and self._count == 1:
            self._first = segment  # perhaps the only one
        elif self._prints:
            for each in filter(None, (self._first, segment)):
                if each.text:
                    print(line(f"[{_clock(each.start)} - {_clock(each.end)}] {each.text}"), flush=True)
            self._first = None

    def is_printed(self, transcript: "Transcript") -> bool:
        """Whether all of a transcript has been printed."""
        return self._prints and self._count > 1 and transcript.error is None


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))


def _label(transcript: "Transcript") -> str:
    channel = "" if transcript.channel is None else f", channel {transcript.channel}"
    return f"{transcript.audio}{channel}"


def _print(transcript: "Transcript", format: str, with_name: bool) -> None:
    if transcript.error is not None:
        fail(transcript.error)
        return
    if format == "txt":
        is_labeled = with_name or transcript.channel is not None
        print(line(f"{_label(transcript)}: {transcript.text}" if is_labeled else transcript.text), flush=True)
    else:
        print(FORMATS[format].write(transcript), end="", flush=True)
    if format != "json":
        _tell_flags(transcript)


def _write(transcript: "Transcript", formats: Sequence[str], directory: Path, stem: str) -> bool:
    """Writes a transcript's files, and prints their paths. Returns whether all could be written."""
    written = True
    if transcript.channel is not None:
        stem += f".channel{transcript.channel}"
    for format in formats:
        path = directory / f"{stem}{FORMATS[format].suffix}"
        try:
            write_file(path, FORMATS[format].write(transcript))
            print(line(str(path)), flush=True)
        except GraniteError as error:
            fail(str(error))
            written = False
    _tell_flags(transcript)
    return written


def _tell_flags(transcript: "Transcript") -> None:
    from granite_jax.results import FLAGS

    for flag in transcript.flags:
        starts = [segment.start for segment in transcript.segments if flag in segment.flags]
        place = ""
        if flag == "damaged-input":
            spans = ", ".join(f"{_clock(start)} to {_clock(end)}" for start, end in transcript.damage[:3])
            place = f" at {spans}{', ...' * (len(transcript.damage) > 3)}"
        elif 0 < len(starts) < len(transcript.segments):
            times = ", ".join([*map(_clock, starts[:3]), *["..."] * (len(starts) > 3)])
            place = f" in {len(starts)} of {len(transcript.segments)} segments, at {times}"
        fail(f"{_label(transcript)}: {flag}{place}: {FLAGS[flag]}")


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
