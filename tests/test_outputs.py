"""`transcribe --format ... --output-dir ...`: formats, names of files, and files that cannot be written."""

import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from granite_jax import Transcriber, cli
from granite_jax.cli import outputs, terminal
from granite_jax.cli.outputs import output_stems
from granite_jax.results import Segment, Transcript, Word

HELLO = Segment(0.5, 2.0, "Hello there.", words=(Word("Hello", 0.5, 1.0), Word("there.", 1.0, 2.0)))
SRT = "1\n00:00:00,500 --> 00:00:02,000\nHello there.\n"
VTT = "WEBVTT\n\n00:00:00.500 --> 00:00:02.000\nHello there.\n"
LONG = (
    HELLO,
    Segment(60.0, 67.0, flags=("low-agreement",)),
    *(Segment(70.0 * i, 70.0 * i + 5, "Again.", flags=("low-agreement",)) for i in (1, 2, 60)),
)
TSV = "start\tend\ttext\n500\t2000\tHello there.\n"


@pytest.fixture
def transcribe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command in an empty directory, with a model that hears the same in every file but those called "bad"."""

    def stream(sources: Sequence[Any], *_: Any, on_segment: Any, **__: Any) -> Any:
        for source in sources:
            name = getattr(source, "name", source)
            if "bad" in name:
                yield Transcript(name, error=f"{name}: is not audio")
            elif "silence" in name:
                yield Transcript(name, duration=3.0)
            elif "stereo" in name:
                yield from (Transcript(name, "Hello there.", segments=(HELLO,), channel=channel) for channel in (1, 2))
            elif "long" in name:
                for segment in LONG:
                    on_segment(name, segment)
                yield Transcript(name, "Hello there. Again. Again.", segments=LONG, flags=("low-agreement",))
            else:
                yield Transcript(name, "Hello there.", duration=3.0, segments=(HELLO,))

    def run(*arguments: str | Path, given: bytes | None = None) -> Result:
        result = CliRunner().invoke(cli.app, ["transcribe", *map(str, arguments)], input=given)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    monkeypatch.setattr(Transcriber, "from_options", lambda *_: SimpleNamespace(stream=stream))
    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.parametrize(("format", "content"), [("srt", SRT), ("vtt", VTT), ("tsv", TSV)])
def test_one_format_of_one_file_is_printed(transcribe: Any, format: str, content: str) -> None:
    result = transcribe("a.wav", "--format", format)
    assert (result.exit_code, result.stdout, result.stderr) == (0, content, "")


@pytest.mark.parametrize(("format", "content"), [("srt", ""), ("vtt", "WEBVTT\n"), ("tsv", "start\tend\ttext\n")])
def test_no_speech_is_an_empty_result(transcribe: Any, format: str, content: str) -> None:
    assert transcribe("silence.wav", "--format", format).stdout == content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.wav", "b.wav", "--format", "srt"], "--format srt: several files need --output-dir"),
        (["a.wav", "--format", "txt", "--format", "vtt"], "--format txt, vtt: several formats need --output-dir"),
    ],
)
def test_what_standard_output_cannot_hold_is_refused(transcribe: Any, arguments: list[str], message: str) -> None:
    result = transcribe(*arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"granite-jax: {message}\n")


def test_files_are_written_for_each_input_and_format(transcribe: Any) -> None:
    # Given files of one name in two directories, and three formats one of which is asked for twice
    formats = [option for name in ("txt", "srt", "json", "srt") for option in ("--format", name)]
    result = transcribe("a/talk.wav", "b/talk.wav", "-", *formats, "--output-dir", "new/out")
    # When they are transcribed, then each has its files, and their paths are printed
    names = [f"{stem}.{format}" for stem in ("a-talk", "b-talk", "stdin") for format in ("txt", "srt", "json")]
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [f"new/out/{name}" for name in names]
    assert sorted(os.listdir("new/out")) == sorted(names)
    # And they contain the transcripts
    assert Path("new/out/a-talk.txt").read_bytes() == b"Hello there.\n"
    assert Path("new/out/b-talk.srt").read_bytes().decode() == SRT
    assert json.loads(Path("new/out/stdin.json").read_text())["audio"] == "-"


def test_channels_have_files_of_their_own(transcribe: Any) -> None:
    result = transcribe("stereo.wav", "a.wav", "--format", "vtt", "--output-dir", ".")
    assert result.stdout.split() == ["stereo.channel1.vtt", "stereo.channel2.vtt", "a.vtt"]
    assert Path("stereo.channel2.vtt").read_text() == VTT


def test_a_document_has_room_for_one_channel(transcribe: Any) -> None:
    # Given a file of two channels, and as many of one, when one document has to hold its channels
    for name, channels in (("stereo.wav", 2), ("a.wav", 1)):
        soundfile.write(name, np.zeros((400, channels)), 16_000)
    split = ["--channels", "split", "--format", "srt"]
    for arguments, content in ((["stereo.wav"], None), (["-"], Path("stereo.wav").read_bytes())):
        result = transcribe(*arguments, *split, given=content)
        # Then that is refused, before anything is transcribed; and one channel is not
        message = "granite-jax: --format srt: several channels need --output-dir\n"
        assert (result.exit_code, result.stdout, result.stderr) == (2, "", message)
    assert transcribe("a.wav", *split).stdout == SRT


def test_lines_tell_the_channel(transcribe: Any) -> None:
    result = transcribe("stereo.wav", "--channels", "split")
    assert result.stdout == "stereo.wav, channel 1: Hello there.\nstereo.wav, channel 2: Hello there.\n"


@pytest.mark.parametrize(("formats", "is_told"), [(["txt"], True), (["txt", "tsv"], True), (["txt", "vtt"], False)])
def test_times_that_no_format_has_are_told(transcribe: Any, formats: list[str], is_told: bool) -> None:
    options = [option for name in formats for option in ("--format", name)]
    result = transcribe("a.wav", "--words", "--output-dir", ".", *options)
    shown = f"granite-jax: --words: times of words are in json, srt and vtt, not in {' and '.join(formats)}\n"
    assert (result.exit_code, result.stderr) == (0, shown if is_told else "")


def test_doubts_are_located(transcribe: Any) -> None:
    # Given five segments of which four are doubtful, when they are told, then with their number and where some are
    shown = transcribe("long.wav").stderr
    place = "low-agreement in 4 of 5 segments, at 0:01:00, 0:01:10, 0:02:20, ...: "
    assert shown.startswith(f"granite-jax: long.wav: {place}") and shown.count("\n") == 1


def test_a_long_file_is_shown_on_a_terminal_as_it_goes(
    transcribe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Given a terminal, when a long file is transcribed, then its segments are printed, but for those without text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    terminal_file = io.StringIO()
    console = Console(file=terminal_file, force_terminal=True, width=120)
    monkeypatch.setattr(terminal, "console", console)
    with pytest.raises(SystemExit, match="0"):
        cli.app(["transcribe", "long.wav"])
    assert capsys.readouterr().out.splitlines() == [
        "[0:00:00 - 0:00:02] Hello there.",
        "[0:01:10 - 0:01:15] Again.",
        "[0:02:20 - 0:02:25] Again.",
        "[1:10:00 - 1:10:05] Again.",
    ]
    assert terminal_file.getvalue() == ""
    # And if it is written to a file, then there is a bar with the time that is done
    with pytest.raises(SystemExit, match="0"):
        cli.app(["transcribe", "long.wav", "--output-dir", "."])
    assert capsys.readouterr().out == "long.txt\n"
    assert "1:10:05 of audio" in terminal_file.getvalue()


def test_an_input_that_fails_writes_no_file(transcribe: Any, tmp_path: Path) -> None:
    result = transcribe("bad.wav", "a.wav", "--format", "srt", "--output-dir", "out")
    assert (result.exit_code, result.stderr) == (1, "granite-jax: bad.wav: is not audio\n")
    assert os.listdir("out") == ["a.srt"]


def test_a_file_that_cannot_be_written_is_named_and_loses_nothing_else(transcribe: Any) -> None:
    # Given a directory in a file's place
    Path("out/a.srt").mkdir(parents=True)
    result = transcribe("a.wav", "b.wav", "--format", "srt", "--output-dir", "out")
    # When it is to be written, then that is told, the others are written, and no part of it is left
    assert (result.exit_code, result.stdout) == (1, "out/b.srt\n")
    assert result.stderr == "granite-jax: out/a.srt: cannot be written: Is a directory\n"
    assert sorted(os.listdir("out")) == ["a.srt", "b.srt"]


def test_a_directory_that_cannot_be_made_ends_the_command(transcribe: Any) -> None:
    Path("out").write_text("a file")
    result = transcribe("a.wav", "--output-dir", "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "granite-jax: out: cannot be created: File exists\n"


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a file of an earlier run, when writing is interrupted, then it is as it was, and nothing is beside it
    path = tmp_path / "a.srt"
    path.write_text("before")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", interrupt)
        outputs.write_file(path, "after")
    assert (path.read_text(), os.listdir(tmp_path)) == ("before", ["a.srt"])
    # And when it is not, then it has the new text; names in it that are not valid Unicode are escaped
    outputs.write_file(path, "after\n\udcff\n")
    assert path.read_bytes() == b"after\n\\udcff\n"


@pytest.mark.parametrize(
    ("inputs", "stems"),
    [
        (["a/talk.wav"], ["talk"]),
        (["a/talk.wav", "b/talk.wav"], ["a-talk", "b-talk"]),
        (["talk.wav", "talk.mp3"], ["talk.wav", "talk.mp3"]),
        (["a/talk.wav", "b/talk.wav", "a/talk.mp3"], ["a-talk.wav", "b-talk.wav", "a-talk.mp3"]),
        (["x/a/talk.wav", "y/a/talk.wav"], ["x-a-talk", "y-a-talk"]),
        (["talk.wav", "b/talk.wav"], ["talk", "b-talk"]),
        (["talk.wav", "./talk.wav", "talk.wav"], ["talk", "talk-2", "talk-3"]),
        (["a/1.wav", "b/1.wav", "a/1.wav"], ["a-1", "b-1", "a-1-2"]),
        # Letter case and composition make no difference on some file systems.
        (["Talk.wav", "talk.wav"], ["Talk", "talk-2"]),
        (["é.wav", "e\u0301.mp3"], ["é.wav", "e\u0301.mp3"]),
        # A name that nothing else asks for stays.
        (["b/talk.wav", "a/talk.wav", "a-talk.wav"], ["b-talk", "a-talk-2", "a-talk"]),
        (["-", "stdin.wav"], ["stdin", "stdin.wav"]),
        (["https://example.com/a/b%20c.mp3?x=1#y", "s3://bucket/d.wav"], ["b c", "d"]),
        (["https://example.com/a%2F..%2Fb.mp3", "https://example.com/"], ["b", "example"]),
        (
            [".hidden.wav", "..", "a\nb.wav", "a\\c.wav", ".wav", "no-extension"],
            ["hidden", "audio", "a_b", "a_c", "wav", "no-extension"],
        ),
    ],
)
def test_names_are_those_of_the_inputs(inputs: list[str], stems: list[str]) -> None:
    assert output_stems(inputs) == stems


@given(
    st.lists(
        st.text("aA.é/\\- \n\x00\u0301ß日\udcff%2F:?#", max_size=8) | st.just("w" * 300) | st.just("-"), max_size=8
    )
)
def test_names_are_distinct_and_safe(inputs: list[str]) -> None:
    stems = output_stems(inputs)
    assert len(stems) == len(inputs) == len({stem.casefold() for stem in stems})
    assert output_stems(inputs) == stems
    for stem in stems:
        assert stem and not stem.startswith(".") and not set(stem) & set("/\\\0\n")
        assert len(os.fsencode(stem)) <= 210
